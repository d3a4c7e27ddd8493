"""Dot products of codes of two bits with bytes or floats, in vector instructions of x86 processors.

A code c in {-1, 0, +1} is stored as its *digit* c + 1, an unsigned byte once it stands alone, which is what the integer
instructions want: ``c . x = digits . x - sum x``. Shifting 16 words, a register, right by 2 s and keeping the two
lowest bits of each byte gives 64 digits: byte b of word w is code ``16 w + 4 b + s``. Bytes of activations are laid out
to match, so codes are never moved.

The kinds of instructions that machines have are the names in ``KINDS``; a kernel gets one as the length of a tuple.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import binding, ir
from numba.core import cgutils, types

from difflut_lab.ops.kernel.cpu import FLOAT, I1, I8, I16, I32, I64, Vectors, intrinsic
from difflut_lab.ops.ternary_linear.activations import LEVELS

# lanes on all machines: where registers are half as wide, two are one
WIDE = 16
INTEGERS, REALS = ir.VectorType(I32, WIDE), ir.VectorType(FLOAT, WIDE)
TABLE = ir.VectorType(FLOAT, 4)
# what is kept of four bytes of codes: digits, or whether a code is 0
DIGITS, ZEROS = 0x03030303, 0x01010101

# instruction sets and the lanes of 32 bits that their registers have, the fastest last
KINDS = {"avx2": 8, "avx512": 16, "avx_vnni": 8, "avx512_vnni": 16, "amx": 16}
NEEDS = {
    "avx2": ["avx2"],
    "avx512": ["avx512f", "avx512bw"],
    "avx_vnni": ["avxvnni"],
    "avx512_vnni": ["avx512f", "avx512vnni"],
    "amx": ["avx512f", "amx-tile", "amx-int8"],
}

# rows of an AMX register; the two registers with columns, and at most two with rows, of a product
TILE, PANELS = 16, 2

# 1.5 * 2^23: its sum with a small number has the number, rounded to even, in its lowest bits
ROUNDER, ROUNDER_BITS = 12582912.0, 0x4B400000
INFINITY_BITS = 0x7F800000
TINY = float(torch.finfo(torch.float32).tiny)
# quotients this far from an integer may round the other way than those of a true division; their error is below 2e-5
UNSURE = 0.4999

SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


@functools.cache
def kinds(tiles: bool = True) -> list[str]:
    """The names in KINDS that this machine runs, the fastest last; AMX's only where ``tiles`` of panels may be used."""
    features = binding.get_host_cpu_features()
    found = [kind for kind, needs in NEEDS.items() if all(features.get(need, False) for need in needs)]
    if "amx" in found and not (tiles and _allowed_tiles()):
        found.remove("amx")
    return found


def choice(kind: str) -> tuple[int, ...]:
    """A kind, as kernels take it: as the length of a tuple."""
    return (0,) * (1 + list(KINDS).index(kind))


def chosen(choice: Any) -> str:
    """The reverse of ``choice``, for the type of the tuple."""
    return list(KINDS)[choice.count - 1]


def rows_at_once(kind: str) -> int:
    """Rows that a product with panels takes at once: sums of twice as many vectors stay in registers."""
    if kind == "amx":
        return 2 * TILE
    return 8 if KINDS[kind] == WIDE else 2


def _allowed_tiles() -> bool:
    """Ask the system for AMX registers, which a process may not use unasked."""
    try:
        call = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return False
    numbers = [ctypes.c_long(n) for n in (SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)]
    return call(*numbers) == 0


