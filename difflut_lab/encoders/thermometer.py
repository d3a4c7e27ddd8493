"""Thermometer code with evenly spaced thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflut_lab.encoders.base import Scope, ThresholdEncoder
from difflut_lab.registry import register_encoder
from difflut_lab.schema import PositiveInt


@register_encoder("thermometer")
class Thermometer(ThresholdEncoder):
    """Thresholds evenly spaced between the least and the greatest value: min + (max - min) * i / (T + 1), i = 1..T.

    Parameters
    ----------
    input_size : int
        F, the features of a sample.
    bits : int
        T, thresholds per feature.
    scope : str
        ``"feature"``, ``"channel"`` or ``"global"``: what has thresholds of its own.
    input_shape : sequence of int, optional
        Shape of a sample, for ``"channel"``.
    """

    def __init__(
        self,
        input_size: int,
        *,
        bits: PositiveInt = 3,
        scope: Scope = "feature",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(input_size, bits, scope, input_shape)

    def find_thresholds(self, columns: Tensor) -> Tensor:
        columns = columns.to(self.thresholds.dtype)
        low, high = columns.amin(dim=1, keepdim=True), columns.amax(dim=1, keepdim=True)
        steps = torch.arange(1, self.bits_per_feature + 1, device=columns.device)
        return low + (high - low) * steps / (self.bits_per_feature + 1)
