"""A learned step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from difflut_lab.registry import register_quantizer
from difflut_lab.ternary.quantizers.base import Quantizer, Ternary, smallest

# a weight of equal magnitudes starts at exactly half its step, which shall round away from 0
HALF = 0.5 - 1e-5


@register_quantizer("lsq")
class LearnedStep(Quantizer):
    """Codes are ``clip(round(w / s), -1, 1)`` with a learned step s (learned step size quantisation, arXiv 1902.08153).

    With q = s * codes, dq/ds is ``round(w / s) - w / s`` where ``|w| < s``, else ``sign(w)``, and its sum is divided by
    the square root of the number of weights that share s; dq/dw is 1 where ``|w| < s``, else 0.

    Parameters
    ----------
    granularity, group_size, blend
        As of ``Quantizer``.

    Attributes
    ----------
    step : nn.Parameter
        s, one per scale; at the start twice the mean magnitude. Its magnitude is what counts, so that s stays positive.
    """

    step: nn.Parameter

    @torch.no_grad()
    def prepare(self, weight: Tensor) -> None:
        self.step = nn.Parameter(self.compact(2 * self.mean(weight.abs())).clamp(min=smallest(weight.dtype)).clone())

    def quantize(self, weight: Tensor, generator: torch.Generator | None) -> Ternary:
        count = self.compact(self.sum(torch.ones_like(weight)))
        # the value of the step, and a share of its gradient
        share = 1 / count.sqrt()
        step = self.step.abs()
        step = (step * share + (step - step * share).detach()).clamp(min=smallest(weight.dtype))
        scale = self.spread(step, weight)
        return Ternary(_Round.apply(weight, scale), scale, torch.zeros_like(scale))


class _Round(torch.autograd.Function):
    """Codes of a weight and a step, with the slope of ``clip(w / s, -1, 1)``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(weight, step)
        return torch.where(weight.abs() / step > HALF, torch.sign(weight), 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight, step = ctx.saved_tensors
        inside = torch.where(weight.abs() < step, gradient / step, 0.0)
        return inside, -(inside * weight / step).sum_to_size(step.shape)
