"""Hard lookup on a CPU: addresses a byte each, and gradients that go from the outputs to the inputs in one step."""

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
    I8,
    I64,
    LANES,
    PADDING,
    Vectors,
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

OCTETS = ir.VectorType(I8, PADDING)
# the slopes of an entry lie side by side: one load finds all of them, and eight samples' are turned into rows
SLOTS = 8
SLOPES = ir.VectorType(FLOAT, SLOTS)
# sums that an entry's gradients are spread over: a sum waits for the one before it
COPIES = 4


@intrinsic
def _address(typingctx, fan, flipped, rows, flips, width, out, count):  # type: ignore[no-untyped-def]
    """Addresses of a node's entries; ``fan`` has the length n, ``flipped`` is empty without flips."""
    n = fan.count

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, _, rows, flips, width, out, count = arguments
        rows, flips, out = v.pointer(rows, I64), v.pointer(flips, I8), v.pointer(out, I8)
        sources = [v.pointer(builder.load(builder.gep(rows, [I64(k)])), I8) for k in range(n)]
        with cgutils.for_range_slice(builder, I64(0), count, I64(PADDING), I64) as (at, _):
            address, one = v.constant(I8, [0] * PADDING), v.constant(I8, [1] * PADDING)
            for k, source in enumerate(sources):
                bit = v.load(source, at, OCTETS)
                if flipped.count:
                    row = builder.gep(flips, [builder.mul(I64(k), width)])
                    bit = builder.xor(bit, builder.zext(v.bits(row, at, PADDING), OCTETS))
                # a byte of 2, flipped or not, is no 1
                place = builder.sext(builder.icmp_unsigned("==", bit, one), OCTETS)
                address = builder.or_(address, builder.and_(place, v.constant(I8, [1 << k] * PADDING)))
            v.store(address, out, at)
        return context.get_dummy_value()

    return types.void(fan, flipped, *[types.int64] * 5), generate


@intrinsic
def _entries(typingctx, table, address, out, count):  # type: ignore[no-untyped-def]
    """``out = table[address]``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        table, address, out, count = arguments
        table, address, out = v.pointer(table), v.pointer(address, I8), v.pointer(out)
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
            v.store(v.gather(table, address, at), out, at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def _add_at(typingctx, gradient, address, sums, entries, count):  # type: ignore[no-untyped-def]
    """``sums[i % COPIES, address[i]] += gradient[i]``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        gradient, address, sums, entries, count = arguments
        gradient, address, sums = v.pointer(gradient), v.pointer(address, I8), v.pointer(sums)
        copies = [builder.gep(sums, [builder.mul(I64(copy), entries)]) for copy in range(COPIES)]
        with cgutils.for_range_slice(builder, I64(0), count, I64(PADDING), I64) as (at, _):
            for lane in range(PADDING):
                entry = builder.gep(copies[lane % COPIES], [v.place(address, at, lane)])
                more = builder.load(builder.gep(gradient, [builder.add(at, I64(lane))]))
                builder.store(builder.fadd(builder.load(entry), more), entry)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _by_entry(typingctx, fan, slope, out):  # type: ignore[no-untyped-def]
    """A node's slopes ``(n, K)`` as ``(K, SLOTS)``; ``fan`` has the length n. For n of at least 3."""
    n = fan.count

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, slope, out = arguments
        slope, out = v.pointer(slope), v.pointer(out)
        with cgutils.for_range_slice(builder, I64(0), I64(1 << n), I64(SLOTS), I64) as (at, _):
            rows = [v.load(slope, builder.add(at, I64(k << n)), SLOPES) for k in range(n)]
            rows += [ir.Constant(SLOPES, ir.Undefined)] * (SLOTS - n)
            for i, column in enumerate(v.transpose(rows)):
                v.store(column, out, builder.mul(builder.add(at, I64(i)), I64(SLOTS)))
        return context.get_dummy_value()

    return types.void(fan, types.int64, types.int64), generate


