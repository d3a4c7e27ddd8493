"""Interpolation on a CPU.

As in the reference, the products of a node's lower and of its upper inputs are joined by the table as a bilinear form.
One node and LANES samples at a time: its inputs are rows, its table stays in the nearest cache, its products in
registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray
from numba.core import cgutils, types
from torch import Tensor

from difflut_lab.ops.flips import Draw
from difflut_lab.ops.kernel.cpu import (
    FLOAT,
    FLOATS,
    I8,
    I64,
    LANES,
    Vectors,
    align,
    array,
    draw_node,
    flip_counter,
    intrinsic,
    kernel,
    padded_rows,
    place_rows,
    routing_array,
    run,
    stack,
    sum_over_readers,
    unpadded,
    workspace,
)

# samples whose products are kept between two passes over them
BLOCK = 128
# floats that a block's gradients of slots may take
CACHED = 1 << 21
# accumulators of the table's gradient that are in registers at once
TILE = (4, 2)


def _products(v: Vectors, inputs: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """The products of the first 0, 1, ..., h of the inputs."""
    one = v.constant(FLOAT, [1.0] * LANES)
    products = [[one]]
    for k, x in enumerate(inputs):
        if k == 0:
            high, low = [x], [v.subtract(one, x)]
        else:
            high = [v.multiply(product, x) for product in products[-1]]
            low = [v.subtract(product, part) for product, part in zip(products[-1], high, strict=True)]
        products.append(low + high)
    return products


def _fold(
    v: Vectors, gradient: Sequence[ir.Value], inputs: Sequence[ir.Value], products: Sequence[Sequence[ir.Value]]
) -> list[ir.Value]:
    """Gradients of the inputs, from those of their products."""
    found = []
    for k in reversed(range(len(inputs))):
        low, high = gradient[: 1 << k], gradient[1 << k :]
        difference = [v.subtract(b, a) for a, b in zip(low, high, strict=True)]
        found.append(v.dot(products[k], difference) if k else difference[0])
        if k:
            gradient = [v.fused(d, inputs[k], a) for d, a in zip(difference, low, strict=True)]
    return found[::-1]


def _entries(v: Vectors, table: ir.Value, n: int) -> list[list[ir.Value]]:
    """The table of a node: rows of upper addresses, each entry in all lanes."""
    lower = 1 << n // 2
    flat = [v.splat(v.builder.load(v.builder.gep(table, [I64(a)]))) for a in range(1 << n)]
    return [flat[a : a + lower] for a in range(0, len(flat), lower)]


def _inputs(
    v: Vectors, rows: Sequence[ir.Value], flips: ir.Value | None, width: ir.Value, at: ir.Value
) -> tuple[list[ir.Value], list[ir.Value]]:
    """What a node reads from sample ``at`` on, clamped and flipped, and whether it was inside of [0, 1]."""
    zero, one = v.constant(FLOAT, [0.0] * LANES), v.constant(FLOAT, [1.0] * LANES)
    inputs, inside = [], []
    for k, row in enumerate(rows):
        x = v.load(row, at)
        # comparisons with NaN are false: it stays
        below, above = v.builder.fcmp_ordered("<", x, zero), v.builder.fcmp_ordered(">", x, one)
        inside.append(v.builder.not_(v.builder.or_(below, above)))
        x = v.builder.select(below, zero, v.builder.select(above, one, x))
        if flips is not None:
            flipped = v.bits(v.builder.gep(flips, [v.builder.mul(I64(k), width)]), at)
            x = v.builder.select(flipped, v.subtract(one, x), x)
        inputs.append(x)
    return inputs, inside


def _addresses(v: Vectors, rows: ir.Value, n: int) -> list[ir.Value]:
    rows = v.pointer(rows, I64)
    return [v.pointer(v.builder.load(v.builder.gep(rows, [I64(k)]))) for k in range(n)]


@intrinsic
def _evaluate(typingctx, fan, flipped, rows, flips, width, table, out, count):  # type: ignore[no-untyped-def]
    """Outputs of a node. ``fan`` has the length n; ``flipped`` is empty without flips."""
    n = fan.count

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, _, rows, flips, width, table, out, count = arguments
        rows, out, table = _addresses(v, rows, n), v.pointer(out), v.pointer(table)
        flips = v.pointer(flips, I8) if flipped.count else None
        entries = _entries(v, table, n)
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
            inputs, _ = _inputs(v, rows, flips, width, at)
            lower, upper = _products(v, inputs[: n // 2])[-1], _products(v, inputs[n // 2 :])[-1]
            joined = [v.dot(row, lower) for row in entries]
            v.store(v.dot(joined, upper), out, at)
        return context.get_dummy_value()

    return types.void(fan, flipped, *[types.int64] * 6), generate


@intrinsic
def _differentiate(typingctx, fan, flipped, want, rows, flips, width, table, gradient, out, stride, scratch, count):  # type: ignore[no-untyped-def]
    """Gradients of a node's inputs, ``stride`` apart, and its products into ``scratch``.

    ``want`` has the length 0 for no gradients of inputs, 1 for those of clamped ones, 2 for those of inputs as given.
    ``scratch (2^lower + 2^upper, BLOCK)`` takes the lower products, then the upper ones times the output's gradient.
    """
    n, half = fan.count, fan.count // 2

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, _, _, rows, flips, width, table, gradient, out, stride, scratch, count = arguments
        rows = _addresses(v, rows, n)
        table, gradient, out, scratch = (v.pointer(address) for address in (table, gradient, out, scratch))
        flips = v.pointer(flips, I8) if flipped.count else None
        entries = _entries(v, table, n) if want.count else []
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
            inputs, inside = _inputs(v, rows, flips, width, at)
            output = v.load(gradient, at)
            lower, upper = _products(v, inputs[:half]), _products(v, inputs[half:])
            weighted = [v.multiply(product, output) for product in upper[-1]]
            for i, kept in enumerate(lower[-1] + weighted):
                v.store(kept, scratch, builder.add(I64(i * BLOCK), at))
            if want.count:
                columns = [v.dot(column, weighted) for column in zip(*entries, strict=True)] if half else []
                lower_gradient = _fold(v, columns, inputs[:half], lower)
                joined = [v.multiply(v.dot(row, lower[-1]), output) for row in entries]
                upper_gradient = _fold(v, joined, inputs[half:], upper)
                for k, value in enumerate(lower_gradient + upper_gradient):
                    if want.count > 1:
                        value = builder.select(inside[k], value, v.constant(FLOAT, [0.0] * LANES))
                    v.store(value, out, builder.add(builder.mul(I64(k), stride), at))
        return context.get_dummy_value()

    return types.void(fan, flipped, want, *[types.int64] * 9), generate


@intrinsic
def _accumulate(typingctx, fan, scratch, table_gradient, count):  # type: ignore[no-untyped-def]
    """Add to a node's table gradient, ``(2^n, LANES)``, what the products in ``scratch`` say."""
    n = fan.count

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, scratch, total, count = arguments
        scratch, total = v.pointer(scratch), v.pointer(total)
        lower, upper = 1 << n // 2, 1 << n - n // 2
        for h in range(0, upper, TILE[0]):
            for a in range(0, lower, TILE[1]):
                tile = [
                    (row, column)
                    for row in range(h, min(h + TILE[0], upper))
                    for column in range(a, min(a + TILE[1], lower))
                ]
                sums = [cgutils.alloca_once(builder, FLOATS) for _ in tile]
                for place, (row, column) in zip(sums, tile, strict=True):
                    builder.store(v.load(total, I64((row * lower + column) * LANES)), place)
                with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
                    products = {}
                    for i in sorted({lower + row for row, _ in tile} | {column for _, column in tile}):
                        products[i] = v.load(scratch, builder.add(I64(i * BLOCK), at))
                    for place, (row, column) in zip(sums, tile, strict=True):
                        builder.store(v.fused(products[lower + row], products[column], builder.load(place)), place)
                for place, (row, column) in zip(sums, tile, strict=True):
                    v.store(builder.load(place), total, I64((row * lower + column) * LANES))
        return context.get_dummy_value()

    return types.void(fan, *[types.int64] * 3), generate


