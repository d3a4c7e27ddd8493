"""Products of packed codes with rows of bytes or floats, as intrinsics.

Shape letters: M tokens, K inputs of an output, W words that K codes take, O outputs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from difflut_lab.ops.dot.cpu import (
    DIGITS,
    INTEGERS,
    PANELS,
    REALS,
    TILE,
    WIDE,
    ZEROS,
    Dots,
    chosen,
    emitted,
    rows_at_once,
)
from difflut_lab.ops.kernel.cpu import FLOAT, I8, I32, I64, intrinsic

# outputs that share a pass over the activations
ROWS = 4
ROW = ir.VectorType(FLOAT, ROWS)
# measured: without asking for words of the next blocks, a product with one token takes twice as long
AHEAD = 2 * ROWS


def behind(v: Dots, row: ir.Value, stride: ir.Value, lanes: int) -> tuple[ir.Value, ir.Value]:
    """A token's sum of levels and its step, from the end of its row, in all lanes."""
    end = v.builder.gep(row, [v.builder.sub(stride, I64(64))])
    step = v.builder.load(v.builder.bitcast(end, FLOAT.as_pointer()))
    total = v.builder.load(v.builder.bitcast(v.builder.gep(end, [I64(4)]), I32.as_pointer()))
    return v.splat(total, lanes), v.splat(step, lanes)


@intrinsic
def round_row(typingctx, by_shift, row, count, out, length):  # type: ignore[no-untyped-def]
    """A token's levels, ``round(row / step)``, as bytes, then their step and their sum.

    Parameters
    ----------
    by_shift : tuple
        Empty where four bytes belong to one shift of one word; else 64 bytes belong to one shift of 16 words.
    row : int
        Address of floats.
    count : int
    out : int
        Address of ``length`` bytes for levels, zeros behind the last, and 8 bytes.
    length : int
        Levels padded to a multiple of 64, or of 256 where they lie by shift.
    """

    def emit(v: Dots, row: Any, count: Any, out: Any, length: Any) -> None:
        builder = v.builder
        row, out = v.pointer(row), v.pointer(out, I8)
        step = v.step(v.largest(row, count))
        end = 256 if by_shift.count else 64
        for byte in range(0, end, 64):
            v.store(ir.Constant(INTEGERS, None), out, builder.add(builder.sub(length, I64(end)), I64(byte)))
        turned = [4 * b + shift for shift in range(4) for b in range(4)]

        def put(levels: ir.Value, at: ir.Value) -> None:
            octets = builder.trunc(levels, ir.VectorType(I8, WIDE))
            octets = builder.shuffle_vector(octets, octets, v.constant(I32, turned))
            if not by_shift.count:
                v.store(octets, out, at)
                return
            words = builder.bitcast(octets, ir.VectorType(I32, 4))
            first = builder.add(builder.and_(at, I64(-256)), builder.lshr(builder.and_(at, I64(255)), I64(2)))
            for shift in range(4):
                place = builder.bitcast(builder.gep(out, [builder.add(first, I64(64 * shift))]), I32.as_pointer())
                builder.store(builder.extract_element(words, I32(shift)), place)

        total = v.round(row, count, step, put)
        behind = [builder.gep(out, [builder.add(length, I64(place))]) for place in (0, 4)]
        builder.store(step, builder.bitcast(behind[0], FLOAT.as_pointer()))
        builder.store(total, builder.bitcast(behind[1], I32.as_pointer()))

    return emitted((by_shift,), 4, emit)


