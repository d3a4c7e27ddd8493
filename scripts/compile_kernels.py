"""Compile the Triton kernels ahead of time, for GPUs that need not be there, and print what they use.

``python scripts/compile_kernels.py [--fan-in 2 6 8] [--targets sm_80 sm_90 gfx942] [--kernels interpolate.evaluate]``

Of each kernel of nodes the block with the most samples per thread is compiled, for every kind of launch: float32 and
bfloat16, with and without flips, inputs routed already, batches of odd sizes. Of products with ternary weights it is
the block that needs the most registers, for each type of activations. Nothing comes from Triton's cache. The exit
status is 1 if registers are spilled, or if bytes are not multiplied by the instructions for matrices of integers. With
``--write`` the tables of the kernels that were compiled replace those in ``docs/kernels.md``.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

TARGETS = ["sm_80", "sm_90", "gfx942"]
# and what makes another kernel of each
KERNELS = {
    "interpolate.evaluate": ("flips", "routed"),
    "interpolate.differentiate_inputs": ("flips", "routed"),
    "interpolate.sum_inputs": (),
    "interpolate.differentiate_table": ("flips", "routed"),
    "lookup.evaluate": ("flips", "routed"),
    "lookup.differentiate_inputs": ("routed",),
    "lookup.differentiate_table": (),
}
LAUNCHES: dict[str, dict[str, Any]] = {
    "fp32": {"flips": False},
    "fp32 flips": {},
    "bf16": {"dtype": "bf16", "flips": False},
    "bf16 flips": {"dtype": "bf16"},
    "routed": {"wired": False},
    "odd": {"odd": True},
}
# of products with ternary weights, which have no nodes: the launches of each
PRODUCTS = {
    "ternary_linear.round_values": ("fp32",),
    "ternary_linear.multiply": ("int8", "fp16", "int8 skew"),
    "ternary_linear.multiply_floats": ("fp32",),
    "ternary_linear.multiply_one": ("int8", "fp16", "fp32"),
    "ternary_linear.convolve": ("int8", "fp16", "int8 skew"),
    "ternary_linear.convolve_floats": ("fp32",),
}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "int8": {"operand": "i8"},
    "int8 skew": {"operand": "i8", "skew": True},
    "fp16": {"operand": "fp16"},
    "fp32": {"operand": "fp32"},
}
# instructions that multiply matrices, and kernels whose bytes must be multiplied by those for integers
MATRIX = re.compile(r"(?:wg)?mma\.\S+\.(?:s32|f32)\.\w+|v_mfma_\w+")
INTEGER = re.compile(r"s32\.s8|_i32_\w+_i8")
MATRICES = ("ternary_linear.multiply", "ternary_linear.convolve")
PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"

# of an H100 SXM, from its data sheet: bytes and fused multiply-adds per second
BANDWIDTH, RATE = 3.35e12, 33.5e12
# what the estimate is for
INPUTS, NODES = 1568, 2000
# entries of a table gradient per program
TILE = 64


class Row(NamedTuple):
    """A compiled kernel."""

    kernel: str
    n: int
    # 0 of products

    launch: str
    target: str
    block: str
    # samples of a node, or tokens, outputs and inputs of a step

    warps: int
    registers: int
    spilled: int
    shared: int
    instruction: str = ""
    # that multiplies matrices

    def __str__(self) -> str:
        fan_in = [f"n={self.n}"] if self.n else []
        return " ".join([self.kernel, *fan_in, self.launch, self.target])


def main() -> None:
    """Compile, print, and fail if anything is spilled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fan-in", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=[*KERNELS, *PRODUCTS], default=[*KERNELS, *PRODUCTS])
    launches = list(dict.fromkeys([*LAUNCHES, *ACTIVATIONS]))
    parser.add_argument("--launches", nargs="+", choices=launches, default=launches)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.parent.name}/{PAGE.name}")
    arguments = parser.parse_args()
    # read by triton at its import: an interpreter compiles nothing
    os.environ["TRITON_INTERPRET"] = "0"
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # the longest first, so that no process is left with them alone
        tasks = [
            (kernel, n, launch, target)
            for n in sorted(arguments.fan_in, reverse=True)
            for kernel, launch in itertools.product(arguments.kernels, arguments.launches)
            if kernel in KERNELS and differs(kernel, launch)
            for target in arguments.targets
        ]
        tasks += [
            (kernel, 0, launch, target)
            for kernel, launch in itertools.product(arguments.kernels, arguments.launches)
            if launch in PRODUCTS.get(kernel, ())
            for target in arguments.targets
        ]
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(measure, *zip(*tasks, strict=True)))
    show(rows)
    print(f"{len(rows)} kernels in {time.perf_counter() - begin:.0f} s")
    if arguments.write:
        write(tables(rows))
    fail_on_spills(rows)
    fail_without_integers(rows)


def fail_on_spills(rows: list[Row]) -> None:
    """Leave with status 1, naming the kernels, if any keeps registers in memory."""
    spilled = [row for row in rows if row.spilled]
    if spilled:
        sys.exit("spilled registers: " + ", ".join(f"{row}: {row.spilled} bytes" for row in spilled))


def fail_without_integers(rows: list[Row]) -> None:
    """Leave with status 1, naming the kernels, if any multiplies bytes without the instructions that there are."""
    bytewise = (row for row in rows if row.kernel in MATRICES and row.launch.startswith("int8"))
    found = [f"{row}: {row.instruction or 'none'}" for row in bytewise if not INTEGER.search(row.instruction)]
    if found:
        sys.exit("bytes are not multiplied as integers: " + ", ".join(found))


