"""Interpolation on a CPU.

As in the reference, the products of a node's lower and of its upper inputs are joined by the table as a bilinear form.
One node and LANES samples at a time: its inputs are rows, its table stays in the nearest cache, its products in
registers.
"""

from __future__ import annotations

import math
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
    I32,
    I64,
    LANES,
    Vectors,
    align,
    array,
    block_width,
    draw_node,
    flip_counter,
    intrinsic,
    kernel,
    padded_rows,
    place_rows,
    routing_array,
    stack,
    unpadded,
)
from difflut_lab.ops.threads.cpu import run

# samples whose products stay in the cache between two passes over them
BLOCK = 128
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
    """What a node reads from sample ``at`` on, clamped and flipped, and whether it was inside of [0, 1].

    Minus infinity is a constant 0, which never flips.
    """
    zero, one = v.constant(FLOAT, [0.0] * LANES), v.constant(FLOAT, [1.0] * LANES)
    constant = v.constant(FLOAT, [-math.inf] * LANES)
    inputs, inside = [], []
    for k, row in enumerate(rows):
        read = v.load(row, at)
        # comparisons with NaN are false: it stays
        below, above = v.builder.fcmp_ordered("<", read, zero), v.builder.fcmp_ordered(">", read, one)
        inside.append(v.builder.not_(v.builder.or_(below, above)))
        x = v.builder.select(below, zero, v.builder.select(above, one, read))
        if flips is not None:
            flipped = v.bits(v.builder.gep(flips, [v.builder.mul(I64(k), width)]), at)
            flipped = v.builder.and_(flipped, v.builder.fcmp_unordered("!=", read, constant))
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
def _differentiate(typingctx, fan, flipped, add, rows, flips, width, table, gradient, targets, count):  # type: ignore[no-untyped-def]
    """Gradients of a node's inputs into the rows of ``targets``, or added to them where ``add`` is not empty."""
    n, half = fan.count, fan.count // 2

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, _, _, rows, flips, width, table, gradient, targets, count = arguments
        rows, targets = _addresses(v, rows, n), _addresses(v, targets, n)
        table, gradient = v.pointer(table), v.pointer(gradient)
        flips = v.pointer(flips, I8) if flipped.count else None
        entries = _entries(v, table, n)
        zero = v.constant(FLOAT, [0.0] * LANES)
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
            inputs, inside = _inputs(v, rows, flips, width, at)
            output = v.load(gradient, at)
            lower, upper = _products(v, inputs[:half]), _products(v, inputs[half:])
            weighted = [v.multiply(product, output) for product in upper[-1]]
            columns = [v.dot(column, weighted) for column in zip(*entries, strict=True)] if half else []
            joined = [v.multiply(v.dot(row, lower[-1]), output) for row in entries]
            found = _fold(v, columns, inputs[:half], lower) + _fold(v, joined, inputs[half:], upper)
            # one after the other: two inputs of a node may be the same
            for value, target, counts in zip(found, targets, inside, strict=True):
                value = builder.select(counts, value, zero)
                v.store(v.add(v.load(target, at), value) if add.count else value, target, at)
        return context.get_dummy_value()

    return types.void(fan, flipped, add, *[types.int64] * 7), generate