class Dots(Vectors):
    """Emits dot products at an IR builder's position. Vectors are of WIDE lanes."""

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def loop(self, stop: ir.Value, step: int = 1) -> Any:
        return cgutils.for_range_slice(self.builder, I64(0), stop, I64(step), I64)

    def mask(self, count: ir.Value, lanes: int) -> ir.Value:
        """Lanes below a number."""
        limit = self.splat(self.builder.trunc(count, I32), lanes)
        return self.builder.icmp_signed("<", self.constant(I32, range(lanes)), limit)

    def first(self, pointer: ir.Value, index: ir.Value, count: ir.Value, kind: ir.Type) -> ir.Value:
        """A vector from ``pointer[index]`` on, zeros from its ``count``-th number on; memory there is not touched."""
        at = self.builder.bitcast(self.builder.gep(pointer, [index]), kind.as_pointer())
        name = f"llvm.masked.load.v{kind.count}{'f32' if kind.element == FLOAT else 'i32'}.p0"
        return self.call(name, kind, at, I32(4), self.mask(count, kind.count), ir.Constant(kind, None))

    def put(self, value: ir.Value, pointer: ir.Value, index: ir.Value, count: ir.Value) -> None:
        """Store floats, those before the ``count``-th."""
        lanes = value.type.count
        at = self.builder.bitcast(self.builder.gep(pointer, [index]), value.type.as_pointer())
        self.call(f"llvm.masked.store.v{lanes}f32.p0", ir.VoidType(), value, at, I32(4), self.mask(count, lanes))

    def sweep(
        self, pointer: ir.Value, count: ir.Value, kind: ir.Type, body: Callable[[ir.Value, Sequence[ir.Value]], None]
    ) -> None:
        """Call ``body`` with places and vectors of an array: four at once, and one by one at its end."""
        most = self.builder.and_(count, I64(-4 * WIDE))
        with self.loop(most, 4 * WIDE) as (at, _):
            body(at, [self.load(pointer, self.builder.add(at, I64(WIDE * i)), kind) for i in range(4)])
        rest = self.builder.sub(count, most)
        with self.loop(rest, WIDE) as (more, _):
            at = self.builder.add(most, more)
            body(at, [self.first(pointer, at, self.builder.sub(count, at), kind)])

    def row(self, rows: ir.Value, first: ir.Value, index: int, count: ir.Value, width: ir.Value) -> ir.Value:
        """Where row ``first + index`` begins; the last one for those beyond."""
        row, last = self.builder.add(first, I64(index)), self.builder.sub(count, I64(1))
        row = self.builder.select(self.builder.icmp_signed("<", row, last), row, last)
        return self.builder.gep(rows, [self.builder.mul(row, width)])

    def prefetch(self, pointer: ir.Value, index: ir.Value, ahead: ir.Value, write: bool = False) -> None:
        """Ask for what is ``ahead`` numbers behind ``pointer[index]``; it need not be memory of ours."""
        at = self.builder.gep(pointer, [self.builder.add(index, ahead)])
        self.call(
            "llvm.prefetch.p0",
            ir.VoidType(),
            self.builder.bitcast(at, I8.as_pointer()),
            I32(int(write)),
            I32(3),
            I32(1),
        )

    def part(self, value: ir.Value, first: int, lanes: int) -> ir.Value:
        return self.builder.shuffle_vector(value, value, self.constant(I32, range(first, first + lanes)))

    def finish(
        self, sums: Sequence[ir.Value], total: ir.Value, step: ir.Value, factors: Sequence[ir.Value]
    ) -> ir.Value:
        """Outputs ``(scale * (c . x) + skew * (|c| . x)) * step + bias``, in the order of the reference.

        Parameters
        ----------
        sums : sequence of vector
            Products with digits, and sums of levels whose codes are 0 where there is a skew.
        total, step : vector
            Sums of levels, and what a level is worth.
        factors : sequence of vector
            Scale, skew where there is one, and bias.
        """
        builder, kind = self.builder, factors[0].type
        value = builder.fmul(builder.sitofp(builder.sub(sums[0], total), kind), factors[0])
        for zeros in sums[1:]:
            value = builder.fadd(value, builder.fmul(builder.sitofp(builder.sub(total, zeros), kind), factors[1]))
        return builder.fadd(builder.fmul(value, step), factors[-1])

    def largest(self, pointer: ir.Value, count: ir.Value) -> ir.Value:
        """Bits of the largest magnitude of floats, whose order is that of their bits; NaN is beyond infinity."""
        builder = self.builder
        most = self.variables(INTEGERS, 4)

        def compare(at: ir.Value, found: Sequence[ir.Value]) -> None:
            for value, place in zip(found, most, strict=False):
                value, so_far = builder.and_(value, self.constant(I32, [0x7FFFFFFF] * WIDE)), builder.load(place)
                builder.store(builder.select(builder.icmp_signed(">", value, so_far), value, so_far), place)

        self.sweep(builder.bitcast(pointer, I32.as_pointer()), count, INTEGERS, compare)
        parts = [self.call(f"llvm.vector.reduce.smax.v{WIDE}i32", I32, builder.load(place)) for place in most]
        return functools.reduce(lambda a, b: builder.select(builder.icmp_signed(">", a, b), a, b), parts)

    def step(self, largest: ir.Value) -> ir.Value:
        """The step of ``quantize_activations``; NaN where a value is not finite, as outputs then are."""
        builder = self.builder
        step = builder.fdiv(builder.bitcast(largest, FLOAT), FLOAT(LEVELS))
        step = builder.select(builder.fcmp_ordered(">", step, FLOAT(TINY)), step, FLOAT(TINY))
        return builder.select(builder.icmp_signed("<", largest, I32(INFINITY_BITS)), step, FLOAT(float("nan")))

    def round(
        self, pointer: ir.Value, count: ir.Value, step: ir.Value, put: Callable[[ir.Value, ir.Value], None]
    ) -> ir.Value:
        """Call ``put`` with ``round(x / step)`` of all floats, WIDE integers at a time, and their place; their sum."""
        builder = self.builder
        steps, inverse = self.splat(step, WIDE), self.splat(builder.fdiv(FLOAT(1), step), WIDE)
        rounder = self.constant(FLOAT, [ROUNDER] * WIDE)
        (total,), rounded = self.variables(INTEGERS, 1), self.variables(REALS, 4)

        def round_some(at: ir.Value, found: Sequence[ir.Value]) -> None:
            unsure = ir.Constant(ir.VectorType(I1, WIDE), None)
            for x, place in zip(found, rounded, strict=False):
                quotient = builder.fmul(x, inverse)
                shifted = builder.fadd(quotient, rounder)
                builder.store(shifted, place)
                distance = builder.fsub(quotient, builder.fsub(shifted, rounder))
                distance = self.call(f"llvm.fabs.v{WIDE}f32", REALS, distance)
                far = builder.fcmp_ordered(">", distance, self.constant(FLOAT, [UNSURE] * WIDE))
                unsure = builder.or_(unsure, far)
            # a division takes as long as all the rest
            with cgutils.if_unlikely(builder, self.call(f"llvm.vector.reduce.or.v{WIDE}i1", I1, unsure)):
                for x, place in zip(found, rounded, strict=False):
                    builder.store(builder.fadd(builder.fdiv(x, steps), rounder), place)
            for index, place in enumerate(rounded[: len(found)]):
                levels = builder.bitcast(builder.load(place), INTEGERS)
                levels = builder.sub(levels, self.constant(I32, [ROUNDER_BITS] * WIDE))
                builder.store(builder.add(builder.load(total), levels), total)
                put(levels, builder.add(at, I64(WIDE * index)))

        self.sweep(pointer, count, REALS, round_some)
        return self.call(f"llvm.vector.reduce.add.v{WIDE}i32", I32, builder.load(total))

    def variables(self, kind: ir.Type, count: int) -> list[ir.Value]:
        """Registers that loops change, zeros at first."""
        places = [cgutils.alloca_once(self.builder, kind) for _ in range(count)]
        for place in places:
            self.builder.store(ir.Constant(kind, None), place)
        return places

    def digits(self, words: ir.Value, shift: int, mask: int = DIGITS) -> ir.Value:
        """Bytes of one of the four digits that each byte of words holds; with ZEROS, 1 where the code is 0."""
        shifted = self.builder.lshr(words, self.constant(I32, [2 * shift] * WIDE)) if shift else words
        return self.builder.and_(shifted, self.constant(I32, [mask] * WIDE))

    def halves(self, value: ir.Value, lanes: int) -> list[ir.Value]:
        """A vector as registers of ``lanes`` lanes."""
        return [self.part(value, first, lanes) for first in range(0, WIDE, lanes)]

    def joined(self, parts: Sequence[ir.Value]) -> ir.Value:
        """The reverse of ``halves``."""
        return parts[0] if len(parts) == 1 else self.builder.shuffle_vector(*parts, self.constant(I32, range(WIDE)))

    def accumulate(self, kind: str, total: ir.Value, digits: ir.Value, levels: ir.Value) -> ir.Value:
        """``total`` and the products of four unsigned with four signed bytes, lane by lane."""
        lanes = KINDS[kind]
        parts = zip(*(self.halves(value, lanes) for value in (total, digits, levels)), strict=True)
        return self.joined([self._accumulate(kind, lanes, *part) for part in parts])

    def _accumulate(self, kind: str, lanes: int, total: ir.Value, digits: ir.Value, levels: ir.Value) -> ir.Value:
        words = ir.VectorType(I32, lanes)
        if kind not in ("avx2", "avx512"):
            return self.call(f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", words, total, digits, levels)
        shorts = ir.VectorType(I16, 2 * lanes)
        name, widen = (
            ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd")
            if kind == "avx2"
            else ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512")
        )
        octets = ir.VectorType(I8, 4 * lanes)
        pairs = self.call(name, shorts, *(self.builder.bitcast(value, octets) for value in (digits, levels)))
        return self.builder.add(total, self.call(widen, words, pairs, self.constant(I16, [1] * 2 * lanes)))

    def weights(self, table: ir.Value, digits: ir.Value) -> ir.Value:
        """Entries of a table of four floats, repeated, at the two lowest bits of each lane."""
        if "avx512" in kinds():
            return self.call("llvm.x86.avx512.vpermilvar.ps.512", REALS, table, digits)
        half = ir.VectorType(FLOAT, WIDE // 2)
        parts = zip(self.halves(table, WIDE // 2), self.halves(digits, WIDE // 2), strict=True)
        return self.joined([self.call("llvm.x86.avx.vpermilvar.ps.256", half, *part) for part in parts])

    def table(self, place: ir.Value) -> ir.Value:
        """The four weights of an output, repeated, as ``weights`` takes them."""
        four = self.load(place, I64(0), TABLE)
        return self.builder.shuffle_vector(four, four, self.constant(I32, [lane % 4 for lane in range(WIDE)]))

    def tiles(
        self,
        name: str,
        rows: Sequence[ir.Value],
        stride: ir.Value,
        panels: Sequence[ir.Value],
        chunks: ir.Value,
        out: ir.Value,
    ) -> None:
        """Products in AMX registers: sums in 0 to 3, rows in 4 and 5, panels in 6 and 7.

        Parameters
        ----------
        name : str
            ``tdpbsud`` for signed rows and unsigned panels, ``tdpbusd`` for the reverse.
        rows : sequence of pointer
            To TILE rows of bytes each, 64 a chunk.
        stride : int
            Bytes of a row.
        panels : sequence of pointer
            To panels of 1024 bytes a chunk: four bytes of each column, then the next four.
        chunks : int
        out : pointer
            To int32 ``(PANELS, 2 * TILE, TILE)``.
        """
        builder, line, none = self.builder, I64(64), ir.VoidType()
        numbers = [(row, p, I8(2 * row + p)) for row in range(len(rows)) for p in range(PANELS)]
        for *_, number in numbers:
            self.call("llvm.x86.tilezero", none, number)
        with self.loop(chunks) as (chunk, _):
            for p, panel in enumerate(panels):
                at = builder.gep(panel, [builder.shl(chunk, I64(10))])
                self.call("llvm.x86.tileloadd64", none, I8(6 + p), at, line)
            for row, source in enumerate(rows):
                at = builder.gep(source, [builder.shl(chunk, I64(6))])
                self.call("llvm.x86.tileloadd64", none, I8(4 + row), at, stride)
            for row, p, number in numbers:
                self.call(f"llvm.x86.{name}", none, number, I8(4 + row), I8(6 + p))
        for row, p, number in numbers:
            self.call("llvm.x86.tilestored64", none, number, builder.gep(out, [I64(64 * TILE * (2 * p + row))]), line)

    def columns(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """The columns of a square of WIDE vectors."""
        rows = list(rows)
        for bit in (1, 2, 4, 8):
            # rows whose numbers differ in a bit exchange the lanes whose numbers do
            low = [lane if not lane & bit else lane - bit + WIDE for lane in range(WIDE)]
            high = [lane + bit if not lane & bit else lane + WIDE for lane in range(WIDE)]
            turned = list(rows)
            for i in range(WIDE):
                if not i & bit:
                    a, b = rows[i], rows[i + bit]
                    turned[i] = self.builder.shuffle_vector(a, b, self.constant(I32, low))
                    turned[i + bit] = self.builder.shuffle_vector(a, b, self.constant(I32, high))
            rows = turned
        return rows


def emitted(fixed: Sequence[Any], numbers: int, emit: Callable[..., None]) -> tuple[Any, Callable[..., Any]]:
    """What an intrinsic returns that takes tuples, whose lengths are constants, and ``numbers`` integers."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> Any:
        emit(Dots(builder), *arguments[len(fixed) :])
        return context.get_dummy_value()

    return types.void(*fixed, *[types.int64] * numbers), generate


@intrinsic
def begin_panels(typingctx, kind):  # type: ignore[no-untyped-def]
    """Before a thread's first ``dot_panels``: AMX registers of 16 rows of 64 bytes."""

    def emit(v: Dots) -> None:
        if chosen(kind) != "amx":
            return
        layout = cgutils.alloca_once(v.builder, I8, size=I64(64))
        # a palette, 15 bytes of other things, bytes per row of 16 registers in two bytes each, rows of each
        octets = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [16] * 8 + [0] * 8
        v.store(v.constant(I8, octets), layout, I64(0))
        v.call("llvm.x86.ldtilecfg", ir.VoidType(), layout)

    return emitted((kind,), 0, emit)


@intrinsic
def end_panels(typingctx, kind):  # type: ignore[no-untyped-def]
    """After a thread's last ``dot_panels``: AMX registers are given back."""

    def emit(v: Dots) -> None:
        if chosen(kind) == "amx":
            v.call("llvm.x86.tilerelease", ir.VoidType())

    return emitted((kind,), 0, emit)
