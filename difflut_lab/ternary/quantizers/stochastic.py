"""Codes drawn at random."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from difflut_lab.registry import register_quantizer
from difflut_lab.ternary.quantizers.absmean import AbsMean
from difflut_lab.ternary.quantizers.base import Ternary, smallest, straight_through


@register_quantizer("stochastic")
class Stochastic(AbsMean):
    """In training a code is ``sign(w)`` with probability ``min(|w| / m, 1)``, else 0; m, the scale, is the mean of |w|.

    Within ``|w| <= m`` the expected weight is the latent weight (Courbariaux et al., arXiv 1511.00363, for three
    values; Lin et al., arXiv 1510.03009). In eval mode codes are those of ``absmean``. The gradient reaches the latent
    weight unchanged.

    Parameters
    ----------
    granularity, group_size, blend
        As of ``Quantizer``.
    """

    draws: ClassVar[bool] = True

    def quantize(self, weight: Tensor, generator: torch.Generator | None) -> Ternary:
        if generator is None:
            return super().quantize(weight, None)
        latent = weight.detach()
        scale = self.mean(latent.abs()).clamp(min=smallest(latent.dtype))
        noise = torch.rand(latent.shape, generator=generator, dtype=latent.dtype, device=latent.device)
        codes = torch.sign(latent) * (noise * scale < latent.abs())
        return Ternary(straight_through(weight, codes, 1 / scale), scale, torch.zeros_like(scale))
