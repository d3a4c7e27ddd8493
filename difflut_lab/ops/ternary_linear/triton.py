"""Products with ternary weights on a GPU, in Triton.

Codes stay two bits in memory and are decoded in registers; a convolution is a product whose rows are the positions of
its output, gathered as they are needed. With 8-bit activations, a kernel rounds each token, or each sample of a
convolution, to bytes first. Scales, steps and bias come last.

Shape letters: M tokens, K inputs of an output, W words that K codes take, O outputs; images are ``(B, C, H, W)``.
"""

# kernels are typed by Triton's compiler
# mypy: disable-error-code="assignment, no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton import knobs

from difflut_lab.ops.dot.triton import COUNTERS, FLOATS, GATHERED, HALVES, SINGLES, decode, product, scaled
from difflut_lab.ops.kernel.triton import bucket, declines, device_of, stored, tune
from difflut_lab.ops.ternary_linear import layout, output_size
from difflut_lab.ops.ternary_linear.activations import LEVELS
from difflut_lab.ops.ternary_linear.codes import WORD

__all__ = ["conv2d", "declines", "linear"]

# tokens that are multiplied one by one; not measured
FEW = 4

LARGEST = tl.constexpr(float(LEVELS))
SMALLEST_STEP = tl.constexpr(torch.finfo(torch.float32).tiny)
# added and taken away it leaves no fraction, rounded to even: a float32 of this size has no bits for one
ROUND = tl.constexpr(1.5 * 2**23)

# ROWS, VALUES and warps to try
ROUNDED = ((8, 128, 4), (1, 1024, 4), (1, 4096, 8))
ROUNDED_INTERPRETED = (64, 256, 4)


def _round(x, levels, step, length, padded, num_tokens, bucket, ROWS: tl.constexpr, VALUES: tl.constexpr):
    """``levels (M, padded)`` of ``x (M, length)``, 0 beyond it, and ``step (M,)``; NaN where a row is not finite."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = (row < num_tokens)[:, None]
    inputs = x + row.to(tl.int64)[:, None] * length
    outputs = levels + row.to(tl.int64)[:, None] * padded
    largest = tl.zeros([ROWS, VALUES], tl.float32)
    for first in range(0, length, VALUES):
        at = first + tl.arange(0, VALUES)[None, :]
        value = tl.abs(tl.load(inputs + at, mask=exists & (at < length), other=0).to(tl.float32))
        # a maximum passes NaN over
        largest = tl.maximum(largest, tl.where(value < float("inf"), value, float("inf")))
    found = tl.max(largest, 1)
    # rounded as IEEE says, as torch does
    unit = tl.maximum(tl.div_rn(found, LARGEST), SMALLEST_STEP)
    finite = found < float("inf")
    tl.store(step + row, tl.where(finite, unit, float("nan")), mask=row < num_tokens)
    for first in range(0, padded, VALUES):
        at = first + tl.arange(0, VALUES)[None, :]
        value = tl.load(inputs + at, mask=exists & (at < length), other=0).to(tl.float32)
        level = (tl.div_rn(value, unit[:, None]) + ROUND) - ROUND
        level = tl.where(finite[:, None], level, 0.0)
        tl.store(outputs + at, level.to(tl.int8), mask=exists & (at < padded))


def _multiply(
    x,
    codes,
    scale,
    skew,
    bias,
    step,
    y,
    length,
    num_outputs,
    num_tokens,
    bucket,
    SKEWED: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """``y (M, O)`` of ``x (M, K)``."""
    blocks = tl.cdiv(num_outputs, OUTPUTS)
    token = tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    there, exists = token < num_tokens, output < num_outputs
    rows = x + token.to(tl.int64)[:, None] * length
    integer: tl.constexpr = x.dtype.element_ty == tl.int8
    sums = tl.zeros([TOKENS, OUTPUTS], tl.int32 if integer else tl.float32)
    kept = sums
    for first in range(0, length, INPUTS):
        k = first + tl.arange(0, INPUTS)[None, :]
        values = tl.load(rows + k, mask=there[:, None] & (k < length), other=0)
        signs = tl.trans(decode(codes, output, exists, first, length, OUTPUTS, INPUTS))
        sums = tl.dot(values, signs.to(values.dtype), sums, input_precision="ieee", out_dtype=sums.dtype)
        if SKEWED:
            kept = tl.dot(values, (signs & 1).to(values.dtype), kept, input_precision="ieee", out_dtype=kept.dtype)
    if step is not None:
        step = tl.load(step + token, mask=there, other=0)[:, None]
    result = scaled(sums, kept, scale, skew, bias, step, output, exists)
    at = token.to(tl.int64)[:, None] * num_outputs + output[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=there[:, None] & exists[None, :])


def _multiply_one(
    x,
    codes,
    scale,
    skew,
    bias,
    step,
    y,
    length,
    num_outputs,
    bucket,
    SKEWED: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """``y (M, O)`` of ``x (M, K)``, a program per token; sums over inputs come last."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    exists = output < num_outputs
    token = tl.program_id(1).to(tl.int64)
    row = x + token * length
    integer: tl.constexpr = x.dtype.element_ty == tl.int8
    computed: tl.constexpr = tl.int32 if integer else tl.float32
    sums = tl.zeros([OUTPUTS, INPUTS], computed)
    kept = sums
    for first in range(0, length, INPUTS):
        k = first + tl.arange(0, INPUTS)
        values = tl.load(row + k, mask=k < length, other=0).to(computed)[None, :]
        signs = decode(codes, output, exists, first, length, OUTPUTS, INPUTS)
        sums += values * signs.to(computed)
        if SKEWED:
            kept += values * (signs & 1).to(computed)
    if step is not None:
        step = tl.load(step + token)
    result = scaled(tl.sum(sums, 1), tl.sum(kept, 1), scale, skew, bias, step, output, exists)
    tl.store(y + token * num_outputs + output, result.to(y.dtype.element_ty), mask=exists)