@intrinsic
def _differentiate(typingctx, fan, add, slopes, address, gradient, targets, count):  # type: ignore[no-untyped-def]
    """Gradients of a node's inputs, into the rows of ``targets``, or added to them where ``add`` is not empty."""
    n = fan.count

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, _, slopes, address, gradient, targets, count = arguments
        targets = v.pointer(targets, I64)
        rows = [v.pointer(builder.load(builder.gep(targets, [I64(k)]))) for k in range(n)]
        slopes, address, gradient = v.pointer(slopes), v.pointer(address, I8), v.pointer(gradient)
        with cgutils.for_range_slice(builder, I64(0), count, I64(SLOTS), I64) as (at, _):
            places = [builder.mul(v.place(address, at, lane), I64(SLOTS)) for lane in range(SLOTS)]
            found = v.transpose([v.load(slopes, place, SLOPES) for place in places])
            output = v.load(gradient, at, SLOPES)
            # one after the other: two inputs of a node may be the same
            for slope, row in zip(found, rows, strict=False):
                value = builder.fmul(slope, output)
                v.store(builder.fadd(v.load(row, at, SLOPES), value) if add.count else value, row, at)
        return context.get_dummy_value()

    return types.void(fan, add, *[types.int64] * 5), generate


@kernel
def threshold(begin, end, x, bits):  # type: ignore[no-untyped-def]
    """``bits = x >= 1/2`` for a run of rows, 2 where x is minus infinity, a constant 0; bits are padded with zeros.

    torch takes six times as long.
    """
    for f in range(begin, end):
        for b in range(x.shape[1]):
            bits[f, b] = np.uint8(x[f, b] >= np.float32(0.5)) | np.uint8(x[f, b] == np.float32(-np.inf)) << 1
        for b in range(x.shape[1], bits.shape[1]):
            bits[f, b] = 0


