"""Linear layers and convolutions whose weights are codes of two bits, for inference.

Shape letters: K inputs of an output, O outputs, W words that K codes take, G groups of inputs that share a scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from difflut_lab.ops.dispatch import choose
from difflut_lab.ops.ternary_linear.activations import EXACT, LEVELS, quantize_activations
from difflut_lab.ops.ternary_linear.codes import WORD, pack_base3, pack_codes, unpack_base3, unpack_codes
from difflut_lab.ops.ternary_linear.ways import explain

__all__ = [
    "explain",
    "pack_base3",
    "pack_codes",
    "quantize_activations",
    "ternary_conv2d",
    "ternary_linear",
    "unpack_base3",
    "unpack_codes",
]

GROUPED = "scales differ by group"
INEXACT = "float32 does not hold sums of so many levels"
NO_AVX2 = "the processor has no AVX2"


def _plain(x: Tensor, length: int, group_size: int | None, activation_bits: int | None) -> str:
    """Why only the reference computes a product with rows of K weights, a length."""
    if group_size:
        return GROUPED
    if activation_bits and length * LEVELS >= EXACT:
        return INEXACT
    return "" if _has_avx2() or x.device.type != "cpu" else NO_AVX2


@functools.cache
def _has_avx2() -> bool:
    return bool(torch.backends.cpu.get_cpu_capability().startswith("AVX"))


def _compute_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    skew: Tensor | None,
    group_size: int | None,
    activation_bits: int | None,
) -> Tensor:
    backend = choose("ternary_linear", 0, x, scale, plain=_plain(x, x.shape[1], group_size, activation_bits))
    y: Tensor = backend.linear(x.contiguous(), codes, scale, bias, skew, group_size, activation_bits)
    return y.to(x.dtype)


_linear = torch.library.custom_op("difflut_lab::ternary_linear", _compute_linear, mutates_args=())


@_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    skew: Tensor | None,
    group_size: int | None,
    activation_bits: int | None,
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _compute_conv2d(
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
    plain = _plain(x, math.prod(weight_shape[1:]), group_size, activation_bits)
    backend = choose("ternary_linear", 0, x, scale, plain=plain)
    y: Tensor = backend.conv2d(
        x, codes, scale, bias, skew, weight_shape, stride, padding, groups, group_size, activation_bits
    )
    return y.to(x.dtype).contiguous(memory_format=layout(x))


_conv2d = torch.library.custom_op("difflut_lab::ternary_conv2d", _compute_conv2d, mutates_args=())


@_conv2d.register_fake
def _(
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
    shape = (x.shape[0], codes.shape[0], *output_size(x.shape[2:], weight_shape[2:], stride, padding))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def ternary_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    skew: Tensor | None = None,
    *,
    group_size: int | None = None,
    activation_bits: int | None = None,
) -> Tensor:
    """Product with a ternary weight: ``y = scale * (c . x) + skew * (|c| . x) + bias``.

    For inference: it has no gradient.

    Parameters
    ----------
    x : Tensor
        ``(..., K)``, in any layout and floating dtype. Computed in float32 at least.
    codes : Tensor
        int32 ``(O, W)``, made by ``pack_codes``.
    scale : Tensor
        ``(O,)``, or ``(O, G)`` where groups of inputs have scales of their own.
    bias : Tensor, optional
        ``(O,)``
    skew : Tensor, optional
        Of the scale's shape.
    group_size : int, optional
        Inputs per group; the last may be smaller. None where an output has one scale.
    activation_bits : int, optional
        8 rounds each row of x to 8-bit integers first (see ``quantize_activations``); the products with codes are then
        exact integers.

    Returns
    -------
    Tensor
        ``(..., O)``, in the dtype of x.

    Raises
    ------
    ValueError
        If shapes do not fit, or ``activation_bits`` is another number.
    """
    _check(x.shape[-1], codes, scale, bias, skew, x.shape[-1], group_size, activation_bits)
    compute = _compute_linear if _unobserved(x) else _linear
    if x.dim() == 2:
        return compute(x, codes, scale, bias, skew, group_size, activation_bits)
    y = compute(x.reshape(-1, x.shape[-1]), codes, scale, bias, skew, group_size, activation_bits)
    return y.view(*x.shape[:-1], codes.shape[0])


def ternary_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    skew: Tensor | None = None,
    *,
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    group_size: int | None = None,
    activation_bits: int | None = None,
) -> Tensor:
    """Convolution with a ternary weight, ``(B, C, H, W)`` to ``(B, O, H', W')``, in the memory format of x.

    For inference: it has no gradient.

    Parameters
    ----------
    x : Tensor
        ``(B, C, H, W)``, in any layout and floating dtype. Computed in float32 at least.
    codes : Tensor
        int32 ``(O, W)``, made by ``pack_codes`` of the weight's rows, ``(O, C / groups * kh * kw)``.
    scale, bias, skew
        As of ``ternary_linear``; groups are of input channels.
    weight_shape : sequence of int
        ``(O, C / groups, kh, kw)``
    stride, padding : sequence of int
        Two numbers each, as of ``torch.nn.functional.conv2d``.
    groups : int
        Each of as many groups of output channels sees only its own input channels.
    group_size : int, optional
        Input channels that share a scale.
    activation_bits : int, optional
        8 rounds each sample to 8-bit integers first, with one step for all its values.

    Raises
    ------
    ValueError
        If shapes do not fit, or ``activation_bits`` is another number.
    """
    if x.dim() != 4 or x.shape[1] != weight_shape[1] * groups or codes.shape[0] != weight_shape[0]:
        raise ValueError(f"x: must have shape (B, {weight_shape[1] * groups}, H, W), not {tuple(x.shape)}.")
    length = math.prod(weight_shape[1:])
    _check(length, codes, scale, bias, skew, weight_shape[1], group_size, activation_bits)
    return (_compute_conv2d if _unobserved(x) else _conv2d)(
        x,
        codes,
        scale,
        bias,
        skew,
        list(weight_shape),
        list(stride),
        list(padding),
        groups,
        group_size,
        activation_bits,
    )


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    height, width = (
        (length + 2 * pad - extent) // step + 1
        for length, extent, step, pad in zip(size, kernel, stride, padding, strict=True)
    )
    return height, width


def layout(x: Tensor) -> torch.memory_format:
    """The memory format of a convolution's output: that of its input."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _unobserved(x: Tensor) -> bool:
    """Whether nobody wants a graph or a gradient: calling an op costs 0.03 ms, as much as a small product."""
    differentiated = x.requires_grad and torch.is_grad_enabled()
    return type(x) is Tensor and not (differentiated or torch.compiler.is_compiling() or torch.jit.is_tracing())


def _check(
    length: int,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    skew: Tensor | None,
    inputs: int,
    group_size: int | None,
    activation_bits: int | None,
) -> None:
    if activation_bits not in (None, 8):
        raise ValueError(f"activation_bits={activation_bits}: must be 8 or None.")
    outputs = codes.shape[0]
    if codes.dtype != torch.int32 or codes.dim() != 2 or codes.shape[1] != -(-length // WORD):
        raise ValueError(
            f"codes: must be int32 (O, {-(-length // WORD)}) for {length} inputs, not {codes.dtype} "
            f"{tuple(codes.shape)}."
        )
    wanted = (outputs,) if group_size is None else (outputs, -(-inputs // group_size))
    for name, tensor, shape in (("scale", scale, wanted), ("skew", skew, wanted), ("bias", bias, (outputs,))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: must have shape {shape}, not {tuple(tensor.shape)}.")