def _convolve(
    x,
    codes,
    scale,
    skew,
    bias,
    step,
    y,
    length,
    num_outputs,
    num_tokens,
    bucket,
    height,
    width,
    out_height,
    out_width,
    x_sample,
    x_channel,
    x_line,
    x_column,
    y_sample,
    y_channel,
    y_line,
    y_column,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    SKEWED: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """``y (B, O, H', W')`` of ``x (B, C, H, W)``, in the layouts that the strides say, for one group of channels.

    A token is a position of the output, ``num_outputs`` the channels of a group's output; inputs are in the order of a
    weight's row: channel, line, column.
    """
    blocks = tl.cdiv(num_outputs, OUTPUTS)
    token = tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    there, exists = token < num_tokens, output < num_outputs
    group = tl.program_id(2)
    channel = group * num_outputs + output
    column = token % out_width
    line = token // out_width % out_height
    sample = token // (out_width * out_height)
    left = (column * STRIDE_W - PADDING_W)[:, None]
    top = (line * STRIDE_H - PADDING_H)[:, None]
    area: tl.constexpr = KERNEL_H * KERNEL_W
    images = x + sample.to(tl.int64)[:, None] * x_sample + (group * (length // area)).to(tl.int64) * x_channel
    integer: tl.constexpr = x.dtype.element_ty == tl.int8
    sums = tl.zeros([TOKENS, OUTPUTS], tl.int32 if integer else tl.float32)
    kept = sums
    for first in range(0, length, INPUTS):
        k = first + tl.arange(0, INPUTS)[None, :]
        from_line = top + k % area // KERNEL_W
        from_column = left + k % KERNEL_W
        inside = (from_line >= 0) & (from_line < height) & (from_column >= 0) & (from_column < width)
        at = k // area * x_channel + from_line * x_line + from_column * x_column
        values = tl.load(images + at, mask=inside & there[:, None] & (k < length), other=0)
        signs = tl.trans(decode(codes, channel, exists, first, length, OUTPUTS, INPUTS))
        sums = tl.dot(values, signs.to(values.dtype), sums, input_precision="ieee", out_dtype=sums.dtype)
        if SKEWED:
            kept = tl.dot(values, (signs & 1).to(values.dtype), kept, input_precision="ieee", out_dtype=kept.dtype)
    if step is not None:
        step = tl.load(step + sample, mask=there, other=0)[:, None]
    result = scaled(sums, kept, scale, skew, bias, step, channel, exists)
    places = sample.to(tl.int64) * y_sample + line * y_line + column * y_column
    at = places[:, None] + channel.to(tl.int64)[None, :] * y_channel
    tl.store(y + at, result.to(y.dtype.element_ty), mask=there[:, None] & exists[None, :])


round_values = tune(
    _round,
    [
        triton.Config({"ROWS": rows, "VALUES": values}, num_warps=warps)
        for rows, values, warps in ((ROUNDED_INTERPRETED,) if knobs.runtime.interpret else ROUNDED)
    ],
    ("length", "bucket"),
    COUNTERS,
)
multiply = product(_multiply, HALVES)
multiply_floats = product(_multiply, FLOATS)
multiply_one = product(_multiply_one, SINGLES)
convolve = product(_convolve, GATHERED)
convolve_floats = product(_convolve, FLOATS)


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    skew: Tensor | None,
    group_size: int | None,
    activation_bits: int | None,
) -> Tensor:
    """``(M, O)`` of ``x (M, K)``; see ``ternary_linear``. Groups that share a scale are for the reference."""
    x, num_tokens, num_outputs = _floating(x), x.shape[0], codes.shape[0]
    # whole words, so that loads of all rows are aligned
    length = codes.shape[1] * WORD
    y = x.new_empty((num_tokens, num_outputs), dtype=stored(x.dtype))
    if y.numel() == 0:
        return y
    with device_of(x):
        step = None
        if activation_bits is not None:
            levels = x.new_empty((num_tokens, length), dtype=torch.int8)
            step = _rounded(x, levels)
            x = levels
        elif x.shape[1] < length:
            x = functional.pad(x, (0, length - x.shape[1]))
        x = x.to(stored(x.dtype))
        tensors = (x, *_contiguous(codes, scale, skew, bias), step, y)
        if num_tokens <= FEW:
            multiply_one[lambda meta: (triton.cdiv(num_outputs, meta["OUTPUTS"]), num_tokens)](
                *tensors, length, num_outputs, bucket(num_tokens), SKEWED=skew is not None
            )
        else:
            kernel = multiply_floats if x.dtype == torch.float32 else multiply
            kernel[_grid(num_tokens, num_outputs)](
                *tensors, length, num_outputs, num_tokens, bucket(num_tokens), SKEWED=skew is not None
            )
    return y


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
    """``(B, O, H', W')`` of ``x (B, C, H, W)``; see ``ternary_conv2d``. Not where groups share a scale, as above."""
    x = _floating(x)
    if not x.is_contiguous(memory_format=layout(x)):
        x = x.contiguous()
    samples, _, height, width = x.shape
    size = output_size((height, width), weight_shape[2:], stride, padding)
    shape = (samples, codes.shape[0], *size)
    y = torch.empty(shape, dtype=stored(x.dtype), device=x.device, memory_format=layout(x))
    if y.numel() == 0:
        return y
    num_tokens, num_outputs = samples * math.prod(size), codes.shape[0] // groups
    with device_of(x):
        step = None
        if activation_bits is not None:
            levels = torch.empty_like(x, dtype=torch.int8)
            step = _rounded(x, levels)
            x = levels
        x = x.to(stored(x.dtype))
        kernel = convolve_floats if x.dtype == torch.float32 else convolve
        kernel[_grid(num_tokens, num_outputs, groups)](
            x,
            *_contiguous(codes, scale, skew, bias),
            step,
            y,
            math.prod(weight_shape[1:]),
            num_outputs,
            num_tokens,
            bucket(num_tokens),
            height,
            width,
            *size,
            *x.stride(),
            *y.stride(),
            *weight_shape[2:],
            *stride,
            *padding,
            SKEWED=skew is not None,
        )
    return y


def _rounded(x: Tensor, levels: Tensor) -> Tensor:
    """The steps of the samples or tokens of ``x``, and into ``levels`` their integers, in the same order in memory."""
    num_tokens = x.shape[0]
    step = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    sizes = x[0].numel(), levels[0].numel(), num_tokens, bucket(num_tokens)
    round_values[lambda meta: (triton.cdiv(num_tokens, meta["ROWS"]),)](x, levels, step, *sizes)
    return step


def _grid(num_tokens: int, num_outputs: int, groups: int = 1) -> Callable[[dict[str, int]], tuple[int, int, int]]:
    """A program per block of tokens, block of outputs and group; those of one block of tokens follow each other."""
    return lambda meta: (
        triton.cdiv(num_tokens, meta["TOKENS"]) * triton.cdiv(num_outputs, meta["OUTPUTS"]),
        1,
        groups,
    )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _floating(x: Tensor) -> Tensor:
    """``x`` in a type that tensor cores or float32 units multiply."""
    return x if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x.float()
