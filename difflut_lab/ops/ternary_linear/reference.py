"""Products with ternary weights in plain torch: codes become floats in every call.

Shape letters: M tokens, K inputs of an output, O outputs, G groups of inputs that share a scale; a convolution's input
is ``(B, C, H, W)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from difflut_lab.ops.shapes import compute_dtype
from difflut_lab.ops.ternary_linear.activations import EXACT, LEVELS, quantize_activations
from difflut_lab.ops.ternary_linear.codes import unpack_codes


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    skew: Tensor | None,
    group_size: int | None,
    activation_bits: int | None,
) -> Tensor:
    """``(M, O)`` of ``x (M, K)``; see ``ternary_linear``."""
    dtype = compute_dtype(x, scale)
    bias = None if bias is None else bias.to(dtype)
    weight = unpack_codes(codes, x.shape[1])
    if activation_bits is None:
        return functional.linear(x.to(dtype), values(weight, scale, skew, group_size).to(dtype), bias)
    levels, step = quantize_activations(x.to(dtype), (-1,))
    sums = _sums(levels, weight, scale, skew, group_size, functional.linear, (1, -1))
    y = sums.to(dtype) * step
    return y if bias is None else y + bias


def conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    skew: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    group_size: int | None,
    activation_bits: int | None,
) -> Tensor:
    """``(B, O, H', W')`` of ``x (B, C, H, W)``; see ``ternary_conv2d``."""
    dtype = compute_dtype(x, scale)
    bias = None if bias is None else bias.to(dtype)
    weight = unpack_codes(codes, math.prod(weight_shape[1:])).view(*weight_shape)
    if activation_bits is None:
        floats = values(weight, scale, skew, group_size).to(dtype)
        return functional.conv2d(x.to(dtype), floats, bias, list(stride), list(padding), groups=groups)
    levels, step = quantize_activations(x.to(dtype), (-3, -2, -1))

    def convolve(part: Tensor, codes: Tensor) -> Tensor:
        return functional.conv2d(part, codes, None, list(stride), list(padding), groups=groups)

    if group_size is None or groups == 1:
        sums = _sums(levels, weight, scale, skew, group_size, convolve, (1, -1, 1, 1))
    else:
        # inputs of different outputs are different channels: scales go into the weight, and sums are no integers
        sums = convolve(levels, values(weight, scale, skew, group_size).to(dtype))
    y = sums.to(dtype) * step
    return y if bias is None else y + bias.view(-1, 1, 1)


def values(codes: Tensor, scale: Tensor, skew: Tensor | None, group_size: int | None) -> Tensor:
    """``scale * codes + skew * |codes|``, in the dtype of scale, for codes ``(O, I, ...)``, int8."""
    floats = codes.to(scale.dtype)
    weight = floats * spread(scale, codes, group_size)
    return weight if skew is None else weight + floats.abs() * spread(skew, codes, group_size)


def spread(scale: Tensor, codes: Tensor, group_size: int | None) -> Tensor:
    """Scales ``(O,)`` or ``(O, G)``, broadcastable against codes ``(O, I, ...)``."""
    ones = [1] * (codes.dim() - 2)
    if group_size is None:
        return scale.view(-1, 1, *ones)
    per_input = scale.repeat_interleave(group_size, dim=1)[:, : codes.shape[1]]
    return per_input.reshape(*per_input.shape, *ones)


def _sums(
    levels: Tensor,
    codes: Tensor,
    scale: Tensor,
    skew: Tensor | None,
    group_size: int | None,
    product: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
) -> Tensor:
    """``scale * (codes . levels) + skew * (|codes| . levels)``; the products are exact, summed group by group."""
    size = codes.shape[1] if group_size is None else group_size
    exact = torch.float64 if math.prod(codes.shape[1:]) * LEVELS >= EXACT else levels.dtype
    total: Tensor | None = None
    for group, part in enumerate(codes.split(size, dim=1)):
        inputs = levels if group_size is None else levels.narrow(1, group * size, part.shape[1])
        inputs, floats = inputs.to(exact), part.to(exact)
        factors = [scale] if skew is None else [scale, skew]
        for factor, signs in zip(factors, (floats, floats.abs()), strict=False):
            per_output = factor if group_size is None else factor[:, group]
            term = product(inputs, signs) * per_output.view(*shape)
            total = term if total is None else total + term
    assert total is not None
    return total