@intrinsic
def dot_rows(  # type: ignore[no-untyped-def]
    typingctx, kind, tokens, skewed, codes, first, outputs, width, levels, stride, scale, skew, bias, y, wanted
):
    """Outputs of ROWS rows of codes, from ``first`` on, for a few tokens, straight from words.

    Parameters
    ----------
    kind, tokens, skewed : tuple
        Of lengths that say the kind, how many tokens, and whether there is a skew.
    codes : int
        Address of int32 ``(outputs, width)``.
    first, outputs, width : int
    levels, stride : int
        Address of the first token's bytes, laid out by shift, and bytes of each token.
    scale, skew, bias : int
        Addresses of ``(outputs,)``.
    y : int
        Address of ``(wanted, outputs)``.
    wanted : int
        Tokens that are written, at most as many as are computed.
    """
    name, count = chosen(kind), tokens.count

    def emit(
        v: Dots,
        codes: Any,
        first: Any,
        outputs: Any,
        width: Any,
        levels: Any,
        stride: Any,
        scale: Any,
        skew: Any,
        bias: Any,
        y: Any,
        wanted: Any,
    ) -> None:
        builder = v.builder
        codes, levels = v.pointer(codes, I32), v.pointer(levels, I8)
        scale, skew, bias, y = (v.pointer(address) for address in (scale, skew, bias, y))
        rows = [v.row(codes, first, r, outputs, width) for r in range(ROWS)]
        inputs = [builder.gep(levels, [builder.mul(stride, I64(t))]) for t in range(count)]
        masks = (DIGITS, ZEROS) if skewed.count else (DIGITS,)
        totals = [v.variables(INTEGERS, ROWS * count) for _ in masks]
        with v.loop(width, WIDE) as (at, _):
            words = [v.first(row, at, builder.sub(width, at), INTEGERS) for row in rows]
            for row in rows:
                v.prefetch(row, at, builder.mul(width, I64(AHEAD)))
            for shift in range(4):
                place = builder.add(builder.shl(at, I64(4)), I64(4 * WIDE * shift))
                octets = [v.load(source, place, INTEGERS) for source in inputs]
                for mask, sums in zip(masks, totals, strict=True):
                    for r in range(ROWS):
                        digits = v.digits(words[r], shift, mask)
                        for t in range(count):
                            total = sums[ROWS * t + r]
                            builder.store(v.accumulate(name, builder.load(total), digits, octets[t]), total)
        results = [v.sums([builder.load(total) for total in sums]) for sums in totals]
        left = builder.sub(outputs, first)
        factors = [v.first(values, first, left, ROW) for values in (scale, skew, bias)[:: 1 if skewed.count else 2]]
        for t, source in enumerate(inputs):
            with builder.if_then(builder.icmp_signed("<", I64(t), wanted)):
                parts = [v.part(result, ROWS * t, ROWS) for result in results]
                value = v.finish(parts, *behind(v, source, stride, ROWS), factors)
                v.put(value, y, builder.add(builder.mul(outputs, I64(t)), first), left)

    return emitted((kind, tokens, skewed), 11, emit)


@intrinsic
def weigh_rows(typingctx, tokens, tables, codes, first, outputs, width, x, bias, y, wanted):  # type: ignore[no-untyped-def]
    """Outputs of ROWS rows of codes for a few tokens of floats.

    Parameters
    ----------
    tokens : tuple
        Its length says how many.
    tables : int
        Address of each output's weights by digit, ``(outputs, 4)``.
    codes, first, outputs, width
        As of ``dot_rows``.
    x : int
        Address of the first token's floats, ``16 * width`` each.
    bias, y, wanted
        As of ``dot_rows``.
    """
    count = tokens.count

    def emit(
        v: Dots,
        tables: Any,
        codes: Any,
        first: Any,
        outputs: Any,
        width: Any,
        x: Any,
        bias: Any,
        y: Any,
        wanted: Any,
    ) -> None:
        builder = v.builder
        codes, tables, x, bias, y = v.pointer(codes, I32), *(v.pointer(address) for address in (tables, x, bias, y))
        shifts = v.constant(I32, range(0, 2 * WIDE, 2))
        rows = [v.row(codes, first, r, outputs, width) for r in range(ROWS)]
        weights = [v.table(v.row(tables, first, r, outputs, I64(4))) for r in range(ROWS)]
        inputs = [builder.gep(x, [builder.mul(builder.shl(width, I64(4)), I64(t))]) for t in range(count)]
        totals = v.variables(REALS, ROWS * count)
        with v.loop(width) as (at, _):
            values = [v.load(source, builder.shl(at, I64(4)), REALS) for source in inputs]
            for r in range(ROWS):
                v.prefetch(rows[r], at, builder.mul(width, I64(AHEAD)))
                word = v.splat(builder.load(builder.gep(rows[r], [at])), WIDE)
                weight = v.weights(weights[r], builder.lshr(word, shifts))
                for t in range(count):
                    total = totals[ROWS * t + r]
                    more = v.call(f"llvm.fmuladd.v{WIDE}f32", REALS, weight, values[t], builder.load(total))
                    builder.store(more, total)
        result = v.sums([builder.load(total) for total in totals])
        left = builder.sub(outputs, first)
        offset = v.first(bias, first, left, ROW)
        for t in range(count):
            with builder.if_then(builder.icmp_signed("<", I64(t), wanted)):
                value = builder.fadd(v.part(result, ROWS * t, ROWS), offset)
                v.put(value, y, builder.add(builder.mul(outputs, I64(t)), first), left)

    return emitted((tokens,), 9, emit)