@intrinsic
def _reduce(typingctx, fan, total, out):  # type: ignore[no-untyped-def]
    """Add to ``out (2^n)`` the sums over lanes of ``total (2^n, LANES)``."""
    n = fan.count

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, total, out = arguments
        total, out = v.pointer(total), v.pointer(out)
        with cgutils.for_range(builder, I64(1 << n), intp=I64) as loop:
            place = builder.gep(out, [loop.index])
            value = v.sum(v.load(total, builder.mul(loop.index, I64(LANES))))
            builder.store(builder.fadd(builder.load(place), value), place)
        return context.get_dummy_value()

    return types.void(fan, types.int64, types.int64), generate


@kernel
def evaluate(begin, end, fan, x, table, routing, y, counter, shift, packed):  # type: ignore[no-untyped-def]
    """Outputs ``y (N, B)`` of a run of nodes, for padded rows ``x (F, B)``.

    ``counter`` is empty without flips; else they are drawn, and ``packed (N, n, groups)`` takes them.
    """
    n, batch, groups = len(fan), x.shape[1], packed.shape[2]
    rows, zeros = carray(stack(fan), (n,)), np.zeros(batch, np.float32)
    drawn, scratch = np.zeros((n, batch // 8), np.uint8), np.empty((n, groups + LANES), np.uint8)
    for j in range(begin, end):
        place_rows(rows, x, zeros, routing, j)
        if len(counter) > 0:
            draw_node(drawn, scratch, shift, groups, j, routing, counter)
            packed[j] = scratch[:, :groups]
        out, entries = y.ctypes.data + 4 * j * batch, table.ctypes.data + 4 * j * table.shape[1]
        _evaluate(fan, counter, rows.ctypes.data, drawn.ctypes.data, batch // 8, entries, out, batch)


@kernel
def differentiate(  # type: ignore[no-untyped-def]
    begin, end, fan, want, flipped, x, table, routing, gradient, first, slot_gradient, table_gradient, shift, packed
):
    """Gradients of a run of nodes for a block of the batch that starts at sample ``first``.

    That of each slot into ``slot_gradient (N * n, width)`` as ``want`` says, see ``_differentiate``; that of the table
    is added to ``table_gradient (N, K)``, which may have no rows. ``flipped`` is empty without flips.
    """
    n, batch, width = len(fan), x.shape[1], slot_gradient.shape[1]
    rows, zeros = carray(stack(fan), (n,)), np.zeros(batch, np.float32)
    drawn = np.zeros((n, batch // 8), np.uint8)
    total = np.empty((table.shape[1], LANES), np.float32)
    scratch = np.empty(((1 << n // 2) + (1 << n - n // 2), BLOCK), np.float32)
    for j in range(begin, end):
        place_rows(rows, x, zeros, routing, j)
        if len(flipped) > 0:
            for k in range(n):
                align(drawn[k], packed[j, k], shift, routing.shape[0] > 0 and routing[j, k] < 0)
        total[:] = 0
        for block in range(0, width, BLOCK):
            size, at = min(BLOCK, width - block), first + block
            for k in range(n):
                rows[k] += 4 * (first if block == 0 else BLOCK)
            _differentiate(
                fan,
                flipped,
                want,
                rows.ctypes.data,
                drawn.ctypes.data + at // 8,
                batch // 8,
                table.ctypes.data + 4 * j * table.shape[1],
                gradient.ctypes.data + 4 * (j * batch + at),
                slot_gradient.ctypes.data + 4 * (j * n * width + block),
                width,
                scratch.ctypes.data,
                size,
            )
            if table_gradient.shape[0] > 0:
                _accumulate(fan, scratch.ctypes.data, total.ctypes.data, size)
        if table_gradient.shape[0] > 0:
            _reduce(fan, total.ctypes.data, table_gradient.ctypes.data + 4 * j * table.shape[1])


def forward(
    x: Tensor, table: Tensor, n: int, indices: Tensor | None, padded: bool, draw: Draw | None
) -> tuple[Tensor, Tensor | None]:
    """See ``interpolate``; returns ``(N, B)`` and the flips, packed."""
    num_nodes, batch = table.shape[0], x.shape[0]
    rows = padded_rows(x)
    y = rows.new_empty(num_nodes, rows.shape[1])
    packed = None if draw is None else torch.empty(draw.shape(num_nodes, n, batch), dtype=torch.uint8)
    run(
        evaluate,
        num_nodes,
        num_nodes * rows.shape[1] << n >> 5,
        (0,) * n,
        array(rows),
        array(table.float()),
        routing_array(indices, n),
        array(y),
        flip_counter(draw),
        0 if draw is None else draw.sample_offset % 8,
        array(torch.empty(0, 0, 0, dtype=torch.uint8) if packed is None else packed),
    )
    return unpadded(y, batch), packed


def backward(
    gradient: Tensor,
    x: Tensor,
    table: Tensor,
    n: int,
    indices: Tensor | None,
    padded: bool,
    inverse: tuple[Tensor, Tensor] | None,
    packed: Tensor | None,
    sample_offset: int,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x``, as ``(F, B)``, and of the table ``(N, K)``; None for one that is not wanted."""
    num_nodes, batch = table.shape[0], x.shape[0]
    rows, outputs = padded_rows(x), padded_rows(gradient)
    length = rows.shape[1]
    x_gradient = rows.new_empty(rows.shape) if want_x else None
    table_gradient = rows.new_zeros(table.shape if want_table else (0, table.shape[1]))
    gathered = want_x and inverse is not None
    # the gradients of a block's slots are still cached when they are summed up for the inputs
    size = max(BLOCK, CACHED // max(1, num_nodes * n) // BLOCK * BLOCK) if gathered else length
    for first in range(0, length, max(1, size)):
        width = min(size, length - first)
        slots = rows.new_empty(0, width) if x_gradient is None else x_gradient
        if gathered:
            slots = workspace(num_nodes * n, width)
        run(
            differentiate,
            num_nodes,
            num_nodes * width << n >> 3,
            (0,) * n,
            (0,) * (1 if gathered else 2 if want_x else 0),
            () if packed is None else (0,),
            array(rows),
            array(table.float()),
            routing_array(indices, n),
            array(outputs),
            first,
            array(slots),
            array(table_gradient),
            sample_offset % 8,
            array(torch.empty(0, 0, 0, dtype=torch.uint8) if packed is None else packed),
        )
        if inverse is not None and x_gradient is not None:
            readers, start = inverse
            run(
                sum_over_readers,
                len(rows),
                slots.numel() >> 3,
                array(readers),
                array(start),
                array(slots),
                first,
                array(rows),
                array(x_gradient),
            )
    return None if x_gradient is None else unpadded(x_gradient, batch), table_gradient if want_table else None
