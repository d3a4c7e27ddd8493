"""Compile the Triton kernels ahead of time, for GPUs that need not be there, and print what they use.

``python scripts/compile_kernels.py [--fan-in 2 6 8] [--targets sm_80 sm_90 gfx942] [--kernels interpolate.evaluate]``

Of each kernel the block with the most samples per thread is compiled, for every kind of launch: float32 and bfloat16,
with and without flips, inputs routed already, batches of odd sizes. Nothing comes from Triton's cache. The exit status
is 1 if registers are spilled. With ``--write`` the tables replace those in ``docs/kernels.md``.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import os
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
    launch: str
    target: str
    samples: int
    warps: int
    registers: int
    spilled: int
    shared: int


def main() -> None:
    """Compile, print, and fail if anything is spilled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fan-in", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
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
            if differs(kernel, launch)
            for target in arguments.targets
        ]
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
            rows = list(pool.map(measure, *zip(*tasks, strict=True)))
    show(rows)
    print(f"{len(rows)} kernels in {time.perf_counter() - begin:.0f} s")
    if arguments.write:
        rows.sort(key=lambda row: (row.n, list(KERNELS).index(row.kernel)))
        write({"resources": resources(rows), "limits": limits(sorted(arguments.fan_in))})
    fail_on_spills(rows)


def fail_on_spills(rows: list[Row]) -> None:
    """Leave with status 1, naming the kernels, if any keeps registers in memory."""
    spilled = [row for row in rows if row.spilled]
    if spilled:
        found = (f"{row.kernel} n={row.n} {row.launch} {row.target}: {row.spilled} bytes" for row in spilled)
        sys.exit("spilled registers: " + ", ".join(found))


def differs(kernel: str, launch: str) -> bool:
    """Whether a kernel is compiled for a kind of launch, or one for another kind is the same."""
    return all(word in KERNELS[kernel] for word in ("flips", "routed") if word in launch)


def measure(kernel: str, n: int, launch: str, target: str) -> Row:
    """Compile one kernel for one target."""
    from difflut_lab.ops.kernel.triton import Launch, compile_ahead

    op, _, name = kernel.partition(".")
    tuned = getattr(importlib.import_module(f"difflut_lab.ops.{op}.triton"), name)
    return Row(kernel, n, launch, target, *compile_ahead(tuned, target, n, Launch(**LAUNCHES[launch])))


def show(rows: list[Row]) -> None:
    """Print a table."""
    table = Table(
        Column("kernel", no_wrap=True),
        "n",
        "launch",
        "target",
        "samples",
        "warps",
        "registers",
        "spilled",
        "shared bytes",
    )
    for row in rows:
        table.add_row(*map(str, row))
    # a log has no width of its own
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def resources(rows: list[Row]) -> str:
    """The table of ``docs/kernels.md``: a row per kernel and fan-in, with flips if it has any; a column per target."""
    rows = [row for row in rows if row.launch == ("fp32 flips" if differs(row.kernel, "fp32 flips") else "fp32")]
    targets = list(dict.fromkeys(row.target for row in rows))
    lines = [f"| kernel | n | samples | warps | {' | '.join(targets)} |", "|---" * (4 + len(targets)) + "|"]
    for kernel, n in dict.fromkeys((row.kernel, row.n) for row in rows):
        uses = {row.target: row for row in rows if (row.kernel, row.n) == (kernel, n)}
        use = next(iter(uses.values()))
        cells = [f"{uses[target].registers}, {uses[target].spilled}, {uses[target].shared}" for target in targets]
        lines.append(f"| `{kernel}` | {n} | {use.samples} | {use.warps} | {' | '.join(cells)} |")
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
