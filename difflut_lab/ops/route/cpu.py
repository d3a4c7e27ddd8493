"""Learnable routing on a CPU.

Rows of candidates are multiplied and added where they lie. Most candidates weigh nothing at a low temperature: they are
left out of the gradient of the inputs, before their exponentials are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray
from numba.core import cgutils, types
from torch import Tensor

from difflut_lab.ops.kernel.cpu import (
    FLOAT,
    FLOATS,
    I1,
    I32,
    I64,
    LANES,
    Vectors,
    array,
    block_width,
    intrinsic,
    kernel,
    padded_rows,
    stack,
    unpadded,
)
from difflut_lab.ops.route import reference
from difflut_lab.ops.shapes import feature_major
from difflut_lab.ops.threads.cpu import run

# as long as the number of candidates whose products with a slot are made at once
TILE = (0,) * 8
# together, the candidates that are left out weigh less than this part of the heaviest one
NEGLIGIBLE = 1e-6
# where more than this share of all candidates weighs something, a product of matrices is faster
DENSE = 0.25


@intrinsic
def _first_highest(typingctx, scores, count):  # type: ignore[no-untyped-def]
    """The place of the first of the highest of ``count`` scores, a multiple of LANES; or of the first NaN."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        scores, count = v.pointer(arguments[0]), arguments[1]
        # NaN if either is
        kind = ir.FunctionType(FLOATS, [FLOATS] * 2)
        maximum = cgutils.get_or_insert_function(builder.module, kind, f"llvm.maximum.v{LANES}f32")
        highest, place = cgutils.alloca_once(builder, FLOATS), cgutils.alloca_once(builder, I64)
        builder.store(v.load(scores, I64(0)), highest)
        with cgutils.for_range_slice(builder, I64(LANES), count, I64(LANES), I64) as (at, _):
            builder.store(builder.call(maximum, [builder.load(highest), v.load(scores, at)]), highest)
        best = builder.load(highest)
        for bit in range(LANES.bit_length() - 1):
            turned = v.constant(I32, [lane ^ (1 << bit) for lane in range(LANES)])
            best = builder.call(maximum, [best, builder.shuffle_vector(best, best, turned)])
        # from the end on, so that the first one is the last to be found
        with cgutils.for_range_slice(builder, I64(LANES), builder.add(count, I64(1)), I64(LANES), I64) as (back, _):
            at = builder.sub(count, back)
            part = v.load(scores, at)
            found = builder.or_(builder.fcmp_ordered("==", part, best), builder.fcmp_unordered("uno", part, part))
            mask = builder.bitcast(found, ir.IntType(LANES))
            with builder.if_then(builder.icmp_unsigned("!=", mask, mask.type(0))):
                builder.store(builder.add(at, builder.zext(builder.cttz(mask, I1(1)), I64)), place)
        return builder.load(place)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _products(typingctx, tile, source, rows, out, count):  # type: ignore[no-untyped-def]
    """Scalar products of a row with as many as ``tile`` is long; ``out`` has LANES elements."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        _, source, rows, out, count = arguments
        source, rows, out = v.pointer(source), v.pointer(rows, I64), v.pointer(out)
        others = [v.pointer(builder.load(builder.gep(rows, [I64(i)]))) for i in range(tile.count)]
        sums = [cgutils.alloca_once(builder, FLOATS) for _ in others]
        for place in sums:
            builder.store(v.constant(FLOAT, [0.0] * LANES), place)
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
            part = v.load(source, at)
            for place, other in zip(sums, others, strict=True):
                builder.store(v.fused(part, v.load(other, at), builder.load(place)), place)
        v.store(v.sums([builder.load(place) for place in sums]), out, I64(0))
        return context.get_dummy_value()

    return types.void(tile, *[types.int64] * 4), generate


@intrinsic
def _add_weighted(typingctx, weight, source, out, count):  # type: ignore[no-untyped-def]
    """``out += weight * source``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        weight, source, out, count = arguments
        weight, source, out = v.splat(weight), v.pointer(source), v.pointer(out)
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
            v.store(v.fused(weight, v.load(source, at), v.load(out, at)), out, at)
        return context.get_dummy_value()

    return types.void(types.float32, *[types.int64] * 3), generate


