"""Thermometer code whose thresholds are trained with the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from difflut_lab.encoders.base import FittedEncoder, Scope
from difflut_lab.encoders.distributive_thermometer import quantiles
from difflut_lab.registry import register_encoder
from difflut_lab.schema import PositiveFloat, PositiveInt

# in place of the spread of a constant feature, which divides
_NO_SPREAD = 1e-30


@register_encoder("learnable_thermometer")
class LearnableThermometer(FittedEncoder):
    """Thresholds that start at quantiles of the training data and are trained by gradient descent.

    Bits are hard in training, too: x > threshold. The gradient is that of sigmoid((x - threshold) / (temperature * s))
    in the bit's place, s the standard deviation of the row's training values, so that it reaches thresholds near to
    samples. Trained are offsets from the quantiles in units of s; the thresholds are in ascending order at all times,
    whatever the offsets are.

    Parameters
    ----------
    input_size : int
        F, the features of a sample.
    bits : int
        T, thresholds per feature.
    temperature : float
        Width of the sigmoid, in standard deviations. Small ones let few samples near a threshold move it.
    scope : str
        ``"feature"``, ``"channel"`` or ``"global"``: what has thresholds of its own.
    input_shape : sequence of int, optional
        Shape of a sample, for ``"channel"``.

    Attributes
    ----------
    offset : nn.Parameter
        ``(R, T)``.
    start : Tensor
        ``(R, T)``, the quantiles; a buffer, NaN until fitted or loaded.
    spread : Tensor
        ``(R,)``, the standard deviations; a buffer, NaN until fitted or loaded.
    """

    SCHEDULABLE: ClassVar[tuple[str, ...]] = ("temperature",)

    start: Tensor
    spread: Tensor

    def __init__(
        self,
        input_size: int,
        *,
        bits: PositiveInt = 3,
        temperature: PositiveFloat = 0.1,
        scope: Scope = "feature",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(input_size, bits, scope, input_shape)
        self.temperature = temperature
        self.offset = nn.Parameter(torch.zeros(self.rows, bits))
        self.register_buffer("start", torch.full((self.rows, bits), torch.nan))
        self.register_buffer("spread", torch.full((self.rows,), torch.nan))

    @property
    def thresholds(self) -> Tensor:
        """The thresholds in force, ``(R, T)``, ascending."""
        return (self.start + self.spread[:, None] * self.offset).sort(dim=1).values

    def fit_rows(self, rows: Tensor) -> None:
        self.start.copy_(quantiles(rows, self.bits_per_feature))
        values = rows.to(self.spread.dtype)
        self.spread.copy_((values - values[:, :1]).std(dim=1, correction=0))
        self.offset.zero_()

    def encode(self, x: Tensor, bits: Tensor) -> Tensor:
        thresholds = self.thresholds[:, None, :, None]
        torch.gt(x, thresholds.detach(), out=bits)
        if not (self.training and torch.is_grad_enabled()):
            return bits
        width = (self.temperature * self.spread).clamp(min=_NO_SPREAD)
        # NaN: the bit is 0, without a gradient
        soft = torch.sigmoid(((x - thresholds) / width.view(-1, 1, 1, 1)).nan_to_num(nan=0.0))
        return bits + (soft - soft.detach()).to(bits.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"
