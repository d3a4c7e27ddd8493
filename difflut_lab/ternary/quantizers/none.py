"""No quantisation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from difflut_lab.registry import register_quantizer
from difflut_lab.ternary.quantizers.base import Quantizer, Ternary


@register_quantizer("none")
class NoQuantizer(Quantizer):
    """Weights stay as they are: a layer with it is its own float twin, for comparison."""

    SCHEDULABLE: tuple[str, ...] = ()

    is_float: ClassVar[bool] = True

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def quantize(self, weight: Tensor, generator: torch.Generator | None) -> Ternary:
        raise TypeError("quantizer 'none' leaves weights in float: they have no codes.")

    def extra_repr(self) -> str:
        return ""
