"""LSTMs, against torch's with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from difflut_lab.layers import LayerConfig
from difflut_lab.ternary import Quantizer, TernaryLSTM, TernaryLSTMCell
from difflut_lab.ternary.quantizers import AbsMean

B, T, INPUTS, HIDDEN = 3, 6, 5, 4


def copy_weights(cell: TernaryLSTMCell, reference: nn.Module, suffix: str) -> None:
    """Give a module of torch the weights that a cell uses in eval mode."""
    modes = [module.training for module in cell.modules()]
    cell.eval()
    state = {
        f"weight_ih{suffix}": cell.input_proj.effective_weight(),
        f"weight_hh{suffix}": cell.hidden_proj.effective_weight(),
        f"bias_ih{suffix}": cell.input_proj.effective_bias(),
        f"bias_hh{suffix}": torch.zeros(4 * HIDDEN),
    }
    for module, mode in zip(cell.modules(), modes, strict=True):
        module.training = mode
    reference.load_state_dict(reference.state_dict() | state)


@pytest.mark.parametrize("quantizer", ["none", "absmean", "ttq"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("given", [True, False])
def test_sequence_is_that_of_torch(quantizer: str, batch_first: bool, num_layers: int, given: bool) -> None:
    lstm = TernaryLSTM(INPUTS, HIDDEN, num_layers, batch_first, quantizer=quantizer)
    reference = nn.LSTM(INPUTS, HIDDEN, num_layers, batch_first=batch_first)
    for index, cell in enumerate(lstm.cells):
        assert isinstance(cell, TernaryLSTMCell)
        copy_weights(cell, reference, f"_l{index}")
    x = torch.randn(B, T, INPUTS) if batch_first else torch.randn(T, B, INPUTS)
    state = (torch.randn(num_layers, B, HIDDEN), torch.randn(num_layers, B, HIDDEN)) if given else None
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    output, (hidden, memory) = lstm(inputs[0], state)
    wanted, (wanted_hidden, wanted_memory) = reference(inputs[1], state)
    for got, expected in ((output, wanted), (hidden, wanted_hidden), (memory, wanted_memory)):
        torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(output)
    gradients = [
        torch.autograd.grad(y, values, upstream)[0] for y, values in zip((output, wanted), inputs, strict=True)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(B, INPUTS), (INPUTS,)])
def test_cell_is_that_of_torch(shape: tuple[int, ...]) -> None:
    cell, reference = TernaryLSTMCell(INPUTS, HIDDEN), nn.LSTMCell(INPUTS, HIDDEN)
    copy_weights(cell, reference, "")
    x, state = torch.randn(shape), (torch.randn(*shape[:-1], HIDDEN), torch.randn(*shape[:-1], HIDDEN))
    for given in (state, None):
        for got, wanted in zip(cell(x, given), reference(x, given), strict=True):
            torch.testing.assert_close(got, wanted)


def test_sequence_is_its_cell_step_by_step() -> None:
    lstm = TernaryLSTM(INPUTS, HIDDEN, activation_bits=8).eval()
    x = torch.randn(B, T, INPUTS)
    output, last = lstm(x)
    state = None
    for step in range(T):
        state = lstm.cells[0](x[:, step], state)
        torch.testing.assert_close(output[:, step], state[0])
    assert state is not None
    torch.testing.assert_close(last[0][0], state[0])
    torch.testing.assert_close(last[1][0], state[1])


def test_weights_are_quantised_once_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Quantizer] = []
    quantize: Any = AbsMean.quantize

    def counted(self: AbsMean, *args: Any) -> Any:
        calls.append(self)
        return quantize(self, *args)

    monkeypatch.setattr(AbsMean, "quantize", counted)
    TernaryLSTM(INPUTS, HIDDEN, 2)(torch.randn(B, T, INPUTS))
    assert len(calls) == len(set(calls)) == 4


def test_flips_stay_during_a_sequence() -> None:
    """With the same inputs and no memory of them, every step would give the same outputs."""
    cell = TernaryLSTMCell(INPUTS, HIDDEN, layer_config=LayerConfig(flip_probability=0.5))
    step = torch.randn(1, B, INPUTS)
    state = torch.zeros(B, HIDDEN), torch.zeros(B, HIDDEN)
    project = cell.hidden_proj.bound()
    hidden = torch.randn(B, HIDDEN)
    assert torch.equal(project(hidden), project(hidden))
    first, second = (cell.sequence(step, state)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_dropout_between_layers_in_training_only() -> None:
    x = torch.randn(B, T, INPUTS)
    lstm = TernaryLSTM(INPUTS, HIDDEN, 2, dropout=0.5)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    assert torch.equal(lstm.eval()(x)[0], lstm(x)[0])
    single = TernaryLSTM(INPUTS, HIDDEN, 1, dropout=0.5)
    assert torch.equal(single(x)[0], single(x)[0])


def test_biases_start_with_forget_gates_open_and_can_be_ternary() -> None:
    cell = TernaryLSTMCell(INPUTS, HIDDEN, bias_quantizer="ttq")
    bias = cell.input_proj.effective_bias()
    assert bias is not None and cell.input_proj.bias is not None
    assert (cell.input_proj.bias[HIDDEN : 2 * HIDDEN] == 1).all()
    # one value for all positive biases, one for all negative ones
    assert len(bias.unique()) == 2


def test_a_sequence_without_a_batch_is_refused() -> None:
    # as many steps as features: it would pass, the wrong way round
    with pytest.raises(ValueError, match=r"TernaryLSTM expects inputs of three dimensions, got \(5, 5\)"):
        TernaryLSTM(INPUTS, HIDDEN)(torch.randn(5, INPUTS))
