"""Activations that are rounded to 8-bit integers while a network is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflut_lab.ops.ternary_linear import quantize_activations
from difflut_lab.ternary.quantizers.base import straight_through


def fake_quantize(x: Tensor, dims: Sequence[int] = (-1,)) -> Tensor:
    """``levels * step`` of ``quantize_activations``, with the gradient of x; levels are those of x in float32."""
    levels, step = quantize_activations(x.detach().to(torch.promote_types(x.dtype, torch.float32)), dims)
    return straight_through(x, levels * step, 1.0)
