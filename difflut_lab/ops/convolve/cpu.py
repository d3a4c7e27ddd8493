"""Convolutions of 8-bit images with packed codes on a CPU, without a matrix of image patches in floats.

A pixel's patch would be a row of such a matrix. Here 16 neighbouring pixels of the output are the columns of a panel:
what one code multiplies for all of them lies side by side in the image, at an offset that depends on the code only.
Offsets are those of a stride of 1: an image is taken apart so that every ``stride``-th pixel of a row stands beside the
last. Rows of the output are as wide as those of the image with its padding; what is too much is not written.

Shape letters: B samples, C input channels, K codes of an output, W words that K codes take, O outputs, G groups of 16
pixels of a sample's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from difflut_lab.ops.convolve.geometry import CODES, geometry
from difflut_lab.ops.dot.cpu import (
    DIGITS,
    INTEGERS,
    PANELS,
    TILE,
    WIDE,
    ZEROS,
    Dots,
    begin_panels,
    choice,
    chosen,
    emitted,
    end_panels,
    kinds,
    rows_at_once,
)
from difflut_lab.ops.kernel.cpu import I1, I8, I16, I32, I64, exact_kernel, intrinsic
from difflut_lab.ops.panels.cpu import dot_panels
from difflut_lab.ops.ternary_linear import output_size
from difflut_lab.ops.ternary_linear.codes import WORD
from difflut_lab.ops.threads.cpu import run

# outputs of a block, and bytes of all panels that it is multiplied with
BLOCK, SCRATCH = 2 * TILE, 1 << 19


@intrinsic
def measure(typingctx, image, count, step):  # type: ignore[no-untyped-def]
    """The step of an image of ``count`` floats, at an address, to another."""

    def emit(v: Dots, image: Any, count: Any, step: Any) -> None:
        v.builder.store(v.step(v.largest(v.pointer(image), count)), v.pointer(step))

    return emitted((), 3, emit)


@intrinsic
def round_line(typingctx, line, count, step, out):  # type: ignore[no-untyped-def]
    """Levels of a line of floats as bytes, and zeros up to a whole number of WIDE; ``step`` is an address."""

    def emit(v: Dots, line: Any, count: Any, step: Any, out: Any) -> None:
        out = v.pointer(out, I8)

        def put(levels: ir.Value, at: ir.Value) -> None:
            v.store(v.builder.trunc(levels, ir.VectorType(I8, WIDE)), out, at)

        v.round(v.pointer(line), count, v.builder.load(v.pointer(step)), put)

    return emitted((), 4, emit)


@intrinsic
def make_columns(typingctx, kind, image, offsets, places, rows, out, total):  # type: ignore[no-untyped-def]
    """A panel of 16 pixels: 64 bytes for four codes, a pixel's four side by side; and each pixel's sum of levels.

    Parameters
    ----------
    kind : tuple
        Its length says which, not AMX.
    image : int
        Address of what the first code multiplies for the first pixel.
    offsets, places, rows : int
        Addresses of int32 ``(rows, 4)``, each code's place in the image, and ``(rows,)``, where each four's bytes go.
    out, total : int
        Addresses of the panel and of int32 ``(16,)``.
    """
    name = chosen(kind)

    def emit(v: Dots, image: Any, offsets: Any, places: Any, rows: Any, out: Any, total: Any) -> None:
        builder = v.builder
        image, out = v.pointer(image, I8), v.pointer(out, I8)
        offsets, places, total = (v.pointer(address, I32) for address in (offsets, places, total))
        line, pair = ir.VectorType(I8, WIDE), range(2 * WIDE)
        (sums,) = v.variables(INTEGERS, 1)
        with v.loop(rows) as (row, _):
            lines = []
            for i in range(4):
                offset = builder.load(builder.gep(offsets, [builder.add(builder.shl(row, I64(2)), I64(i))]))
                lines.append(v.load(image, builder.sext(offset, I64), line))
            halves = [builder.shuffle_vector(*lines[i : i + 2], v.constant(I32, pair)) for i in (0, 2)]
            turned = v.constant(I32, [WIDE * i + pixel for pixel in range(WIDE) for i in range(4)])
            column = builder.bitcast(builder.shuffle_vector(*halves, turned), INTEGERS)
            v.store(column, out, builder.sext(builder.load(builder.gep(places, [row])), I64))
            ones = v.constant(I32, [0x01010101] * WIDE)
            builder.store(v.accumulate(name, builder.load(sums), ones, column), sums)
        v.store(builder.load(sums), total, I64(0))

    return emitted((kind,), 6, emit)


@intrinsic
def spread_row(typingctx, zeros, codes, width, out):  # type: ignore[no-untyped-def]
    """Digits of a row of words, 64 bytes of one shift after another; with ``zeros``, 1 for codes 0 and 0 for others."""

    def emit(v: Dots, codes: Any, width: Any, out: Any) -> None:
        codes, out = v.pointer(codes, I32), v.pointer(out, I8)
        with v.loop(width, WIDE) as (at, _):
            words = v.first(codes, at, v.builder.sub(width, at), INTEGERS)
            for shift in range(4):
                place = v.builder.add(v.builder.shl(at, I64(4)), I64(64 * shift))
                v.store(v.digits(words, shift, ZEROS if zeros.count else DIGITS), out, place)

    return emitted((zeros,), 3, emit)


@intrinsic
def put_pixels(typingctx, skewed, sums, zeros, total, step, scale, skew, bias, outputs, valid, y, pixels):  # type: ignore[no-untyped-def]
    """Sixteen pixels of some outputs.

    Parameters
    ----------
    skewed : tuple
        Empty where there is no skew.
    sums, zeros, total : int
        Addresses of int32 ``(outputs, 16)``, products with digits and sums where codes are 0, and ``(16,)``.
    step : int
        Address of the image's step.
    scale, skew, bias : int
        Addresses of the first output's.
    outputs : int
    valid : int
        Sixteen bits, set for pixels that are written.
    y, pixels : int
        Address of the first of them, and distance of outputs.
    """

    def emit(
        v: Dots,
        sums: Any,
        zeros: Any,
        total: Any,
        step: Any,
        scale: Any,
        skew: Any,
        bias: Any,
        outputs: Any,
        valid: Any,
        y: Any,
        pixels: Any,
    ) -> None:
        builder = v.builder
        sources = [v.pointer(address, I32) for address in (sums, zeros)[: 1 + skewed.count]]
        parameters = [v.pointer(address) for address in (scale, skew, bias)[:: 1 if skewed.count else 2]]
        totals = v.load(v.pointer(total, I32), I64(0), INTEGERS)
        steps = v.splat(builder.load(v.pointer(step)), WIDE)
        mask, y = builder.bitcast(builder.trunc(valid, I16), ir.VectorType(I1, WIDE)), v.pointer(y)
        with v.loop(outputs) as (o, _):
            factors = [v.splat(builder.load(builder.gep(values, [o])), WIDE) for values in parameters]
            place = builder.shl(o, I64(4))
            value = v.finish([v.load(source, place, INTEGERS) for source in sources], totals, steps, factors)
            at = builder.gep(y, [builder.mul(o, pixels)])
            v.call(f"llvm.masked.compressstore.v{WIDE}f32", ir.VoidType(), value, at, mask)

    return emitted((skewed,), 11, emit)


@exact_kernel
def round_images(begin, end, x, channels, height, width, padding, stride, planes, images, size, step):  # type: ignore[no-untyped-def]
    """Levels of a run of images ``x (B, C, H, W)``, padded and taken apart by stride, and their steps.

    ``planes`` is height and width of a part; images are of ``size`` bytes each, zeros at first.
    """
    line = np.empty(width + 16, np.int8)
    for sample in range(begin, end):
        source = x + 4 * sample * channels * height * width
        unit = step + 4 * sample
        measure(source, channels * height * width, unit)
        out = images[sample * size : (sample + 1) * size]
        for channel in range(channels):
            for row in range(height):
                at = source + 4 * (channel * height + row) * width
                above, left = row + padding[0], padding[1]
                part = channel * stride[0] * stride[1] + above % stride[0] * stride[1]
                first = (part * planes[0] + above // stride[0]) * planes[1]
                if stride[0] * stride[1] == 1:
                    # zeros beyond the line's end are padding, or what later lines replace
                    round_line(at, width, unit, out.ctypes.data + first + left)
                    continue
                round_line(at, width, unit, line.ctypes.data)
                for phase in range(stride[1]):
                    column = (phase - left) % stride[1]
                    place = first + phase * planes[0] * planes[1] + (left + column) // stride[1]
                    while column < width:
                        out[place] = line[column]
                        column, place = column + stride[1], place + 1


@exact_kernel
def convolve_groups(  # type: ignore[no-untyped-def]
    begin,
    end,
    kind,
    sums_kind,
    at_once,
    skewed,
    share,
    codes,
    outputs,
    width,
    images,
    size,
    samples,
    offsets,
    places,
    rows,
    valid,
    start,
    pixels,
    scale,
    skew,
    bias,
    step,
    y,
):
    """Outputs ``y (B, O, H', W')`` of a run of shares of all groups of 16 pixels; see ``Geometry``."""
    groups = len(valid)
    length = -(-width // 16) * 256
    # 64 bytes more, lest all rows share a few lines of the cache
    stride = length + 64
    memory = np.empty(64 + share * 16 * length + (1 + len(skewed)) * BLOCK * stride, np.uint8)
    panels = (memory.ctypes.data + 63) // 64 * 64
    digits = panels + share * 16 * length
    results = np.empty(16 + (4 * BLOCK + share) * 16, np.int32)
    sums = (results.ctypes.data + 63) // 64 * 64
    zeros = sums + 2 * BLOCK * 64
    totals = zeros + 2 * BLOCK * 64
    begin_panels(kind)
    for chunk in range(begin, end):
        first = chunk * share
        count = min(share, samples * groups - first)
        for group in range(count):
            sample, place = (first + group) // groups, (first + group) % groups
            source = images + sample * size + 16 * place
            out = panels + group * 16 * length
            make_columns(sums_kind, source, offsets, places, rows, out, totals + 64 * group)
        for output in range(0, outputs, BLOCK):
            wanted = min(BLOCK, outputs - output)
            for row in range(wanted):
                words = codes + 4 * (output + row) * width
                spread_row((), words, width, digits + row * stride)
                if len(skewed) > 0:
                    spread_row(skewed, words, width, digits + (BLOCK + row) * stride)
            for group in range(0, count, PANELS):
                column = panels + group * 16 * length
                for row in range(0, wanted, at_once):
                    left, some = digits + row * stride, min(at_once, wanted - row)
                    dot_panels(kind, (0,), column, 16 * length, left, stride, some, length // 64, sums + 64 * row)
                    if len(skewed) > 0:
                        left += BLOCK * stride
                        dot_panels(kind, (0,), column, 16 * length, left, stride, some, length // 64, zeros + 64 * row)
                for p in range(min(PANELS, count - group)):
                    sample, place = (first + group + p) // groups, (first + group + p) % groups
                    put_pixels(
                        skewed,
                        sums + 64 * BLOCK * p,
                        zeros + 64 * BLOCK * p,
                        totals + 64 * (group + p),
                        step + 4 * sample,
                        scale + 4 * output,
                        skew + 4 * output,
                        bias + 4 * output,
                        wanted,
                        valid[place],
                        y + 4 * ((sample * outputs + output) * pixels + start[place]),
                        pixels,
                    )
    end_panels(kind)


def convolve(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor,
    skew: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    kind: str = "",
) -> Tensor:
    """``(B, O, H', W')`` of ``x (B, C, H, W)`` rounded to 8 bits; see ``ternary_conv2d``.

    Parameters
    ----------
    x : Tensor
        float32, contiguous.
    codes, scale, bias, skew
        As of ``ternary_conv2d``; contiguous, float32 but for the codes.
    kernel, stride, padding : sequence of int
        Two numbers each.
    kind : str
        One of ``kinds()``; the fastest by default.
    """
    kind, sums_kind = kind or kinds()[-1], kinds(False)[-1]
    (samples, channels, *size), (outputs, width) = x.shape, codes.shape
    steps, pads = (stride[0], stride[1]), (padding[0], padding[1])
    found = geometry(channels, (size[0], size[1]), (kernel[0], kernel[1]), steps, pads)
    images = torch.zeros(samples * found.size + 16, dtype=torch.int8)
    step = torch.empty(samples)
    layout = (pads, steps, found.planes)
    run(
        round_images,
        samples,
        x.numel() >> 2,
        x.data_ptr(),
        channels,
        *size,
        *layout,
        images.numpy(),
        found.size,
        step.data_ptr(),
    )
    y = torch.empty(samples, outputs, *output_size(size, kernel, stride, padding))
    groups = samples * len(found.valid)
    # an even number: panels are multiplied in pairs
    most = max(1, SCRATCH // (WORD * CODES * -(-width // WORD)) // 2)
    share = 2 * min(most, -(-groups // (2 * torch.get_num_threads())))
    parameters = scale, scale if skew is None else skew, bias, step, y
    run(
        convolve_groups,
        -(-groups // share),
        codes.numel() * groups >> 3,
        choice(kind),
        choice(sums_kind),
        rows_at_once(kind),
        () if skew is None else (0,),
        share,
        codes.data_ptr(),
        outputs,
        width,
        images.data_ptr(),
        found.size,
        samples,
        found.offsets.ctypes.data,
        found.places.ctypes.data,
        len(found.places),
        found.valid,
        found.start,
        y[0, 0].numel(),
        *(tensor.data_ptr() for tensor in parameters),
    )
    return y
