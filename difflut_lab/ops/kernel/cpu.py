"""What the CPU kernels share: compiling them, vectors, drawing flips.

Kernels are numba functions of a run of nodes ``begin .. end`` and of arrays. Their innermost code is emitted as vector
instructions: how many loads and multiplications there are is then in our hands and not in those of a compiler's cost
model, and nothing large is left to numba's type inference, which takes most of the time that compiling takes. The size
of a node reaches them as the length of a tuple, ``(0,) * n``, because lengths of tuples are constants of a type.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import extending
from numba.core import cgutils, types
from numba.core.caching import FunctionCache
from torch import Tensor

from difflut_lab.ops.flips import KEY_STEPS, MULTIPLIERS, ROUNDS, WORD, Draw

_log = logging.getLogger(__name__)

# floats in a register; rows are padded to whole numbers of PADDING samples
LANES = 16 if binding.get_host_cpu_features().get("avx512f", False) else 8
PADDING = 32

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
WORDS = ir.VectorType(I32, LANES)

# their declared types are those of a plain function, without the first parameter taken away
intrinsic: Any = extending.intrinsic

# what may be reordered is a sum; NaN and infinity keep their meaning
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}


class _Cache(FunctionCache):
    """numba's cache on disk; an entry also depends on all files that emit code, and a miss is announced."""

    announced = False
    sources = hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].glob("*/cpu.py")))
    ).hexdigest()

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return *super()._index_key(sig, codegen), self.sources

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is None and not _Cache.announced:
            _Cache.announced = True
            _log.info("compiling CPU kernels, once: about 5 s")
        return found


@functools.cache
def _warn(message: str) -> None:
    """Log a warning, once."""
    _log.warning(message)


def kernel(function: Callable[..., None], fastmath: set[str] | bool = FASTMATH) -> Any:
    """Compile a kernel at its first call and keep it on disk, for every type of its arguments."""
    compiled: Any = numba.njit(nogil=True, fastmath=fastmath, error_model="numpy", boundscheck=False)(function)
    try:
        compiled._cache = _Cache(function)
    except RuntimeError:
        _warn("nowhere to keep CPU kernels, every process compiles them: NUMBA_CACHE_DIR can name a folder")
    return compiled


def exact_kernel(function: Callable[..., None]) -> Any:
    """Compile a kernel whose floats are rounded one operation after the other, as torch's are."""
    return kernel(function, fastmath=False)


