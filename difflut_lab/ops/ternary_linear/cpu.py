"""Products with ternary weights on a CPU: codes stay two bits each in memory and become bytes or floats in registers.

Shape letters: M tokens, K inputs of an output, O outputs, W words that K codes take, R rows of bytes that M tokens are
padded to, L bytes that K levels are padded to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from difflut_lab.ops.convolve.cpu import convolve
from difflut_lab.ops.dot.cpu import KINDS, PANELS, TILE, WIDE, begin_panels, choice, end_panels, kinds, rows_at_once
from difflut_lab.ops.kernel.cpu import exact_kernel
from difflut_lab.ops.panels.cpu import (
    ROWS,
    await_outputs,
    dot_panels,
    dot_rows,
    finish,
    make_panel,
    round_row,
    weigh,
    weigh_rows,
)
from difflut_lab.ops.ternary_linear.activations import quantize_activations
from difflut_lab.ops.ternary_linear.codes import WORD
from difflut_lab.ops.ternary_linear.ways import attempt, tried
from difflut_lab.ops.threads.cpu import run

# tokens that go through dot_rows or weigh_rows at once, where there are more than a few
TOKENS = 4
# outputs of a block of panels, and tokens that are computed with it before the next block
BLOCK, SHARE = TILE * PANELS, 512
# tokens up to which words are read once for a few of them, and from which on panels are tried
MOST_BY_ROWS, LEAST_BY_PANELS = 64, 3
# measured at 1024 and 4096 inputs, 1024 outputs: with 128 tokens, a product of matrices takes no longer
MOST_BY_WEIGHTS = 64
# floats of a block of weights, while it is multiplied
FLOATS = 1 << 18


@exact_kernel
def quantize(begin, end, by_shift, x, tokens, count, levels, stride):  # type: ignore[no-untyped-def]
    """Rows of levels of a run of tokens ``x (M, K)``; copies of the last token's beyond M."""
    for t in range(begin, end):
        round_row(by_shift, x + 4 * min(t, tokens - 1) * count, count, levels + t * stride, stride - 64)


@exact_kernel
def by_rows(  # type: ignore[no-untyped-def]
    begin, end, kind, at_once, skewed, codes, outputs, width, levels, stride, scale, skew, bias, y, tokens
):
    """Outputs ``y (M, O)`` of a run of blocks of ROWS outputs, from words; levels lie by shift."""
    for block in range(begin, end):
        for t in range(0, tokens, len(at_once)):
            dot_rows(
                kind,
                at_once,
                skewed,
                codes,
                ROWS * block,
                outputs,
                width,
                levels + t * stride,
                stride,
                scale,
                skew,
                bias,
                y + 4 * t * outputs,
                tokens - t,
            )


