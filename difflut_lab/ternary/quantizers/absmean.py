"""Weights rounded by their mean magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from difflut_lab.registry import register_quantizer
from difflut_lab.ternary.quantizers.base import Quantizer, Ternary, smallest, straight_through


@register_quantizer("absmean")
class AbsMean(Quantizer):
    """Codes are ``clip(round(w / m), -1, 1)`` and the scale is m, the mean of ``|w|`` (BitNet b1.58, arXiv 2402.17764).

    The gradient reaches the latent weight unchanged; none passes through m.

    Parameters
    ----------
    granularity, group_size, blend
        As of ``Quantizer``.
    """

    def quantize(self, weight: Tensor, generator: torch.Generator | None) -> Ternary:
        scale = self.mean(weight.detach().abs()).clamp(min=smallest(weight.dtype))
        codes = (weight.detach() / scale).round_().clamp_(-1, 1)
        return Ternary(straight_through(weight, codes, 1 / scale), scale, torch.zeros_like(scale))