class Vectors:
    """Emits vector instructions at an IR builder's position."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def pointer(self, address: ir.Value, of: ir.Type = FLOAT) -> ir.Value:
        return self.builder.inttoptr(address, of.as_pointer())

    def load(self, pointer: ir.Value, index: ir.Value, kind: ir.Type = FLOATS) -> ir.Value:
        at = self.builder.gep(pointer, [index])
        return self.builder.load(self.builder.bitcast(at, kind.as_pointer()), align=1)

    def store(self, value: ir.Value, pointer: ir.Value, index: ir.Value) -> None:
        at = self.builder.gep(pointer, [index])
        self.builder.store(value, self.builder.bitcast(at, value.type.as_pointer()), align=1)

    def splat(self, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
        kind = ir.VectorType(scalar.type, lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), self.constant(I32, [0] * lanes))

    @staticmethod
    def constant(kind: ir.Type, values: Sequence[float]) -> ir.Constant:
        return ir.Constant(ir.VectorType(kind, len(values)), list(values))

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.fadd(a, b)

    def subtract(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.fsub(a, b)

    def multiply(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.builder.fmul(a, b)

    def fused(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Multiply and add: ``a * b + c``."""
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return self.builder.call(function, [a, b, c])

    def dot(self, left: Sequence[ir.Value], right: Sequence[ir.Value]) -> ir.Value:
        """Scalar product: ``sum_i left[i] * right[i]``."""
        total = self.multiply(left[0], right[0])
        for a, b in zip(left[1:], right[1:], strict=True):
            total = self.fused(a, b, total)
        return total

    def sums(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Sums over the lanes of as many vectors as lanes, or a fraction, a power of two; in the first lanes of one."""
        vectors = list(vectors)
        count = vectors[0].type.count
        add = self.add if vectors[0].type.element == FLOAT else self.builder.add
        for bit in range(count.bit_length() - 1):
            lanes = [(lane, lane >> bit & 1) for lane in range(count)]
            if len(vectors) == 1:
                turned = self.constant(I32, [lane ^ (1 << bit) for lane, _ in lanes])
                vectors = [add(vectors[0], self.builder.shuffle_vector(vectors[0], vectors[0], turned))]
                continue
            # a lane whose bit is set goes on with the second of a pair
            kept = self.constant(I32, [lane + count * second for lane, second in lanes])
            turned = self.constant(I32, [(lane ^ (1 << bit)) + count * second for lane, second in lanes])
            vectors = [
                add(self.builder.shuffle_vector(a, b, kept), self.builder.shuffle_vector(a, b, turned))
                for a, b in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        return vectors[0]

    def gather(self, table: ir.Value, places: ir.Value, at: ir.Value, lanes: int = LANES) -> ir.Value:
        """Entries of a table at ``lanes`` places, bytes, from ``at`` on."""
        kind = ir.VectorType(FLOAT, lanes)
        found = ir.Constant(kind, ir.Undefined)
        for lane in range(lanes):
            entry = self.builder.load(self.builder.gep(table, [self.place(places, at, lane)]))
            found = self.builder.insert_element(found, entry, I32(lane))
        return found

    def place(self, places: ir.Value, at: ir.Value, lane: int) -> ir.Value:
        """Byte ``at + lane`` of ``places``, as an index."""
        byte = self.builder.load(self.builder.gep(places, [self.builder.add(at, I64(lane))]))
        return self.builder.zext(byte, I64)

    def transpose(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """Eight vectors of eight floats as their columns."""
        masks = {
            "low": [0, 8, 1, 9, 4, 12, 5, 13],
            "high": [2, 10, 3, 11, 6, 14, 7, 15],
            "left": [0, 1, 8, 9, 4, 5, 12, 13],
            "right": [2, 3, 10, 11, 6, 7, 14, 15],
            "first": [0, 1, 2, 3, 8, 9, 10, 11],
            "last": [4, 5, 6, 7, 12, 13, 14, 15],
        }

        def join(name: str, a: ir.Value, b: ir.Value) -> ir.Value:
            return self.builder.shuffle_vector(a, b, self.constant(I32, masks[name]))

        pairs = [join(half, rows[i], rows[i + 1]) for i in (0, 2, 4, 6) for half in ("low", "high")]
        fours = [
            join(half, pairs[i + k], pairs[i + k + 2]) for i in (0, 4) for k in (0, 1) for half in ("left", "right")
        ]
        return [join(half, fours[k], fours[k + 4]) for half in ("first", "last") for k in range(4)]

    def bits(self, pointer: ir.Value, sample: ir.Value, lanes: int = LANES) -> ir.Value:
        """Bits of ``lanes`` samples, from packed ones, as a vector of booleans; ``sample`` is a multiple of lanes."""
        octets = ir.VectorType(I8, lanes // 8)
        packed = self.load(pointer, self.builder.lshr(sample, sample.type(3)), octets)
        spread = self.builder.shuffle_vector(
            packed, ir.Constant(octets, ir.Undefined), self.constant(I32, [lane // 8 for lane in range(lanes)])
        )
        wanted = self.builder.and_(spread, self.constant(I8, [1 << lane % 8 for lane in range(lanes)]))
        return self.builder.icmp_unsigned("!=", wanted, ir.Constant(wanted.type, [0] * lanes))


@intrinsic
def _draw(typingctx, into, groups, first, slot, step, layer, low, high, threshold):  # type: ignore[no-untyped-def]
    """Packed flips of one slot, for ``groups`` groups of eight samples and up to LANES - 1 more; see ``ops.flips``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        into, groups, first, slot, step, layer, low, high, threshold = arguments
        into = v.pointer(into, I8)
        # words in the lower halves of 64 bits, where they are multiplied; what is above is left to be anything
        half, word = v.constant(I64, [32] * LANES), v.constant(I64, [WORD] * LANES)
        keys = [v.splat(key) for key in (low, high)]
        limit = v.splat(builder.trunc(builder.sub(threshold, I64(1)), I16), 2 * LANES)
        with cgutils.for_range_slice(builder, I64(0), groups, I64(LANES), I64) as (group, _):
            c0 = builder.add(v.splat(builder.add(first, group)), v.constant(I64, range(LANES)))
            c1, c2, c3 = (v.splat(number) for number in (slot, step, layer))
            for turn in range(ROUNDS):
                product0, product1 = (
                    builder.mul(builder.and_(counter, word), v.constant(I64, [factor] * LANES))
                    for counter, factor in zip((c0, c2), MULTIPLIERS, strict=True)
                )
                key0, key1 = (
                    builder.add(key, v.constant(I64, [turn * more & WORD] * LANES))
                    for key, more in zip(keys, KEY_STEPS, strict=True)
                )
                c0, c1 = builder.xor(builder.xor(builder.lshr(product1, half), c1), key0), product1
                c2, c3 = builder.xor(builder.xor(builder.lshr(product0, half), c3), key1), product0
            octets = v.constant(I32, [0] * LANES)
            for index, counter in enumerate((c0, c1, c2, c3)):
                halves = builder.bitcast(builder.trunc(counter, WORDS), limit.type)
                below = builder.sext(builder.icmp_unsigned("<=", halves, limit), limit.type)
                flags = builder.bitcast(below, WORDS)
                bits = 1 << 2 * index | 1 << 16 + 2 * index + 1
                octets = builder.or_(octets, builder.and_(flags, v.constant(I32, [bits] * LANES)))
            octets = builder.or_(octets, builder.lshr(octets, v.constant(I32, [16] * LANES)))
            v.store(builder.trunc(octets, ir.VectorType(I8, LANES)), into, group)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate


@intrinsic
def stack(typingctx, fan):  # type: ignore[no-untyped-def]
    """Room for an address per input of a node.

    On the stack and aligned to cache lines, because that makes the compiler align what it spills to the stack, too.
    Measured: a register that crosses lines when it is loaded costs twice as much, and half of the spilled ones do.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        place = cgutils.alloca_once(builder, I64, size=I64(fan.count))
        place.align = 64
        return place

    return types.CPointer(types.int64)(fan), generate


@numba.njit(nogil=True, error_model="numpy")
def place_rows(rows, x, zeros, routing, node):  # type: ignore[no-untyped-def]
    """Addresses of what a node reads: rows of ``x (F, B)``, or ``zeros`` where a slot reads a constant.

    ``routing`` is int32 ``(N, n)``, or has no rows where inputs are routed already.
    """
    for k in range(len(rows)):
        read = routing[node, k] if routing.shape[0] > 0 else node * len(rows) + k
        rows[k] = zeros.ctypes.data if read < 0 else x.ctypes.data + read * x.shape[1] * x.itemsize


@numba.njit(nogil=True, error_model="numpy")
def align(into, packed, shift, constant):  # type: ignore[no-untyped-def]
    """Packed flips of a slot, counted from the batch's first sample; none where the slot reads a constant."""
    groups = len(packed)
    for octet in range(min(len(into), groups)):
        following = packed[octet + 1] if octet + 1 < groups else np.uint8(0)
        into[octet] = np.uint8(0) if constant else np.uint8((packed[octet] >> shift) | (following << (8 - shift)))


@numba.njit(nogil=True, error_model="numpy")
def draw_node(drawn, packed, shift, groups, node, routing, counter):  # type: ignore[no-untyped-def]
    """The flips of one node.

    Parameters
    ----------
    drawn : array
        uint8 ``(n, B / 8)``: written; bit i of octet o is sample 8 o + i. No flips where a slot reads a constant.
    packed : array
        uint8 ``(n, groups + LANES)``: written; the same for constants too, counted from a multiple of eight samples.
    shift : int
        Samples between that multiple and the batch's first one.
    groups : int
        Groups of eight samples that the batch touches.
    node : int
    routing : array
        As of ``place_rows``.
    counter : tuple of int
        Made by ``flip_counter``.
    """
    n = len(drawn)
    for k in range(n):
        at = packed.ctypes.data + k * packed.shape[1]
        if counter[5] == 0:
            packed[k] = 0
            drawn[k] = 0
            continue
        _draw(at, groups, counter[0], node * n + k, counter[1], counter[2], counter[3], counter[4], counter[5])
        align(drawn[k], packed[k, :groups], shift, routing.shape[0] > 0 and routing[node, k] < 0)


def flip_counter(draw: Draw | None) -> tuple[int, ...]:
    """The ``counter`` of ``draw_node``, or nothing."""
    if draw is None:
        return ()
    seed = draw.seed
    return (
        draw.sample_offset // 8 & WORD,
        int(draw.step) & WORD,
        draw.layer & WORD,
        seed & WORD,
        seed >> 32 & WORD,
        draw.threshold,
    )


def array(tensor: Tensor) -> Any:
    """A tensor's memory, for a kernel."""
    return tensor.detach().contiguous().numpy()


def routing_array(indices: Tensor | None, n: int) -> Any:
    """A wiring, as ``place_rows`` takes it."""
    return np.empty((0, n), np.int32) if indices is None else array(indices)


def padded_rows(x: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """``(B, F)`` as contiguous rows of whole registers, zeros behind; without a copy where it is a view of that."""
    batch = x.shape[0]
    length = -(-batch // PADDING) * PADDING
    if length == batch:
        return x.detach().t().to(kind).contiguous()
    rows = torch.empty(x.shape[1], length, dtype=kind)
    rows[:, batch:] = 0
    rows[:, :batch] = x.detach().t()
    return rows


def block_width(length: int) -> int:
    """Samples of a block of a padded batch: one block for each thread, as long as there are enough samples.

    Measured: at B = 1024, blocks that stay in the second cache take twice as long as whole rows.
    """
    share = -(-length // (torch.get_num_threads() * PADDING)) * PADDING
    return max(share, PADDING)


def unpadded(rows: Tensor, batch: int) -> Tensor:
    """The first ``batch`` samples of padded rows, contiguous."""
    return rows if rows.shape[1] == batch else rows[:, :batch].contiguous()
