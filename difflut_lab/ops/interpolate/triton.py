"""Interpolation on a GPU, in Triton.

As in the reference, the products of a node's lower and of its upper inputs are joined by the table as a bilinear form.
A thread has the products of its samples in registers, as tuples that are unrolled; each entry of the table is loaded
once per program and used for all its samples.
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
    groups_of,
    kernel,
    nodes_of,
    read,
    samples_of,
    stored,
    sum_over_readers,
    sum_samples,
)
from difflut_lab.ops.shapes import feature_major, output_dtype

__all__ = ["backward", "declines", "forward"]


@triton.jit
def _products(inputs, count: tl.constexpr, one):
    """The products of the first 0, 1, ..., ``count`` inputs, one after the other: those of k begin at 2^k - 1."""
    found = (one,)
    for k in tl.static_range(count):
        low = ()
        high = ()
        for i in tl.static_range(1 << k):
            product = found[(1 << k) - 1 + i]
            part = product * inputs[k]
            low = low + (product - part,)
            high = high + (part,)
        found = found + low + high
    return found


@triton.jit
def _fold(gradient, inputs, products, count: tl.constexpr):
    """Gradients of the inputs, from those of the products of all of them."""
    found = ()
    for k in tl.static_range(count - 1, -1, -1):
        folded = ()
        total = tl.zeros_like(inputs[0])
        for i in tl.static_range(1 << k):
            difference = gradient[(1 << k) + i] - gradient[i]
            total += products[(1 << k) - 1 + i] * difference
            folded = folded + (gradient[i] + difference * inputs[k],)
        found = (total,) + found
        gradient = folded
    return found


@triton.jit
def _clamp(x):
    """To [0, 1]; NaN stays, for comparisons with it are false."""
    return tl.where(x < 0, 0.0, tl.where(x > 1, 1.0, x))


@triton.jit
def _input(
    x,
    indices,
    packed,
    node,
    k,
    group,
    sample,
    inside,
    num_nodes,
    batch,
    n: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
):
    """What slot k reads, clamped and flipped as ``packed`` says, and whether x was in [0, 1]."""
    value, reads = read(x, indices, node, k, sample, inside, num_nodes, batch, n, PADDED)
    within = (value >= 0) & (value <= 1) | (value != value)
    value = _clamp(value)
    if packed is not None:
        groups = groups_of(batch, SHIFT)
        at = (node * n + k).to(tl.int64) * groups + group
        flips = tl.load(packed + at, mask=(node < num_nodes) & (group < groups), other=0).to(tl.int32)
        value = tl.where(flipped(flips) & reads, 1 - value, value)
    return value, within


def _evaluate(
    x,
    table,
    indices,
    y,
    packed,
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
    """``y (N, B)``, and the flips into ``packed (N, n, groups)`` where there is a ``step``."""
    node = nodes_of(NODES)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    sample, inside = samples_of(group, node, batch, num_nodes, SHIFT)
    half: tl.constexpr = n // 2
    inputs = ()
    for k in tl.static_range(n):
        value, reads = read(x, indices, node, k, sample, inside, num_nodes, batch, n, PADDED)
        value = _clamp(value)
        if step is not None:
            slot = node * n + k
            flips = draw_flips(step, threshold, key_low, key_high, layer, first_group, slot, group)
            groups = groups_of(batch, SHIFT)
            kept = (node < num_nodes) & (group < groups)
            tl.store(packed + slot.to(tl.int64) * groups + group, flips.to(tl.uint8), mask=kept)
            value = tl.where(flipped(flips) & reads, 1 - value, value)
        inputs = inputs + (value,)
    one = tl.full([NODES, GROUPS, 8], 1.0, tl.float32)
    lower = _products(inputs[:half], half, one)
    upper = _products(inputs[half:], n - half, one)
    entries = table + node.to(tl.int64) * (1 << n)
    total = tl.zeros([NODES, GROUPS, 8], tl.float32)
    for h in tl.static_range(1 << (n - half)):
        joined = tl.zeros([NODES, GROUPS, 8], tl.float32)
        for a in tl.static_range(1 << half):
            entry = tl.load(entries + ((h << half) + a), mask=node < num_nodes, other=0).to(tl.float32)
            joined += entry * lower[(1 << half) - 1 + a]
        total += joined * upper[(1 << (n - half)) - 1 + h]
    tl.store(y + node.to(tl.int64) * batch + sample, total.to(y.dtype.element_ty), mask=inside)


def _differentiate_inputs(
    gradient,
    x,
    table,
    indices,
    packed,
    slot_gradient,
    n: tl.constexpr,
    num_nodes,
    batch,
    bucket,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    NODES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Gradients of the slots, ``slot_gradient (N * n, B)``; 0 where x is outside of [0, 1] and routed already."""
    node = nodes_of(NODES)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    sample, inside = samples_of(group, node, batch, num_nodes, SHIFT)
    half: tl.constexpr = n // 2
    inputs = ()
    within = ()
    for k in tl.static_range(n):
        value, valid = _input(x, indices, packed, node, k, group, sample, inside, num_nodes, batch, n, SHIFT, PADDED)
        inputs = inputs + (value,)
        within = within + (valid,)
    zero = tl.zeros([NODES, GROUPS, 8], tl.float32)
    lower = _products(inputs[:half], half, zero + 1)
    upper = _products(inputs[half:], n - half, zero + 1)
    outer = tl.load(gradient + node.to(tl.int64) * batch + sample, mask=inside, other=0).to(tl.float32)
    entries = table + node.to(tl.int64) * (1 << n)
    # an entry serves both halves while it is in a register
    lower_gradient = ()
    for _ in tl.static_range(1 << half):
        lower_gradient = lower_gradient + (zero,)
    upper_gradient = ()
    for h in tl.static_range(1 << (n - half)):
        weighted = upper[(1 << (n - half)) - 1 + h] * outer
        joined = zero
        added = ()
        for a in tl.static_range(1 << half):
            entry = tl.load(entries + ((h << half) + a), mask=node < num_nodes, other=0).to(tl.float32)
            joined += entry * lower[(1 << half) - 1 + a]
            added = added + (lower_gradient[a] + entry * weighted,)
        lower_gradient = added
        upper_gradient = upper_gradient + (joined * outer,)
    found = _fold(lower_gradient, inputs[:half], lower, half) + _fold(upper_gradient, inputs[half:], upper, n - half)
    for k in tl.static_range(n):
        value = found[k]
        if indices is None:
            value = tl.where(within[k], value, 0.0)
        at = (node * n + k).to(tl.int64) * batch + sample
        tl.store(slot_gradient + at, value.to(slot_gradient.dtype.element_ty), mask=inside)


