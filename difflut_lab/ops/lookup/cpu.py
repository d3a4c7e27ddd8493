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
    FLOATS,
    I8,
    I32,
    I64,
    LANES,
    PADDING,
    Vectors,
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
    unpadded,
)

OCTETS = ir.VectorType(I8, PADDING)
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
            address = v.constant(I8, [0] * PADDING)
            for k, source in enumerate(sources):
                bit = v.load(source, at, OCTETS)
                if flipped.count:
                    row = builder.gep(flips, [builder.mul(I64(k), width)])
                    bit = builder.xor(bit, builder.zext(v.bits(row, at, PADDING), OCTETS))
                address = builder.or_(address, builder.shl(bit, v.constant(I8, [k] * PADDING)))
            v.store(address, out, at)
        return context.get_dummy_value()

    return types.void(fan, flipped, *[types.int64] * 5), generate


@kernel
def evaluate(begin, end, fan, bits, table, routing, y, address, counter, shift, groups):  # type: ignore[no-untyped-def]
    """Entries ``y`` and their addresses, both ``(N, B)``, of a run of nodes, for padded rows ``bits (F, B)``."""
    n, batch = len(fan), bits.shape[1]
    rows, zeros = carray(stack(fan), (n,)), np.zeros(batch, np.uint8)
    drawn, scratch = np.zeros((n, batch // 8), np.uint8), np.empty((n, groups + LANES), np.uint8)
    for j in range(begin, end):
        place_rows(rows, bits, zeros, routing, j)
        if len(counter) > 0:
            draw_node(drawn, scratch, shift, groups, j, routing, counter)
        out = address.ctypes.data + j * batch
        _address(fan, counter, rows.ctypes.data, drawn.ctypes.data, batch // 8, out, batch)
        for b in range(batch):
            y[j, b] = table[j, address[j, b]]


@kernel
def differentiate_table(begin, end, address, gradient, out):  # type: ignore[no-untyped-def]
    """Gradients of the tables ``out (N, K)`` of a run of nodes, from those of the outputs ``(N, B)``."""
    batch = address.shape[1]
    sums = np.empty((COPIES, out.shape[1]), np.float32)
    for j in range(begin, end):
        sums[:] = 0
        for b in range(0, batch, COPIES):
            for copy in range(COPIES):
                sums[copy, address[j, b + copy]] += gradient[j, b + copy]
        for entry in range(out.shape[1]):
            out[j, entry] = (sums[0, entry] + sums[1, entry]) + (sums[2, entry] + sums[3, entry])


@intrinsic
def _add_slopes(typingctx, slope, address, gradient, out, count):  # type: ignore[no-untyped-def]
    """``out += slope[address] * gradient``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        slope, address, gradient, out, count = arguments
        slope, gradient, out = (v.pointer(pointer) for pointer in (slope, gradient, out))
        address = v.pointer(address, I8)
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
            found = ir.Constant(FLOATS, ir.Undefined)
            for lane in range(LANES):
                entry = builder.zext(builder.load(builder.gep(address, [builder.add(at, I64(lane))])), I64)
                found = builder.insert_element(found, builder.load(builder.gep(slope, [entry])), I32(lane))
            v.store(v.fused(found, v.load(gradient, at), v.load(out, at)), out, at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@kernel
def differentiate_inputs(begin, end, fan, slots, start, slope, address, gradient, out):  # type: ignore[no-untyped-def]
    """Gradients ``out (F, B)`` of a run of inputs: over the slots that read them, ``slope (N, n, K)`` at the addresses.

    ``slots`` and ``start`` are a wiring's inverse.
    """
    n, batch, entries = len(fan), address.shape[1], slope.shape[2]
    for f in range(begin, end):
        out[f] = 0
        for p in range(start[f], start[f + 1]):
            slot = slots[p]
            j = slot // n
            _add_slopes(
                slope.ctypes.data + 4 * slot * entries,
                address.ctypes.data + j * batch,
                gradient.ctypes.data + 4 * j * batch,
                out.ctypes.data + 4 * f * batch,
                batch,
            )


def forward(
    x: Tensor, table: Tensor, n: int, indices: Tensor | None, padded: bool, draw: Draw | None
) -> tuple[Tensor, Tensor]:
    """See ``lookup``; returns the entries and their addresses, both ``(N, B)``."""
    num_nodes, batch = table.shape[0], x.shape[0]
    bits = padded_rows(x >= 0.5, torch.uint8)
    y = torch.empty(num_nodes, bits.shape[1])
    address = torch.empty(num_nodes, bits.shape[1], dtype=torch.uint8)
    run(
        evaluate,
        num_nodes,
        y.numel(),
        (0,) * n,
        array(bits),
        array(table.float()),
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
    table: Tensor,
    slope: Tensor | None,
    inverse: tuple[Tensor, Tensor] | None,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, as ``(F, B)``, and of the table ``(N, K)``; None for one that is not wanted."""
    num_nodes, batch = address.shape
    outputs, addresses = padded_rows(gradient), padded_rows(address.t(), torch.uint8)
    x_gradient = table_gradient = None
    if want_table:
        table_gradient = torch.empty(table.shape)
        run(
            differentiate_table, num_nodes, outputs.numel() * 3, array(addresses), array(outputs), array(table_gradient)
        )
    if want_x and slope is not None:
        n = slope.shape[1]
        readers, start = (torch.arange(num_nodes * n + 1, dtype=torch.int32),) * 2 if inverse is None else inverse
        x_gradient = torch.empty(len(start) - 1, outputs.shape[1])
        run(
            differentiate_inputs,
            len(start) - 1,
            outputs.numel() * n,
            (0,) * n,
            array(readers),
            array(start),
            array(slope.float()),
            array(addresses),
            array(outputs),
            array(x_gradient),
        )
        x_gradient = unpadded(x_gradient, batch)
    return x_gradient, table_gradient
