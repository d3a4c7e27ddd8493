"""Weights above a share of their mean magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from difflut_lab.registry import register_quantizer
from difflut_lab.schema import Fraction, PositiveInt, Probability
from difflut_lab.ternary.quantizers.base import Granularity, Quantizer, Ternary, smallest, straight_through


@register_quantizer("twn")
class TernaryWeightNetworks(Quantizer):
    """Codes are ``sign(w)`` where ``|w| > threshold * m``, else 0 (ternary weight networks, arXiv 1605.04711).

    m is the mean of ``|w|``; the scale is the mean of ``|w|`` over the weights that are kept, which is nearest to the
    latent weights in the least-squares sense. The gradient reaches the latent weight unchanged.

    Parameters
    ----------
    granularity, group_size, blend
        As of ``Quantizer``.
    threshold : float
        In units of m; 0.7 suits weights between a uniform and a normal distribution. Below 1, or weights that are
        ternary already would lose their codes.
    """

    def __init__(
        self,
        *,
        granularity: Granularity = "channel",
        group_size: PositiveInt = 64,
        blend: Probability = 1.0,
        threshold: Fraction = 0.7,
    ) -> None:
        super().__init__(granularity=granularity, group_size=group_size, blend=blend)
        self.threshold = threshold

    def quantize(self, weight: Tensor, generator: torch.Generator | None) -> Ternary:
        latent = weight.detach()
        magnitude = latent.abs()
        kept = magnitude > self.threshold * self.mean(magnitude)
        scale = self.sum(magnitude * kept) / self.sum(kept.to(latent.dtype)).clamp(min=1)
        scale = scale.clamp(min=smallest(latent.dtype))
        codes = torch.sign(latent) * kept
        return Ternary(straight_through(weight, codes, 1 / scale), scale, torch.zeros_like(scale))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"
