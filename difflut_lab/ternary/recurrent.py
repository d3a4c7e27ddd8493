"""LSTMs with ternary weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from difflut_lab.registry import register_ternary
from difflut_lab.schema import PositiveInt, Probability
from difflut_lab.seeding import derive_seed
from difflut_lab.ternary.base import ActivationBits, Augmented, LayerConfigSpec, QuantizerSpec
from difflut_lab.ternary.linear import TernaryLinear

State = tuple[Tensor, Tensor]


@register_ternary("lstm_cell")
class TernaryLSTMCell(Augmented):
    """``nn.LSTMCell`` with ternary weights (Hochreiter and Schmidhuber 1997; gates in the order i, f, g, o).

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    bias : bool
        Whether there is a bias; it is the input projection's, and that of the forget gate starts at 1 (Jozefowicz et
        al. 2015).
    quantizer, bias_quantizer, activation_bits, layer_config, seed
        As of ``TernaryLayer``.

    Attributes
    ----------
    input_proj : TernaryLinear
        ``(4 H, I)``
    hidden_proj : TernaryLinear
        ``(4 H, H)``, without bias.
    """

    def __init__(
        self,
        input_size: PositiveInt,
        hidden_size: PositiveInt,
        bias: bool = True,
        *,
        quantizer: QuantizerSpec = "absmean",
        bias_quantizer: QuantizerSpec = "none",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        ternary: dict[str, Any] = {
            "quantizer": quantizer,
            "bias_quantizer": bias_quantizer,
            "activation_bits": activation_bits,
            "layer_config": layer_config,
        }
        gates = 4 * hidden_size
        self.input_proj = TernaryLinear(input_size, gates, bias, seed=derive_seed(seed, "input_proj"), **ternary)
        self.hidden_proj = TernaryLinear(hidden_size, gates, False, seed=derive_seed(seed, "hidden_proj"), **ternary)
        self.layer_config = layer_config
        if self.input_proj.bias is not None:
            with torch.no_grad():
                self.input_proj.bias[hidden_size : 2 * hidden_size] = 1
            # what it learns starts from the initial bias
            self.input_proj.bias_quantizer.prepare(self.input_proj.bias)

    def forward(self, x: Tensor, state: State | None = None) -> State:
        """Next hidden and cell state, ``(B, H)`` each, of inputs ``(B, I)`` and the state, zeros by default.

        Also ``(H,)`` each of inputs ``(I,)``.
        """
        if state is None:
            zeros = x.new_zeros(*x.shape[:-1], self.hidden_size)
            state = zeros, zeros
        return lstm_step(self.input_proj(x) + self.hidden_proj(state[0]), state[1])

    def sequence(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Hidden states ``(T, B, H)`` of inputs ``(T, B, I)``, and the last state.

        Weights are quantised, and codes drawn and flipped, once for the whole sequence, whose inputs are projected at
        once. Gradients of the hidden projection are stabilised step by step.
        """
        hidden, cell = state
        inputs = self.input_proj(x)
        # a packed projection has nothing to quantise
        project = self.hidden_proj.bound() if isinstance(self.hidden_proj, TernaryLinear) else self.hidden_proj
        outputs = []
        for gates in inputs:
            hidden, cell = lstm_step(gates + project(hidden), cell)
            outputs.append(hidden)
        return torch.stack(outputs), (hidden, cell)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


@register_ternary("lstm")
class TernaryLSTM(Augmented):
    """``nn.LSTM`` with ternary weights: layers of cells over a sequence.

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers : int
        Each layer reads the hidden states of the one before.
    batch_first : bool
        Whether sequences are ``(B, T, features)``, or ``(T, B, features)``.
    dropout : float
        Probability of dropping an output of every layer but the last, in training.
    bias, quantizer, bias_quantizer, activation_bits, layer_config, seed
        As of ``TernaryLSTMCell``.

    Attributes
    ----------
    cells : nn.ModuleList
        One ``TernaryLSTMCell`` per layer.
    """

    def __init__(
        self,
        input_size: PositiveInt,
        hidden_size: PositiveInt,
        num_layers: PositiveInt = 1,
        batch_first: bool = True,
        dropout: Probability = 0.0,
        bias: bool = True,
        *,
        quantizer: QuantizerSpec = "absmean",
        bias_quantizer: QuantizerSpec = "none",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.batch_first = batch_first
        self.dropout = dropout
        self.cells = nn.ModuleList(
            TernaryLSTMCell(
                hidden_size if index else input_size,
                hidden_size,
                bias,
                quantizer=quantizer,
                bias_quantizer=bias_quantizer,
                activation_bits=activation_bits,
                layer_config=layer_config,
                seed=derive_seed(seed, "cell", index),
            )
            for index in range(num_layers)
        )
        self.layer_config = layer_config

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Hidden states of the last layer, and the last hidden and cell states of all layers.

        Parameters
        ----------
        x : Tensor
            ``(B, T, I)``, or ``(T, B, I)`` where not ``batch_first``; T is at least 1.
        state : tuple of Tensor, optional
            Hidden and cell states at the start, ``(layers, B, H)`` each; zeros by default.

        Returns
        -------
        output : Tensor
            ``(B, T, H)`` or ``(T, B, H)``.
        state : tuple of Tensor
            ``(layers, B, H)`` each.

        Raises
        ------
        ValueError
            If x has not three dimensions.
        """
        if x.dim() != 3:
            raise ValueError(f"{type(self).__name__} expects inputs of three dimensions, got {tuple(x.shape)}.")
        outputs = x.transpose(0, 1) if self.batch_first else x
        if state is None:
            zeros = x.new_zeros(len(self.cells), outputs.shape[1], self.hidden_size)
            state = zeros, zeros
        last: list[State] = []
        for index, cell in enumerate(self.cells):
            assert isinstance(cell, TernaryLSTMCell)
            if index and self.dropout:
                outputs = functional.dropout(outputs, self.dropout, self.training)
            outputs, reached = cell.sequence(outputs, (state[0][index], state[1][index]))
            last.append(reached)
        hidden, cells = (torch.stack(parts) for parts in zip(*last, strict=True))
        return outputs.transpose(0, 1) if self.batch_first else outputs, (hidden, cells)

    def extra_repr(self) -> str:
        return f"batch_first={self.batch_first}, dropout={self.dropout}"


def lstm_step(gates: Tensor, cell: Tensor) -> State:
    """Hidden and cell state after a step.

    Parameters
    ----------
    gates : Tensor
        Sums of the four gates, ``(B, 4 H)``, in the order i, f, g, o.
    cell : Tensor
        Cell state before the step, ``(B, H)``.
    """
    i, f, g, o = gates.chunk(4, dim=-1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell
