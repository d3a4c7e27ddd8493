"""A threshold that stays what it is."""

from __future__ import annotations

import torch
from torch import Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_quantizer
from difflut_lab.schema import Fraction, Probability
from difflut_lab.ternary.quantizers.base import Quantizer, Ternary, straight_through


@register_quantizer("fixed")
class Fixed(Quantizer):
    """Codes are ``sign(w)`` where ``|w| > threshold``, else 0; the scale is 1.

    Weights as networks usually start are far below a third: then every code is 0, nothing is learned, and the layer
    refuses to be built. A threshold of about the weights' standard deviation suits them. The gradient reaches the
    latent weight unchanged.

    Parameters
    ----------
    blend : float
        As of ``Quantizer``.
    threshold : float
        Magnitude above which a weight is kept.
    """

    def __init__(self, *, blend: Probability = 1.0, threshold: Fraction = 0.33) -> None:
        super().__init__(granularity="tensor", blend=blend)
        self.threshold = threshold

    def prepare(self, weight: Tensor) -> None:
        largest = float(weight.detach().abs().amax())
        if largest <= self.threshold:
            raise ConfigError(
                f"quantizer.threshold={self.threshold}: every code is 0, because the largest weight is {largest:.3g}; "
                f"a threshold of {float(weight.detach().square().mean().sqrt()):.2g} suits these weights."
            )

    def quantize(self, weight: Tensor, generator: torch.Generator | None) -> Ternary:
        codes = torch.sign(weight.detach()) * (weight.detach().abs() > self.threshold)
        one = weight.new_ones([1] * weight.dim())
        return Ternary(straight_through(weight, codes, 1.0), one, torch.zeros_like(one))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"
