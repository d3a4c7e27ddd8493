from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.nodes import FourierNodes


def reference(nodes: FourierNodes, node: int, x: list[float]) -> float:
    """b + sum_f A_f cos(2 pi k_f.x + phi_f) of one node and one sample, wave by wave, before the clamp."""
    magnitudes = [abs(weight) for weight in nodes.weight[node].tolist()]
    scale = min(1.0, 0.5 / sum(magnitudes))
    total = nodes.bias[node, 0].item()
    for magnitude, phase, turns in zip(magnitudes, nodes.phase[node].tolist(), nodes.turns.tolist(), strict=True):
        frequency = [0.5 if turn else 0.0 for turn in turns]
        angle = 2 * math.pi * sum(k * value for k, value in zip(frequency, x, strict=True)) + phase
        total += scale * magnitude * math.cos(angle)
    return total


def bank(num_nodes: int, n: int, factor: float = 1.0) -> FourierNodes:
    nodes = FourierNodes(num_nodes, n).double()
    with torch.no_grad():
        nodes.weight.mul_(factor * torch.randn(nodes.weight.shape).double())
        nodes.bias.add_(0.1 * torch.randn(num_nodes, 1).double())
    return nodes


# amplitudes far below a sum of 1/2, and far above
@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("n", [1, 2, 4, 6, 9])
def test_every_address(n: int, factor: float) -> None:
    nodes = bank(3, n, factor)
    bits = [list(reversed(word)) for word in itertools.product([0.0, 1.0], repeat=n)]
    wanted = torch.tensor([[reference(nodes, node, x) for x in bits] for node in range(3)], dtype=torch.float64)
    routed = torch.tensor(bits, dtype=torch.float64).unsqueeze(1).expand(-1, 3, -1)
    torch.testing.assert_close(nodes(routed), wanted.clamp(0, 1).t())
    assert (wanted - 0.5).abs().min() > 1e-9
    assert torch.equal(nodes.truth_table(), wanted >= 0.5)
    assert torch.equal(nodes.eval()(routed), (wanted >= 0.5).double().t())


def test_between_and_outside_of_bits() -> None:
    nodes = bank(3, 6)
    x = 3 * torch.rand(10, 3, 6, dtype=torch.float64) - 1
    y = nodes(x)
    for sample in range(10):
        for node in range(3):
            wanted = reference(nodes, node, x[sample, node].clamp(0, 1).tolist())
            assert float(y[sample, node].detach()) == pytest.approx(min(max(wanted, 0), 1))


@pytest.mark.parametrize("factor", [0.5, 10.0])
def test_gradients(factor: float) -> None:
    nodes = bank(3, 3, factor)
    x = torch.rand(5, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, phase: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(nodes, {"weight": weight, "phase": phase, "bias": bias}, (x,))
        return y

    assert torch.autograd.gradcheck(run, (x, nodes.weight, nodes.phase, nodes.bias))


@pytest.mark.parametrize(("n", "frequencies", "waves"), [(2, 32, 3), (4, 32, 15), (6, 32, 32), (6, 5, 5), (8, 20, 20)])
def test_frequencies_are_the_simplest_ones(n: int, frequencies: int, waves: int) -> None:
    turns = FourierNodes(2, n, frequencies=frequencies).turns
    assert turns.shape == (waves, n) and turns.dtype == torch.bool
    assert len({tuple(row) for row in turns.tolist()}) == waves
    sizes = turns.sum(1).tolist()
    simplest = sorted(address.bit_count() for address in range(1, 2**n))[:waves]
    assert sizes == simplest


def test_frequencies_are_shared_stored_and_not_trained() -> None:
    nodes, other = FourierNodes(3, 7, seed=1), FourierNodes(3, 7, seed=2)
    assert not torch.equal(nodes.turns, other.turns)
    assert "turns" not in dict(nodes.named_parameters())
    other.load_state_dict(nodes.state_dict())
    x = torch.rand(4, 3, 7)
    assert torch.equal(nodes(x), other(x))


def test_no_output_starts_at_the_clamp() -> None:
    nodes = FourierNodes(300, 6)
    x = torch.rand(100, 300, 6, requires_grad=True)
    y = nodes(x)
    assert y.min() > 0 and y.max() < 1
    assert y.std() > 0.05
    bias_gradient = torch.autograd.grad(y.sum(), nodes.bias)[0]
    torch.testing.assert_close(bias_gradient, torch.full((300, 1), 100.0))


def test_number_of_frequencies_is_checked() -> None:
    for value in (0, 33):
        with pytest.raises(ConfigError, match=rf"^node\.frequencies={value}: must be at least 1 and at most 32"):
            schema.validate_part("node", {"name": "fourier", "frequencies": value}, "node")
