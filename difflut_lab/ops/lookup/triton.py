"""Hard lookup on a GPU, in Triton.

What backward needs of a sample and a node is its address, one byte. The gradient of an input is gathered: each input
goes through the slots that read it, so nothing as large as the slots is written. The gradient of a table is a sum per
entry over the samples that address it, in registers and in a fixed order, where a histogram would need atomics.
"""

# kernels are typed by Triton's compiler
# mypy: disable-error-code="assignment, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from difflut_lab.ops.flips import Draw
from difflut_lab.ops.kernel.triton import (
    ACCUMULATE,
    TILE,
    bucket,
    counters,
    declines,
    device_of,
    draw_flips,
    flipped,
    grid,
    kernel,
    largest,
    nodes_of,
    read,
    samples_of,
    stored,
    sum_samples,
)
from difflut_lab.ops.shapes import feature_major, output_dtype

__all__ = ["backward", "declines", "forward"]


def _evaluate(
    x,
    table,
    indices,
    y,
    address,
    step,
    threshold,
    key_low,
    key_high,
    layer,
    first_group,
    n: tl.constexpr,
    num_nodes,
    batch,
    bucket,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    NODES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``y (N, B)`` and ``address (N, B)``; with flips where there is a ``step``."""
    node = nodes_of(NODES)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    sample, inside = samples_of(group, node, batch, num_nodes, SHIFT)
    found = tl.zeros([NODES, GROUPS, 8], tl.int32)
    for k in tl.static_range(n):
        value, reads = read(x, indices, node, k, sample, inside, num_nodes, batch, n, PADDED)
        bit = value >= 0.5
        if step is not None:
            flips = draw_flips(step, threshold, key_low, key_high, layer, first_group, node * n + k, group)
            bit = bit ^ (flipped(flips) & reads)
        found |= bit.to(tl.int32) << k
    at = node.to(tl.int64) * batch + sample
    entry = tl.load(table + node.to(tl.int64) * (1 << n) + found, mask=inside, other=0)
    tl.store(address + at, found.to(tl.uint8), mask=inside)
    tl.store(y + at, entry.to(tl.float32).to(y.dtype.element_ty), mask=inside)


def _differentiate_inputs(
    gradient,
    address,
    slope,
    slots,
    start,
    out,
    n: tl.constexpr,
    num_nodes,
    batch,
    bucket,
    NODES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``out (F, B)``: over the slots that read an input, in their order, the output's gradient times the slope.

    ``num_nodes`` counts the inputs, F. Without ``slots`` input f is read by slot f alone.
    """
    feature = nodes_of(NODES)
    sample = tl.program_id(1) * (GROUPS * 8) + tl.arange(0, GROUPS * 8)[None, None, :]
    exists = feature < num_nodes
    inside = exists & (sample < batch)
    if slots is None:
        first = feature
        count = exists.to(tl.int32)
    else:
        first = tl.load(start + feature, mask=exists, other=0)
        count = tl.load(start + feature + 1, mask=exists, other=0) - first
    total = tl.zeros([NODES, 1, GROUPS * 8], tl.float32)
    for i in range(largest(count, NODES)):
        reads = i < count
        slot = first + i
        if slots is not None:
            slot = tl.load(slots + slot, mask=reads, other=0)
        at = (slot // n).to(tl.int64) * batch + sample
        reads = reads & inside
        entry = slot.to(tl.int64) * (1 << n) + tl.load(address + at, mask=reads, other=0).to(tl.int32)
        outer = tl.load(gradient + at, mask=reads, other=0).to(tl.float32)
        total += outer * tl.load(slope + entry, mask=reads, other=0).to(tl.float32)
    tl.store(out + feature.to(tl.int64) * batch + sample, total.to(out.dtype.element_ty), mask=inside)


def _differentiate_table(
    gradient,
    address,
    table_gradient,
    n: tl.constexpr,
    num_nodes,
    batch,
    bucket,
    TILED: tl.constexpr,
    NODES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``table_gradient (N, K)``: a program has 2^TILED entries of its nodes and goes through the batch."""
    node = nodes_of(NODES)
    tile = tl.program_id(1) << TILED
    zero = tl.zeros([NODES, 1, GROUPS * 8], tl.float32)
    sums = ()
    for _ in tl.static_range(1 << TILED):
        sums = sums + (zero,)
    for first in range(0, batch, GROUPS * 8):
        sample = first + tl.arange(0, GROUPS * 8)[None, None, :]
        inside = (node < num_nodes) & (sample < batch)
        at = node.to(tl.int64) * batch + sample
        entry = tl.load(address + at, mask=inside, other=0).to(tl.int32) - tile
        outer = tl.load(gradient + at, mask=inside, other=0).to(tl.float32)
        added = ()
        for a in tl.static_range(1 << TILED):
            added = added + (sums[a] + tl.where(entry == a, outer, 0.0),)
        sums = added
    at = node.to(tl.int64) * (1 << n) + tile
    for a in tl.static_range(1 << TILED):
        tl.store(table_gradient + at + a, sum_samples(sums[a], NODES), mask=node < num_nodes)


evaluate = kernel(_evaluate)
differentiate_inputs = kernel(_differentiate_inputs)
differentiate_table = kernel(_differentiate_table, ACCUMULATE)


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
    y = x.new_empty((num_nodes, batch), dtype=stored(output_dtype(x, table)))
    address = x.new_empty((num_nodes, batch), dtype=torch.uint8)
    shift = 0 if draw is None else draw.sample_offset % 8
    if y.numel() == 0:
        return y, address
    with device_of(x):
        evaluate[grid(num_nodes, batch + shift)](
            feature_major(x if x.dtype.is_floating_point else (x >= 0.5).view(torch.uint8)),
            (table >= 0).to(table.dtype) if binary else table.contiguous(),
            indices,
            y,
            address,
            *counters(draw, x.device),
            n,
            num_nodes,
            batch,
            bucket(batch),
            SHIFT=shift,
            PADDED=padded,
        )
    return y, address


def backward(
    gradient: Tensor,
    address: Tensor,
    entries: int,
    slope: Tensor | None,
    inverse: tuple[Tensor, Tensor] | None,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, as ``(F, B)``, and of the table ``(N, entries)``; None for one that is not wanted.

    ``slope`` is the input gradient as a table, ``(N, n, K)``.
    """
    num_nodes, batch = address.shape
    n = entries.bit_length() - 1
    want_x = want_x and slope is not None
    count = num_nodes * n if inverse is None else inverse[1].shape[0] - 1
    if num_nodes * batch == 0:
        x_gradient = gradient.new_zeros((count, batch)) if want_x else None
        return x_gradient, gradient.new_zeros((num_nodes, entries), dtype=torch.float32) if want_table else None
    outputs = feature_major(gradient)
    size = bucket(batch)
    x_gradient = table_gradient = None
    with device_of(gradient):
        if want_table:
            table_gradient = gradient.new_empty((num_nodes, entries), dtype=torch.float32)
            tiled = min(n, TILE.bit_length() - 1)
            differentiate_table[lambda meta: (triton.cdiv(num_nodes, meta["NODES"]), 1 << n - tiled)](
                outputs, address, table_gradient, n, num_nodes, batch, size, TILED=tiled
            )
        if want_x and slope is not None:
            slots, start = (None, None) if inverse is None else inverse
            x_gradient = outputs.new_empty((count, batch), dtype=stored(outputs.dtype))
            differentiate_inputs[grid(count, batch)](
                outputs, address, slope.contiguous(), slots, start, x_gradient, n, count, batch, size
            )
    return x_gradient, table_gradient