@intrinsic
def _heavy(typingctx, scores, count, lowest, places, write):  # type: ignore[no-untyped-def]
    """How many of ``count`` scores, a multiple of LANES, are not below ``lowest``; where, if ``write`` is not empty."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        scores, count, lowest, places, _ = arguments
        scores, places, lowest = v.pointer(scores), v.pointer(places, I32), v.splat(lowest)
        total, rest = cgutils.alloca_once(builder, I64), cgutils.alloca_once(builder, ir.IntType(LANES))
        builder.store(I64(0), total)
        with cgutils.for_range_slice(builder, I64(0), count, I64(LANES), I64) as (at, _):
            mask = builder.bitcast(builder.fcmp_unordered(">=", v.load(scores, at), lowest), ir.IntType(LANES))
            more, before = builder.zext(builder.ctpop(mask), I64), builder.load(total)
            if write.count:
                builder.store(mask, rest)
                with cgutils.for_range(builder, more, intp=I64) as loop:
                    left = builder.load(rest)
                    place = builder.add(at, builder.zext(builder.cttz(left, I1(1)), I64))
                    entry = builder.gep(places, [builder.add(before, loop.index)])
                    builder.store(builder.trunc(place, I32), entry)
                    builder.store(builder.and_(left, builder.sub(left, left.type(1))), rest)
            builder.store(builder.add(before, more), total)
        return builder.load(total)

    return types.int64(types.int64, types.int64, types.float32, types.int64, write), generate


@numba.njit(nogil=True, error_model="numpy")
def highest(scores, s, whole):  # type: ignore[no-untyped-def]
    """The place of the first of the highest of a slot's scores, or of the first NaN."""
    best = _first_highest(scores.ctypes.data + 4 * s * scores.shape[1], whole) if whole > 0 else 0
    for c in range(whole, scores.shape[1]):
        if scores[s, best] == scores[s, best] and not scores[s, c] <= scores[s, best]:
            best = c
    return best


@kernel
def choose_highest(begin, end, scores, chosen):  # type: ignore[no-untyped-def]
    """Places of the highest scores ``(S, k)`` of a run of slots."""
    whole = scores.shape[1] // LANES * LANES
    for s in range(begin, end):
        chosen[s] = highest(scores, s, whole)


@kernel
def multiply_candidates(begin, end, slots, signs, candidates, out):  # type: ignore[no-untyped-def]
    """Products ``out (S, k)`` of the rows ``slots (S, B)`` with their candidates' among ``signs (F, B)``."""
    batch, count = slots.shape[1], candidates.shape[1]
    rows, products = carray(stack(TILE), (len(TILE),)), np.empty(LANES, np.float32)
    for s in range(begin, end):
        for first in range(0, count, len(TILE)):
            for i in range(len(TILE)):
                rows[i] = signs.ctypes.data + 4 * batch * candidates[s, min(first + i, count - 1)]
            _products(TILE, slots.ctypes.data + 4 * s * batch, rows.ctypes.data, products.ctypes.data, batch)
            for i in range(min(len(TILE), count - first)):
                out[s, first + i] = products[i]


@kernel
def count_heavy(begin, end, scores, reach, chosen, found):  # type: ignore[no-untyped-def]
    """Places of the highest scores, and how many are within ``reach`` of them, for a run of slots."""
    count = scores.shape[1]
    whole = count // LANES * LANES
    for s in range(begin, end):
        row = scores.ctypes.data + 4 * s * count
        chosen[s] = highest(scores, s, whole)
        lowest = scores[s, chosen[s]] - reach
        total = _heavy(row, whole, lowest, 0, ())
        for c in range(whole, count):
            total += not scores[s, c] < lowest
        found[s] = total


@kernel
def weigh(begin, end, scores, reach, tau, chosen, start, places, weights):  # type: ignore[no-untyped-def]
    """Softmax of those scores, and their places, from ``start[s]`` on for slot s, for a run of slots."""
    count = scores.shape[1]
    whole = count // LANES * LANES
    for s in range(begin, end):
        best = scores[s, chosen[s]]
        lowest = best - reach
        entry = start[s] + _heavy(
            scores.ctypes.data + 4 * s * count, whole, lowest, places.ctypes.data + 4 * start[s], (0,)
        )
        for c in range(whole, count):
            if not scores[s, c] < lowest:
                places[entry] = c
                entry += 1
        total = np.float32(0)
        for i in range(start[s], entry):
            weights[i] = np.exp((scores[s, places[i]] - best) / tau)
            total += weights[i]
        for i in range(start[s], entry):
            weights[i] /= total


