"""Thermometer code whose thresholds are quantiles of a normal distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflut_lab.encoders.base import Scope, ThresholdEncoder
from difflut_lab.registry import register_encoder
from difflut_lab.schema import PositiveInt


@register_encoder("gaussian_thermometer")
class GaussianThermometer(ThresholdEncoder):
    """Thresholds at quantiles of the normal distribution that has the training values' mean and standard deviation.

    Threshold i of 1..T is mean + std * z(i / (T + 1)), z the inverse of the standard normal distribution function and
    std the population standard deviation (Susskind et al. 2022, arXiv 2203.01479).

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
        # from a value in their midst: the deviations of a constant feature are 0 without a rounding error
        origin = columns[:, :1]
        std, mean = torch.std_mean(columns - origin, dim=1, correction=0, keepdim=True)
        steps = torch.arange(1, self.bits_per_feature + 1, dtype=torch.float64, device=columns.device)
        z = torch.special.ndtri(steps / (self.bits_per_feature + 1))
        return origin + mean + std * z.to(mean.dtype)