def differs(kernel: str, launch: str) -> bool:
    """Whether a kernel is compiled for a kind of launch, or one for another kind is the same."""
    return launch in LAUNCHES and all(word in KERNELS[kernel] for word in ("flips", "routed") if word in launch)


def measure(kernel: str, n: int, launch: str, target: str) -> Row:
    """Compile one kernel for one target."""
    from difflut_lab.ops.dot import triton as dot
    from difflut_lab.ops.kernel import triton as nodes

    op, _, name = kernel.partition(".")
    tuned = getattr(importlib.import_module(f"difflut_lab.ops.{op}.triton"), name)
    if n:
        use = nodes.compile_ahead(tuned, target, n, nodes.Launch(**LAUNCHES[launch]))
        return Row(kernel, n, launch, target, str(use.samples), *use[1:])
    block, warps, binary = dot.compile_ahead(tuned, target, dot.Launch(**ACTIVATIONS[launch]))
    found = MATRIX.search(binary.assembly)
    return Row(kernel, n, launch, target, block, warps, *binary[:3], found[0] if found else "")


def show(rows: list[Row]) -> None:
    """Print a table."""
    table = Table(
        Column("kernel", no_wrap=True),
        "n",
        "launch",
        "target",
        "block",
        "warps",
        "registers",
        "spilled",
        "shared bytes",
    )
    for row in rows:
        table.add_row(row.kernel, str(row.n or ""), *map(str, row[2:-1]))
    # a log has no width of its own
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def tables(rows: list[Row]) -> dict[str, str]:
    """The tables of ``docs/kernels.md`` that the compiled kernels are in, by name."""
    found: dict[str, str] = {}
    nodes = sorted((row for row in rows if row.n), key=lambda row: (row.n, list(KERNELS).index(row.kernel)))
    if nodes:
        found |= {"resources": resources(nodes), "limits": limits(sorted({row.n for row in nodes}))}
    dots = sorted((row for row in rows if not row.n), key=lambda row: list(PRODUCTS).index(row.kernel))
    return found | ({"products": products(dots)} if dots else {})


def resources(rows: list[Row]) -> str:
    """A line per kernel and fan-in, with flips if it has any."""
    rows = [row for row in rows if row.launch == ("fp32 flips" if differs(row.kernel, "fp32 flips") else "fp32")]
    return uses("n", "samples", [(str(row.n), row) for row in rows])


def products(rows: list[Row]) -> str:
    """A line per kernel and launch."""
    return uses("activations", "tokens x outputs x inputs", [(row.launch, row) for row in rows])


def uses(kind: str, block: str, rows: list[tuple[str, Row]]) -> str:
    """A line per kernel and kind, as rows are told apart; a column per target."""
    targets = list(dict.fromkeys(row.target for _, row in rows))
    lines = [f"| kernel | {kind} | {block} | warps | {' | '.join(targets)} |", "|---" * (4 + len(targets)) + "|"]
    kinds: dict[tuple[str, str], dict[str, Row]] = {}
    for value, row in rows:
        kinds.setdefault((row.kernel, value), {})[row.target] = row
    for (kernel, value), found in kinds.items():
        use = next(iter(found.values()))
        cells = [f"{found[target].registers}, {found[target].spilled}, {found[target].shared}" for target in targets]
        lines.append(f"| `{kernel}` | {value} | {use.block} | {use.warps} | {' | '.join(cells)} |")
    return "\n".join([f"With triton {version('triton')}:", "", *lines])


def limits(fan_ins: list[int]) -> str:
    """Operations and bytes of a sample and a node, against the least that any kernel needs."""
    lines = [
        "| kernel | n | operations | least | bytes requested | bytes, least | limit by | ps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n in fan_ins:
        for kernel, (operations, fewest, requested, least) in estimate(n).items():
            times = {"arithmetic": operations / RATE, "memory": least / BANDWIDTH}
            slower = max(times, key=lambda name: times[name])
            cells = [f"{operations}", f"{fewest}", f"{requested:.1f}", f"{least:.1f}", slower]
            lines.append(f"| `{kernel}` | {n} | {' | '.join(cells)} | {times[slower] * 1e12:.2f} |")
    return "\n".join(lines)


def estimate(n: int) -> dict[str, tuple[int, int, float, float]]:
    """Operations, the fewest possible, bytes requested and the fewest that must come from memory."""
    low, high, entries = 1 << n // 2, 1 << n - n // 2, 1 << n
    products = 2 * (low - 1) + 2 * (high - 1)
    folds = 3 * (low - 1) + 3 * (high - 1)
    # an input that is read once, as a share of a node's bytes
    once = 4 * INPUTS / NODES
    tiles = max(1, entries // TILE)
    return {
        "interpolate.evaluate": (products + entries + high, entries, 4 * n + 4, once + 4),
        "interpolate.differentiate_inputs": (
            products + 2 * entries + 2 * high + folds + n,
            entries,
            12 * n + 4 + 2 * once,
            2 * once + 4,
        ),
        "interpolate.differentiate_table": (
            tiles * (products + high) + entries,
            entries,
            tiles * (4 * n + 4),
            once + 4,
        ),
        "lookup.evaluate": (3 * n + 1, n, 4 * n + 5 + 4, once + 5),
        "lookup.differentiate_inputs": (n, n, 9 * n + once, once + 5),
        "lookup.differentiate_table": (2 * entries, 1, tiles * 5, 5),
    }


def write(tables: dict[str, str]) -> None:
    """Replace what stands between the markers of each table."""
    text = PAGE.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = head + begin + table + end + tail
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