@kernel
def add_weighted(begin, end, width, slots, start, places, weights, candidates, out):  # type: ignore[no-untyped-def]
    """Gradients ``out (F, B)`` of the inputs from those of the ``slots (S, B)``, for a run of blocks of samples."""
    batch = slots.shape[1]
    for block in range(begin, end):
        first = block * width
        size = min(width, batch - first)
        out[:, first : first + size] = 0
        for s in range(slots.shape[0]):
            source = slots.ctypes.data + 4 * (s * batch + first)
            for i in range(start[s], start[s + 1]):
                f = candidates[s, places[i]] if candidates.shape[0] > 0 else places[i]
                _add_weighted(weights[i], source, out.ctypes.data + 4 * (f * batch + first), size)


def forward(x: Tensor, scores: Tensor, candidates: Tensor | None) -> Tensor:
    """See ``route``; returns ``(N * n, B)``."""
    rows = scores.float().flatten(0, 1)
    chosen = torch.empty(rows.shape[0], dtype=torch.int64)
    run(choose_highest, len(rows), rows.numel() >> 1, array(rows), array(chosen))
    if candidates is not None:
        chosen = candidates.flatten(0, 1).gather(1, chosen.unsqueeze(1)).flatten()
    return feature_major(x).index_select(0, chosen)


def backward(
    gradient: Tensor,
    x: Tensor,
    scores: Tensor,
    candidates: Tensor | None,
    inverse: tuple[Tensor, Tensor] | None,
    tau: float,
    want_x: bool,
    want_scores: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, as ``(F, B)``, and of the scores ``(N, n, k)``; None for one that is not wanted."""
    x_gradient = score_gradient = None
    slots = padded_rows(gradient)
    if candidates is not None:
        lowest, highest = candidates.aminmax()
        if lowest < 0 or highest >= x.shape[1]:
            raise IndexError(f"candidates: must be from 0 to {x.shape[1] - 1}, found {lowest} to {highest}.")
    if want_scores and candidates is None:
        _, score_gradient = reference.backward(gradient, x, scores, None, None, tau, False, True)
    elif want_scores and candidates is not None:
        signs = padded_rows(x).mul(2).sub_(1)
        score_gradient = torch.empty(scores.shape)
        run(
            multiply_candidates,
            slots.shape[0],
            scores.numel() * slots.shape[1] >> 4,
            array(slots),
            array(signs),
            array(candidates.flatten(0, 1)),
            array(score_gradient.flatten(0, 1)),
        )
    if want_x:
        x_gradient = _spread(slots, x, scores.float().flatten(0, 1), candidates, tau)
        if x_gradient is None:
            x_gradient, _ = reference.backward(gradient, x, scores, candidates, inverse, tau, True, False)
        else:
            x_gradient = unpadded(x_gradient, x.shape[0])
    return x_gradient, score_gradient


def _spread(slots: Tensor, x: Tensor, scores: Tensor, candidates: Tensor | None, tau: float) -> Tensor | None:
    """Gradient of the inputs, padded; None where too many candidates weigh something."""
    total, reach = scores.shape[0], np.float32(tau * math.log(max(2, scores.shape[1]) / NEGLIGIBLE))
    chosen, found = (torch.empty(total, dtype=torch.int64) for _ in range(2))
    rows, work = array(scores), scores.numel() >> 1
    run(count_heavy, total, work, rows, reach, array(chosen), array(found))
    start = torch.zeros(total + 1, dtype=torch.int64)
    torch.cumsum(found, 0, out=start[1:])
    heavy = int(start[-1])
    if heavy > DENSE * scores.numel() and candidates is None:
        return None
    places, weights = torch.empty(heavy, dtype=torch.int32), torch.empty(heavy)
    arguments = (array(chosen), array(start), array(places), array(weights))
    run(weigh, total, 2 * work, rows, reach, np.float32(tau), *arguments)
    out = torch.empty(x.shape[1], slots.shape[1])
    width = block_width(slots.shape[1])
    run(
        add_weighted,
        -(-slots.shape[1] // width),
        heavy * slots.shape[1] >> 4,
        width,
        array(slots),
        array(start),
        array(places),
        array(weights),
        np.empty((0, 1), np.int32) if candidates is None else array(candidates.flatten(0, 1)),
        array(out),
    )
    return out
