"""Scales of their own for positive and negative weights, both learned."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_quantizer
from difflut_lab.schema import PositiveInt, Probability
from difflut_lab.ternary.quantizers.base import Granularity, Quantizer, Ternary, smallest, straight_through

# of the larger of two scales: what is below would be a zero when ternary weights are quantised again
SMALLEST = 2.0
Threshold = Annotated[float, Field(gt=0, lt=1 / SMALLEST)]


@register_quantizer("ttq")
class TrainedTernary(Quantizer):
    """Codes are ``sign(w)`` where ``|w| > threshold * max|w|``; W_p and W_n are learned (TTQ, arXiv 1612.01064).

    Positive weights become W_p, negative ones -W_n: ``scale = (W_p + W_n) / 2``, ``skew = (W_p - W_n) / 2``. W_p gets
    the sum of the gradients of the weights of code +1, W_n minus that of code -1. The latent weight gets its gradient
    times W_p, 1 or W_n where its code is +1, 0 or -1. Neither scale is used below ``2 * threshold`` of the other; its
    gradient passes as if it were.

    What the optimizer moves are the logarithms of W_p and W_n: they stay positive, and a step is one in proportion.
    Moved themselves, by SGD at a rate of 0.1 that suits latent weights, scales of 0.1 came to lie between -0.7 and 0.9
    within 120 steps of a ResNet-20.

    Parameters
    ----------
    granularity, group_size, blend
        As of ``Quantizer``.
    threshold : float
        In units of the largest magnitude that shares the scale; less than a half.

    Raises
    ------
    ConfigError
        If the threshold is another number.

    Attributes
    ----------
    log_positive, log_negative : nn.Parameter
        Logarithms of W_p and W_n, one per scale; at the start of the mean magnitude of the weights with their code.
    """

    log_positive: nn.Parameter
    log_negative: nn.Parameter

    def __init__(
        self,
        *,
        granularity: Granularity = "channel",
        group_size: PositiveInt = 64,
        blend: Probability = 1.0,
        threshold: Threshold = 0.05,
    ) -> None:
        super().__init__(granularity=granularity, group_size=group_size, blend=blend)
        if not 0 < threshold < 1 / SMALLEST:
            raise ConfigError(f"threshold={threshold}: must be greater than 0 and less than {1 / SMALLEST}.")
        self.threshold = threshold

    @torch.no_grad()
    def prepare(self, weight: Tensor) -> None:
        codes = self._codes(weight)
        for name, sign in (("positive", 1), ("negative", -1)):
            kept = (codes == sign).to(weight.dtype)
            mean = self.sum(weight.abs() * kept) / self.sum(kept).clamp(min=1)
            # where no weight has the code, the scale of all of them
            mean = torch.where(self.sum(kept) > 0, mean, self.mean(weight.abs())).clamp(min=smallest(weight.dtype))
            setattr(self, f"log_{name}", nn.Parameter(self.compact(mean).log()))

    def quantize(self, weight: Tensor, generator: torch.Generator | None) -> Ternary:
        codes = self._codes(weight.detach())
        larger = torch.maximum(self.log_positive, self.log_negative).detach()
        least = larger + math.log(SMALLEST * self.threshold)
        positive = self.spread(_at_least(self.log_positive, least).exp(), weight)
        negative = self.spread(_at_least(self.log_negative, least).exp(), weight)
        scale, skew = (positive + negative) / 2, (positive - negative) / 2
        # codes times scale + skew * sign(codes) gives W_p and W_n; where a code is 0 the weight's slope shall be 1
        slope = torch.where(codes == 0, 1 / scale.detach(), 1.0)
        return Ternary(straight_through(weight, codes, slope), scale, skew)

    def _codes(self, latent: Tensor) -> Tensor:
        return torch.sign(latent) * (latent.abs() > self.threshold * self.amax(latent.abs()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"


def _at_least(value: Tensor, least: Tensor) -> Tensor:
    """The larger of both, with the gradient of ``value``."""
    return straight_through(value, torch.maximum(value, least).detach(), 1.0)