@intrinsic
def _multiply(typingctx, fan, flipped, rows, flips, width, gradient, scratch, count):  # type: ignore[no-untyped-def]
    """A node's lower products, then the upper ones times the output's gradient: ``(2^lower + 2^upper, BLOCK)``."""
    n, half = fan.count, fan.count // 2

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, _, rows, flips, width, gradient, scratch, count = arguments
        rows, gradient, scratch = _addresses(v, rows, n), v.pointer(gradient), v.pointer(scratch)
        flips = v.pointer(flips, I8) if flipped.count else None
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
            inputs, _ = _inputs(v, rows, flips, width, at)
            output = v.load(gradient, at)
            weighted = [v.multiply(product, output) for product in _products(v, inputs[half:])[-1]]
            for i, kept in enumerate(_products(v, inputs[:half])[-1] + weighted):
                v.store(kept, scratch, builder.add(I64(i * BLOCK), at))
        return context.get_dummy_value()

    return types.void(fan, flipped, *[types.int64] * 6), generate


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
    """The sums over lanes of ``total (2^n, LANES)``."""
    n = fan.count

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, total, out = arguments
        total, out = v.pointer(total), v.pointer(out)
        width = min(LANES, 1 << n)
        with cgutils.for_range_slice(builder, I64(0), I64(1 << n), I64(width), I64) as (entry, _):
            rows = [builder.mul(builder.add(entry, I64(i)), I64(LANES)) for i in range(width)]
            sums = v.sums([v.load(total, row) for row in rows])
            first = builder.shuffle_vector(sums, sums, v.constant(I32, range(width)))
            v.store(first, out, entry)
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
            # an assignment of arrays takes 4 s to compile: it can fail with a message
            for k in range(n):
                for group in range(groups):
                    packed[j, k, group] = scratch[k, group]
        out, entries = y.ctypes.data + 4 * j * batch, table.ctypes.data + 4 * j * table.shape[1]
        _evaluate(fan, counter, rows.ctypes.data, drawn.ctypes.data, batch // 8, entries, out, batch)


@kernel
def differentiate_inputs(  # type: ignore[no-untyped-def]
    begin, end, fan, flipped, add, width, x, table, routing, gradient, shift, packed, out
):
    """Gradients ``out (F, B)`` of the inputs, for a run of blocks of ``width`` samples.

    All nodes, one after the other, add to a block: the order of sums is always the same.
    ``flipped`` is empty without flips, ``add`` where no two nodes read one row.
    """
    n, batch = len(fan), x.shape[1]
    rows, targets = carray(stack(fan), (n,)), carray(stack(fan), (n,))
    zeros, unread = np.zeros(batch, np.float32), np.zeros(batch, np.float32)
    drawn = np.zeros((n, batch // 8), np.uint8)
    for block in range(begin, end):
        first = block * width
        size = min(width, batch - first)
        if len(add) > 0:
            out[:, first : first + size] = 0
        for j in range(table.shape[0]):
            place_rows(rows, x, zeros, routing, j)
            place_rows(targets, out, unread, routing, j)
            for k in range(n):
                rows[k] += 4 * first
                targets[k] += 4 * first
                if len(flipped) > 0:
                    align(drawn[k], packed[j, k], shift, routing.shape[0] > 0 and routing[j, k] < 0)
            _differentiate(
                fan,
                flipped,
                add,
                rows.ctypes.data,
                drawn.ctypes.data + first // 8,
                batch // 8,
                table.ctypes.data + 4 * j * table.shape[1],
                gradient.ctypes.data + 4 * (j * batch + first),
                targets.ctypes.data,
                size,
            )


@kernel
def differentiate_table(begin, end, fan, flipped, x, routing, gradient, shift, packed, out):  # type: ignore[no-untyped-def]
    """Gradients ``out (N, K)`` of the tables of a run of nodes, ``flipped`` is empty without flips."""
    n, batch = len(fan), x.shape[1]
    rows, zeros = carray(stack(fan), (n,)), np.zeros(batch, np.float32)
    drawn = np.zeros((n, batch // 8), np.uint8)
    total = np.empty((out.shape[1], LANES), np.float32)
    scratch = np.empty(((1 << n // 2) + (1 << n - n // 2), BLOCK), np.float32)
    for j in range(begin, end):
        place_rows(rows, x, zeros, routing, j)
        if len(flipped) > 0:
            for k in range(n):
                align(drawn[k], packed[j, k], shift, routing.shape[0] > 0 and routing[j, k] < 0)
        total[:] = 0
        for first in range(0, batch, BLOCK):
            size = min(BLOCK, batch - first)
            output = gradient.ctypes.data + 4 * (j * batch + first)
            flips = drawn.ctypes.data + first // 8
            _multiply(fan, flipped, rows.ctypes.data, flips, batch // 8, output, scratch.ctypes.data, size)
            _accumulate(fan, scratch.ctypes.data, total.ctypes.data, size)
            for k in range(n):
                rows[k] += 4 * BLOCK
        _reduce(fan, total.ctypes.data, out.ctypes.data + 4 * j * out.shape[1])


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
    routing = routing_array(indices, n)
    flips = array(torch.empty(0, 0, 0, dtype=torch.uint8) if packed is None else packed)
    flipped, shift = () if packed is None else (0,), sample_offset % 8
    work = num_nodes * rows.shape[1] << n >> 4
    x_gradient = table_gradient = None
    if want_x:
        x_gradient = torch.empty(rows.shape)
        width = block_width(rows.shape[1])
        run(
            differentiate_inputs,
            -(-rows.shape[1] // width),
            work,
            (0,) * n,
            flipped,
            () if indices is None else (0,),
            width,
            array(rows),
            array(table.float()),
            routing,
            array(outputs),
            shift,
            flips,
            array(x_gradient),
        )
        x_gradient = unpadded(x_gradient, batch)
    if want_table:
        table_gradient = torch.empty(table.shape)
        run(
            differentiate_table,
            num_nodes,
            work,
            (0,) * n,
            flipped,
            array(rows),
            routing,
            array(outputs),
            shift,
            flips,
            array(table_gradient),
        )
    return x_gradient, table_gradient