def _differentiate_table(
    gradient,
    x,
    indices,
    packed,
    table_gradient,
    n: tl.constexpr,
    num_nodes,
    batch,
    bucket,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    TILED: tl.constexpr,
    NODES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``table_gradient (N, K)``: a program has 2^TILED entries of its nodes and goes through the batch."""
    node = nodes_of(NODES)
    tile = tl.program_id(1)
    half: tl.constexpr = TILED // 2
    zero = tl.zeros([NODES, GROUPS, 8], tl.float32)
    sums = ()
    for _ in tl.static_range(1 << TILED):
        sums = sums + (zero,)
    for first in range(0, groups_of(batch, SHIFT), GROUPS):
        group = first + tl.arange(0, GROUPS)[None, :, None]
        sample, inside = samples_of(group, node, batch, num_nodes, SHIFT)
        outer = tl.load(gradient + node.to(tl.int64) * batch + sample, mask=inside, other=0).to(tl.float32)
        inputs = ()
        for k in tl.static_range(n):
            value = _input(x, indices, packed, node, k, group, sample, inside, num_nodes, batch, n, SHIFT, PADDED)[0]
            if k < TILED:
                inputs = inputs + (value,)
            else:
                # the highest bits of the address are the number of the tile
                outer = outer * tl.where((tile >> (k - TILED)) & 1 != 0, value, 1 - value)
        lower = _products(inputs[:half], half, zero + 1)
        upper = _products(inputs[half:], TILED - half, zero + 1)
        added = ()
        for h in tl.static_range(1 << (TILED - half)):
            weighted = upper[(1 << (TILED - half)) - 1 + h] * outer
            for a in tl.static_range(1 << half):
                added = added + (sums[(h << half) + a] + weighted * lower[(1 << half) - 1 + a],)
        sums = added
    at = node.to(tl.int64) * (1 << n) + (tile << TILED)
    for a in tl.static_range(1 << TILED):
        tl.store(table_gradient + at + a, sum_samples(sums[a], NODES), mask=node < num_nodes)


evaluate = kernel(_evaluate, values=32, terms=256)
differentiate_inputs = kernel(_differentiate_inputs, values=16)
differentiate_table = kernel(_differentiate_table, ACCUMULATE)
sum_inputs = kernel(sum_over_readers)


def forward(
    x: Tensor, table: Tensor, n: int, indices: Tensor | None, padded: bool, draw: Draw | None
) -> tuple[Tensor, Tensor | None]:
    """See ``interpolate``; returns ``(N, B)``, rounded as the op's output where it can be, and the flips, packed."""
    num_nodes, batch = table.shape[0], x.shape[0]
    y = x.new_empty((num_nodes, batch), dtype=stored(output_dtype(x, table)))
    packed = None if draw is None else x.new_empty(draw.shape(num_nodes, n, batch), dtype=torch.uint8)
    shift = 0 if draw is None else draw.sample_offset % 8
    if y.numel() == 0:
        return y, packed
    with device_of(x):
        evaluate[grid(num_nodes, batch + shift)](
            _floating(x),
            table.contiguous(),
            indices,
            y,
            packed,
            *counters(draw, x.device),
            n,
            num_nodes,
            batch,
            bucket(batch),
            SHIFT=shift,
            PADDED=padded,
        )
    return y, packed


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
    if num_nodes * batch == 0:
        return x.new_zeros((x.shape[1], batch)) if want_x else None, torch.zeros_like(table) if want_table else None
    rows, outputs = _floating(x), feature_major(gradient)
    shift = 0 if packed is None else sample_offset % 8
    sizes = (n, num_nodes, batch, bucket(batch))
    constants = {"SHIFT": shift, "PADDED": padded}
    x_gradient = table_gradient = None
    with device_of(x):
        if want_table:
            table_gradient = torch.empty(table.shape, dtype=torch.float32, device=x.device)
            tiled = min(n, TILE.bit_length() - 1)
            differentiate_table[lambda meta: (triton.cdiv(num_nodes, meta["NODES"]), 1 << n - tiled)](
                outputs, rows, indices, packed, table_gradient, *sizes, **constants, TILED=tiled
            )
        if want_x:
            dtype = stored(rows.dtype)
            slots = rows.new_empty((num_nodes * n, batch), dtype=dtype if inverse is None else torch.float32)
            differentiate_inputs[grid(num_nodes, batch + shift)](
                outputs, rows, table.contiguous(), indices, packed, slots, *sizes, **constants
            )
            x_gradient = slots
            if inverse is not None:
                x_gradient = rows.new_empty(rows.shape, dtype=dtype)
                sum_inputs[grid(x.shape[1], batch)](
                    slots, *inverse, rows, x_gradient, n, x.shape[1], batch, bucket(batch)
                )
    return x_gradient, table_gradient


def _floating(x: Tensor) -> Tensor:
    """``x`` as ``(F, B)``, bits and integers as float32."""
    return feature_major(x if x.dtype.is_floating_point else x.float())