@intrinsic
def weigh(typingctx, tables, codes, row, width, out):  # type: ignore[no-untyped-def]
    """The weights of a row of codes as floats, 16 for each of its words."""

    def emit(v: Dots, tables: Any, codes: Any, row: Any, width: Any, out: Any) -> None:
        builder = v.builder
        codes, out = v.pointer(codes, I32), v.pointer(out)
        table = v.table(builder.gep(v.pointer(tables), [builder.shl(row, I64(2))]))
        source = builder.gep(codes, [builder.mul(row, width)])
        shifts = v.constant(I32, range(0, 2 * WIDE, 2))
        with v.loop(width) as (at, _):
            word = v.splat(builder.load(builder.gep(source, [at])), WIDE)
            v.store(v.weights(table, builder.lshr(word, shifts)), out, builder.shl(at, I64(4)))

    return emitted((), 5, emit)


@intrinsic
def make_panel(typingctx, zeros, codes, first, outputs, width, out):  # type: ignore[no-untyped-def]
    """Digits of TILE rows, from ``first`` on: 64 bytes for each word and shift, four of each row.

    ``zeros`` is not empty where 1 is wanted for codes 0, and 0 for others. ``out`` has room for whole runs of WIDE
    words.
    """

    def emit(v: Dots, codes: Any, first: Any, outputs: Any, width: Any, out: Any) -> None:
        builder = v.builder
        codes, out = v.pointer(codes, I32), v.pointer(out, I32)
        with v.loop(width, WIDE) as (at, _):
            words = []
            for r in range(TILE):
                source = v.row(codes, first, r, outputs, width)
                v.prefetch(source, at, builder.mul(width, I64(PANELS * TILE)))
                words.append(v.first(source, at, builder.sub(width, at), INTEGERS))
            for index, column in enumerate(v.columns(words)):
                for shift in range(4):
                    place = builder.add(builder.shl(at, I64(6)), I64((4 * index + shift) * WIDE))
                    v.store(v.digits(column, shift, ZEROS if zeros.count else DIGITS), out, place)

    return emitted((zeros,), 5, emit)