@exact_kernel
def by_panels(  # type: ignore[no-untyped-def]
    begin, end, kind, at_once, skewed, codes, outputs, width, levels, stride, scale, skew, bias, y, tokens
):
    """Outputs ``y (M, O)`` of a run of pairs of a block of outputs and a share of the tokens, one block after another.

    Digits of a block are bytes in scratch memory; levels lie word by word.
    """
    size = -(-width // 16) * 16 * 256
    memory = np.empty((1 + len(skewed)) * PANELS * size + 64, np.uint8)
    panels = (memory.ctypes.data + 63) // 64 * 64
    results = np.empty(2 * PANELS * 2 * TILE * TILE + 16, np.int32)
    sums = (results.ctypes.data + 63) // 64 * 64
    zeros = sums + 4 * PANELS * 2 * TILE * TILE
    shares = -(-tokens // SHARE)
    made = -1
    begin_panels(kind)
    for pair in range(begin, end):
        block, share = pair // shares, pair % shares
        first = BLOCK * block
        if block != made:
            made = block
            for p in range(PANELS):
                make_panel((), codes, first + TILE * p, outputs, width, panels + p * size)
                if len(skewed) > 0:
                    make_panel(skewed, codes, first + TILE * p, outputs, width, panels + (PANELS + p) * size)
        last = min(tokens, SHARE * (share + 1))
        for t0 in range(SHARE * share, last, at_once):
            count, row = min(at_once, last - t0), levels + t0 * stride
            out = y + 4 * t0 * outputs
            await_outputs(out + 4 * first, outputs, count)
            dot_panels(kind, (), panels, size, row, stride, count, stride // 64 - 1, sums)
            if len(skewed) > 0:
                dot_panels(kind, (), panels + PANELS * size, size, row, stride, count, stride // 64 - 1, zeros)
            finish(skewed, sums, zeros, count, row, stride, scale, skew, bias, out, first, outputs)
    end_panels(kind)


@exact_kernel
def by_weights(begin, end, at_once, tables, codes, outputs, width, x, bias, y, tokens):  # type: ignore[no-untyped-def]
    """Outputs ``y (M, O)`` of a run of blocks of ROWS outputs, of floats ``x (M, 16 W)``."""
    for block in range(begin, end):
        for t in range(0, tokens, len(at_once)):
            row, out = x + 64 * t * width, y + 4 * t * outputs
            weigh_rows(at_once, tables, codes, ROWS * block, outputs, width, row, bias, out, tokens - t)


@exact_kernel
def unpack(begin, end, first, tables, codes, width, out):  # type: ignore[no-untyped-def]
    """Weights ``out (R, 16 W)`` of a run of R outputs from ``first`` on."""
    for row in range(begin, end):
        weigh(tables, codes, first + row, width, out + 64 * row * width)


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
    (tokens, inputs), outputs = x.shape, len(codes)
    arguments = _prepared(x, codes, scale, bias, skew)
    if activation_bits is None or tokens == 0:
        return _weighted(*arguments)
    bucket, threads = (tokens - 1).bit_length(), torch.get_num_threads()
    key = "linear", inputs, outputs, bucket, threads, skew is None
    way = tried(key)
    if way is None:
        ways = ["rows"] * (tokens <= MOST_BY_ROWS) + ["panels"] * (tokens >= LEAST_BY_PANELS) + ["float"]
        what = f"linear {inputs} -> {outputs}, {_range(bucket)} tokens, {threads} threads"
        way = attempt(key, what, {name: partial(LINEAR[name], *arguments) for name in ways})
    return LINEAR[way](*arguments)


def _prepared(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, skew: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The same, contiguous and in float32, with a bias."""
    bias = torch.zeros(len(codes)) if bias is None else bias.float().contiguous()
    skew = None if skew is None else skew.float().contiguous()
    return x.float().contiguous(), codes.contiguous(), scale.float().contiguous(), bias, skew


def _range(bucket: int) -> str:
    """Numbers that share a power of two, the next one."""
    return str(1 << bucket) if bucket < 2 else f"{(1 << bucket - 1) + 1} to {1 << bucket}"


def linear_by_rows(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, skew: Tensor | None, kind: str = ""
) -> Tensor:
    """Words become digits in registers, again for each few tokens."""
    kind = kind or kinds(False)[-1]
    at_once = 1 if len(x) <= 2 or KINDS[kind] < WIDE else TOKENS
    levels = _levels(x, at_once, by_shift=True)
    y = torch.empty(len(x), len(codes))
    blocks, work = -(-len(codes) // ROWS), codes.numel() * len(x) // 16
    run(by_rows, blocks, work, choice(kind), (0,) * at_once, *_addresses(codes, levels, scale, skew, bias, y))
    return y


def linear_by_panels(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, skew: Tensor | None, kind: str = ""
) -> Tensor:
    """Words of a block of outputs become bytes once for many tokens."""
    kind = kind or kinds()[-1]
    at_once = rows_at_once(kind)
    levels = _levels(x, TILE, by_shift=False)
    y = torch.empty(len(x), len(codes))
    pairs, work = -(-len(codes) // BLOCK) * -(-len(x) // SHARE), codes.numel() * (8 + len(x)) // 32
    run(by_panels, pairs, work, choice(kind), at_once, *_addresses(codes, levels, scale, skew, bias, y))
    return y


def linear_by_floats(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, skew: Tensor | None) -> Tensor:
    """Levels and codes as floats: sums are exact there, too."""
    levels, step = quantize_activations(x)
    one, zero = torch.ones(len(codes)), torch.zeros(len(codes))
    y = _products(levels, codes, _tables(one, None), zero).mul_(scale)
    if skew is not None:
        y += _products(levels, codes, _tables(zero, one), zero).mul_(skew)
    return y.mul_(step).add_(bias)


LINEAR: dict[str, Callable[..., Tensor]] = {
    "rows": linear_by_rows,
    "panels": linear_by_panels,
    "float": linear_by_floats,
}


def _levels(x: Tensor, multiple: int, by_shift: bool) -> Tensor:
    """Bytes ``(R, L + 64)`` of x, for a multiple of tokens: levels, then the token's step and sum."""
    tokens, count = x.shape
    rows = -(-tokens // multiple) * multiple
    width = 16 * WORD if by_shift else 4 * WORD
    levels = torch.empty(rows, -(-count // width) * width + 64, dtype=torch.int8)
    layout = (0,) if by_shift else ()
    run(quantize, rows, rows * count >> 1, layout, x.data_ptr(), tokens, count, levels.data_ptr(), levels.shape[1])
    return levels


def _addresses(
    codes: Tensor, levels: Tensor, scale: Tensor, skew: Tensor | None, bias: Tensor, y: Tensor
) -> tuple[Any, ...]:
    """The last arguments of ``by_rows`` and ``by_panels``."""
    parameters = scale, scale if skew is None else skew, bias, y
    return (
        () if skew is None else (0,),
        codes.data_ptr(),
        *codes.shape,
        levels.data_ptr(),
        levels.shape[1],
        *(tensor.data_ptr() for tensor in parameters),
        len(y),
    )


def _tables(scale: Tensor, skew: Tensor | None) -> Tensor:
    """Weights of each output by digit, ``(O, 4)``; the last is never read."""
    tables = torch.zeros(len(scale), 4)
    tables[:, 0] = -scale if skew is None else skew - scale
    tables[:, 2] = scale if skew is None else scale + skew
    return tables


def _weighted(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, skew: Tensor | None) -> Tensor:
    """Products with floats."""
    return _products(x, codes, _tables(scale, skew), bias)


def _products(x: Tensor, codes: Tensor, tables: Tensor, bias: Tensor) -> Tensor:
    """``(M, O)`` of floats ``x (M, K)``. What sums are rounded to depends on the way: a rule chooses it, no trial."""
    (tokens, inputs), (outputs, width) = x.shape, codes.shape
    if tokens <= MOST_BY_WEIGHTS:
        y = torch.empty(tokens, outputs)
        at_once = 1 if tokens <= 2 or "avx512" not in kinds() else TOKENS
        padding = 0, WORD * width - inputs, 0, -tokens % at_once
        x = functional.pad(x, padding) if any(padding) else x
        weights = tables.data_ptr(), codes.data_ptr(), outputs, width
        memory = (tensor.data_ptr() for tensor in (x, bias, y))
        run(by_weights, -(-outputs // ROWS), codes.numel() * tokens, (0,) * at_once, *weights, *memory, tokens)
        return y
    y = bias.expand(tokens, -1).contiguous()
    step = max(BLOCK, FLOATS // (WORD * width))
    for first in range(0, outputs, step):
        rows = min(step, outputs - first)
        y[:, first : first + rows].addmm_(x, _weights(codes, tables, inputs, first, rows).t())
    return y


def _weights(codes: Tensor, tables: Tensor, inputs: int, first: int, rows: int) -> Tensor:
    """Float weights ``(rows, K)`` of some outputs."""
    width = codes.shape[1]
    weights = torch.empty(rows, WORD * width)
    run(unpack, rows, 2 * rows * width, first, tables.data_ptr(), codes.data_ptr(), width, weights.data_ptr())
    return weights[:, :inputs]


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
    length, shape = math.prod(weight_shape[1:]), tuple(weight_shape)
    arguments = _prepared(x, codes, scale, bias, skew)
    convolution = partial(functional.conv2d, stride=tuple(stride), padding=tuple(padding), groups=groups)
    if activation_bits is None:
        x, codes, scale, bias, skew = arguments
        weights = _weights(codes, _tables(scale, skew), length, 0, len(codes))
        return convolution(x, weights.reshape(shape), bias)
    # measured at the shapes of ResNet-18 and ResNet-20: floats take twice to twenty times as long as bytes
    ways = {
        "bytes": lambda: convolve(*arguments, shape[2:], stride, padding),
        "float": lambda: conv2d_by_floats(*arguments, shape, convolution),
    }
    if groups > 1 or x.numel() == 0:
        return ways["float"]()
    bucket, threads = (len(x) - 1).bit_length(), torch.get_num_threads()
    key = "conv2d", tuple(x.shape[1:]), shape, tuple(stride), tuple(padding), bucket, threads, skew is None
    way = tried(key)
    if way is None:
        sizes = ", ".join(" x ".join(map(str, size)) for size in (x.shape[1:], shape, stride, padding))
        what = f"conv2d of {sizes} (image, weight, stride, padding), {_range(bucket)} images, {threads} threads"
        way = attempt(key, what, ways)
    return ways[way]()


def conv2d_by_floats(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor,
    skew: Tensor | None,
    shape: Sequence[int],
    convolution: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Levels and codes as floats."""
    levels, step = quantize_activations(x, (-3, -2, -1))
    one, zero = torch.ones(len(codes)), torch.zeros(len(codes))
    tables = (_tables(one, None), scale), (_tables(zero, one), skew)
    terms = [
        convolution(levels, _weights(codes, table, math.prod(shape[1:]), 0, len(codes)).reshape(shape)).mul_(
            factor.view(-1, 1, 1)
        )
        for table, factor in tables
        if factor is not None
    ]
    return sum(terms[1:], terms[0]).mul_(step).add_(bias.view(-1, 1, 1))