@kernel
def evaluate(begin, end, fan, bits, table, binary, routing, y, address, counter, shift, groups):  # type: ignore[no-untyped-def]
    """Entries ``y`` and their addresses, both ``(N, B)``, of a run of nodes, for padded rows ``bits (F, B)``."""
    n, batch, entries = len(fan), bits.shape[1], table.shape[1]
    signs = np.empty(entries, np.float32)
    rows, zeros = carray(stack(fan), (n,)), np.zeros(batch, np.uint8)
    drawn, scratch = np.zeros((n, batch // 8), np.uint8), np.empty((n, groups + LANES), np.uint8)
    for j in range(begin, end):
        place_rows(rows, bits, zeros, routing, j)
        if len(counter) > 0:
            draw_node(drawn, scratch, shift, groups, j, routing, counter)
        out = address.ctypes.data + j * batch
        _address(fan, counter, rows.ctypes.data, drawn.ctypes.data, batch // 8, out, batch)
        source = table.ctypes.data + 4 * j * entries
        if binary:
            for entry in range(entries):
                signs[entry] = 1 if table[j, entry] >= 0 else 0
            source = signs.ctypes.data
        _entries(source, out, y.ctypes.data + 4 * j * batch, batch)


@kernel
def differentiate_table(begin, end, address, gradient, out):  # type: ignore[no-untyped-def]
    """Gradients of the tables ``out (N, K)`` of a run of nodes, from those of the outputs ``(N, B)``."""
    batch, entries = address.shape[1], out.shape[1]
    sums = np.empty(COPIES * entries, np.float32)
    for j in range(begin, end):
        sums[:] = 0
        _add_at(gradient.ctypes.data + 4 * j * batch, address.ctypes.data + j * batch, sums.ctypes.data, entries, batch)
        for entry in range(entries):
            out[j, entry] = sums[entry]
        for copy in range(1, COPIES):
            for entry in range(entries):
                out[j, entry] += sums[copy * entries + entry]


@kernel
def differentiate_inputs(begin, end, fan, add, width, slope, routing, address, gradient, out):  # type: ignore[no-untyped-def]
    """Gradients ``out (F, B)`` of the inputs, for a run of blocks of ``width`` samples; ``slope`` is ``(N, n, K)``.

    All nodes, one after the other, add to a block: the order of sums is always the same. ``add`` is empty where inputs
    are routed already.
    """
    n, batch, entries = len(fan), address.shape[1], slope.shape[2]
    targets, unread = carray(stack(fan), (n,)), np.zeros(batch, np.float32)
    slopes = np.zeros((entries, SLOTS), np.float32)
    for block in range(begin, end):
        first = block * width
        if len(add) > 0:
            out[:, first : first + width] = 0
        for j in range(len(address)):
            place_rows(targets, out, unread, routing, j)
            for k in range(n):
                targets[k] += 4 * first
            if n >= 3:
                _by_entry(fan, slope.ctypes.data + 4 * j * n * entries, slopes.ctypes.data)
            else:
                for k in range(n):
                    for entry in range(entries):
                        slopes[entry, k] = slope[j, k, entry]
            _differentiate(
                fan,
                add,
                slopes.ctypes.data,
                address.ctypes.data + j * batch + first,
                gradient.ctypes.data + 4 * (j * batch + first),
                targets.ctypes.data,
                min(width, batch - first),
            )


@kernel
def restore(slots, start, routing):  # type: ignore[no-untyped-def]
    """What each slot reads, ``routing (N * n)``, from a wiring's inverse; slots that read a constant are left alone."""
    for f in range(len(start) - 1):
        for p in range(start[f], start[f + 1]):
            routing[slots[p]] = f


def forward(
    x: Tensor,
    table: Tensor,
    n: int,
    indices: Tensor | None,
    padded: bool,
    draw: Draw | None,
    binary: bool = False,
) -> tuple[Tensor, Tensor]:
    """See ``lookup``; returns the entries and their addresses, both ``(N, B)``."""
    num_nodes, batch = table.shape[0], x.shape[0]
    if x.dtype == torch.float32:
        bits = torch.empty(x.shape[1], -(-batch // PADDING) * PADDING, dtype=torch.uint8)
        run(threshold, len(bits), bits.numel() >> 3, array(x.t()), array(bits))
    else:
        bits = padded_rows(
            x.view(torch.uint8) if x.dtype == torch.bool else (x >= 0.5) + 2 * (x == -torch.inf), torch.uint8
        )
    y = torch.empty(num_nodes, bits.shape[1])
    address = torch.empty(num_nodes, bits.shape[1], dtype=torch.uint8)
    run(
        evaluate,
        num_nodes,
        y.numel(),
        (0,) * n,
        array(bits),
        array(table.float()),
        binary,
        routing_array(indices, n),
        array(y),
        array(address),
        flip_counter(draw),
        0 if draw is None else draw.sample_offset % 8,
        0 if draw is None else draw.shape(num_nodes, n, batch)[2],
    )
    return unpadded(y, batch), unpadded(address, batch)


def backward(
    gradient: Tensor,
    address: Tensor,
    entries: int,
    slope: Tensor | None,
    inverse: tuple[Tensor, Tensor] | None,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, as ``(F, B)``, and of the table ``(N, entries)``; None for one that is not wanted."""
    num_nodes, batch = address.shape
    outputs, addresses = padded_rows(gradient), padded_rows(address.t(), torch.uint8)
    x_gradient = table_gradient = None
    if want_table:
        table_gradient = torch.empty(num_nodes, entries)
        run(differentiate_table, num_nodes, outputs.numel(), array(addresses), array(outputs), array(table_gradient))
    if want_x and slope is not None:
        n = slope.shape[1]
        routing = np.full((num_nodes if inverse is not None else 0, n), -1, np.int32)
        if inverse is not None:
            restore(*(array(part) for part in inverse), routing.reshape(-1))
        x_gradient = torch.empty(num_nodes * n if inverse is None else len(inverse[1]) - 1, outputs.shape[1])
        width = block_width(outputs.shape[1])
        run(
            differentiate_inputs,
            -(-outputs.shape[1] // width),
            outputs.numel() * n >> 1,
            (0,) * n,
            () if inverse is None else (0,),
            width,
            array(slope.float()),
            routing,
            array(addresses),
            array(outputs),
            array(x_gradient),
        )
        x_gradient = unpadded(x_gradient, batch)
    return x_gradient, table_gradient