@intrinsic
def dot_panels(typingctx, kind, unsigned, panels, size, rows, stride, wanted, chunks, out):  # type: ignore[no-untyped-def]
    """Products of PANELS panels with rows: int32 ``(PANELS, 2 * TILE, TILE)``.

    Parameters
    ----------
    kind : tuple
        Its length says which. ``rows_at_once`` of them are computed, with AMX at most TILE where no more are wanted.
    unsigned : tuple
        Empty where panels hold digits and rows levels, not empty for the reverse.
    panels, size : int
        Address of the first panel, four bytes of each column after another, and bytes of each.
    rows, stride : int
        Address of the first row, and bytes of each.
    wanted : int
        Rows.
    chunks : int
        Sixty-four bytes each, of a row.
    out : int
        Address of the sums.
    """
    name = chosen(kind)

    def emit(v: Dots, panels: Any, size: Any, rows: Any, stride: Any, wanted: Any, chunks: Any, out: Any) -> None:
        builder = v.builder
        panels, rows, out = (v.pointer(address, I8) for address in (panels, rows, out))
        columns = [builder.gep(panels, [builder.mul(size, I64(p))]) for p in range(PANELS)]
        if name == "amx":
            instruction = "tdpbusd" if unsigned.count else "tdpbsud"
            blocks = [rows, builder.gep(rows, [builder.mul(stride, I64(TILE))])]
            with builder.if_else(builder.icmp_signed(">", wanted, I64(TILE))) as (two, one):
                with two:
                    v.tiles(instruction, blocks, stride, columns, chunks, out)
                with one:
                    v.tiles(instruction, blocks[:1], stride, columns, chunks, out)
            return
        count = rows_at_once(name)
        totals = v.variables(INTEGERS, PANELS * count)
        sources = [builder.gep(rows, [builder.mul(stride, I64(r))]) for r in range(count)]
        with v.loop(builder.shl(chunks, I64(4))) as (four, _):
            fours = [v.load(column, builder.shl(four, I64(6)), INTEGERS) for column in columns]
            for r, source in enumerate(sources):
                at = builder.bitcast(builder.gep(source, [builder.shl(four, I64(2))]), I32.as_pointer())
                value = v.splat(builder.load(at), WIDE)
                for p, column in enumerate(fours):
                    total = totals[p * count + r]
                    pair = (value, column) if unsigned.count else (column, value)
                    builder.store(v.accumulate(name, builder.load(total), *pair), total)
        for p in range(PANELS):
            for r in range(count):
                v.store(builder.load(totals[p * count + r]), out, I64(64 * (2 * TILE * p + r)))

    return emitted((kind, unsigned), 7, emit)


@intrinsic
def await_outputs(typingctx, y, outputs, tokens):  # type: ignore[no-untyped-def]
    """Ask for the memory of a block of panels, at an address of ``(tokens, outputs)``, before it is written."""

    def emit(v: Dots, y: Any, outputs: Any, tokens: Any) -> None:
        y = v.pointer(y)
        with v.loop(tokens) as (t, _):
            for p in range(PANELS):
                v.prefetch(y, v.builder.mul(t, outputs), I64(TILE * p), write=True)

    return emitted((), 3, emit)


@intrinsic
def finish(typingctx, skewed, sums, zeros, tokens, levels, stride, scale, skew, bias, y, first, outputs):  # type: ignore[no-untyped-def]
    """Outputs of a block of panels.

    Parameters
    ----------
    skewed : tuple
        Empty where there is no skew.
    sums, zeros : int
        Addresses of products with digits and of sums where codes are 0, made by ``dot_panels``.
    tokens : int
    levels, stride : int
        Address of the first token's bytes, and bytes of each token.
    scale, skew, bias : int
        Addresses of ``(outputs,)``.
    y : int
        Address of ``(tokens, outputs)``.
    first, outputs : int
        The block's first, and how many there are.
    """

    def emit(
        v: Dots,
        sums: Any,
        zeros: Any,
        tokens: Any,
        levels: Any,
        stride: Any,
        scale: Any,
        skew: Any,
        bias: Any,
        y: Any,
        first: Any,
        outputs: Any,
    ) -> None:
        builder = v.builder
        sources = [v.pointer(address, I32) for address in (sums, zeros)[: 1 + skewed.count]]
        levels = v.pointer(levels, I8)
        scale, skew, bias, y = (v.pointer(address) for address in (scale, skew, bias, y))
        for p in range(PANELS):
            begin = builder.add(first, I64(TILE * p))
            left = builder.sub(outputs, begin)
            factors = [
                v.first(values, begin, left, REALS) for values in (scale, skew, bias)[:: 1 if skewed.count else 2]
            ]
            with v.loop(tokens) as (t, _):
                place = builder.add(builder.shl(t, I64(TILE.bit_length() - 1)), I64(2 * TILE * TILE * p))
                token = behind(v, builder.gep(levels, [builder.mul(t, stride)]), stride, WIDE)
                value = v.finish([v.load(source, place, INTEGERS) for source in sources], *token, factors)
                v.put(value, y, builder.add(builder.mul(t, outputs), begin), left)

    return emitted((skewed,), 11, emit)
