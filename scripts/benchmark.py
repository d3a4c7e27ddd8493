"""Times of ops, layers, training steps and packed layers: ``make bench``, or ``scripts/benchmark.py --batch 128``.

Every row has the median of repeated runs with the 20 % and 80 % quantiles, for forward, backward and both. The backends
of this package and, where they are installed, other libraries take turns run by run, in one process. With one thread
the times are CPU time, which other programs on the machine do not lengthen much; with more they are the wall clock's.
On a GPU, events on its stream are timed, and its cache is cleared before every run.

*speed-up* is the reference's median divided by the row's, *slow-down* (in the tables: / cpu) the row's divided by that
of the fast backend.

*peak MiB* is what tensors took at most beyond what they took before the forward. On a CPU it is the sum of what torch's
allocator gave and got back, from torch.profiler in a run of its own, without the scratch memory (some KiB) inside of
compiled kernels; on a GPU the change of ``torch.cuda.max_memory_allocated``. *saved MiB* is what autograd keeps from
the forward for the backward, every storage once, inputs and parameters included.

Shares are of the machine's own limits, measured at the start of the same run: the least operations of the split form,
and the bytes of every tensor read or written once (``benchmark_cases.py`` has the formulas), per second of the median,
divided by the rate of multiply-adds, and of a copy of a large tensor. What stays in a cache may exceed the latter. The
tables show the larger share.

The number of runs follows the time that is left: some ten minutes in all with the default sizes, half a minute with
--quick. Tables are printed; benchmark.csv, benchmark.png and machine.json go to outputs/benchmarks/<time>.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

# read by torch's profiler at its import: it would report every start and stop
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# large tensors in huge pages, as in a training
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from benchmark_cases import GROUPS, Case, Sizes, cases, find_peers, packed_cases
from benchmark_limits import Limits, measure_limits
from benchmark_measure import BACKENDS, Row, measure
from benchmark_report import plot, tabulate
from rich.console import Console
from rich.progress import Progress

import difflut_lab
from difflut_lab.ops.dispatch import VARIABLE
from difflut_lab.ops.shapes import MAX_FAN_IN
from difflut_lab.training.paths import claim, git_revision, write_json

SECONDS, QUICK_SECONDS = 540.0, 20.0
PACKAGES = ("torch", "triton", "numba", "numpy", "torchlogix", "difflogic", "torch_dwn")


class Parser(argparse.ArgumentParser):
    """Tells an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"Error: {message}\n")


def main(words: Sequence[str] | None = None) -> Path:
    """Measure, print and write.

    Parameters
    ----------
    words : sequence of str, optional
        The command line; that of the process by default.

    Returns
    -------
    Path
        The directory of the results.
    """
    options = parse(words)
    # in the tables a backend that declines has no row, and a line at the end
    log = logging.getLogger("difflut_lab")
    threads, kernels, level = torch.get_num_threads(), os.environ.get(VARIABLE), log.level
    log.setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    try:
        return run(options)
    finally:
        log.setLevel(level)
        torch.set_num_threads(threads)
        os.environ.pop(VARIABLE, None)
        if kernels is not None:
            os.environ[VARIABLE] = kernels


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="default: 32 128 1024")
    parser.add_argument("--fan-in", type=int, nargs="+", metavar="n", help="inputs per node; default: 2 4 6")
    parser.add_argument("--inputs", type=int, default=1568, metavar="F", help="inputs of a layer; default: 1568")
    parser.add_argument("--nodes", type=int, default=2000, metavar="N", help="nodes of a layer; default: 2000")
    parser.add_argument("--runs", type=int, default=30, help="at most so many of each; default: 30")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--device", choices=sorted(BACKENDS), default="cpu", help="default: cpu")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="batch 32, n 2 and 6, fewer runs: half a minute")
    options = parser.parse_args(words)
    options.batch = options.batch or ([32] if options.quick else [32, 128, 1024])
    options.fan_in = options.fan_in or ([2, 6] if options.quick else [2, 4, 6])
    for name in ("batch", "inputs", "nodes", "runs", "threads"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name}: must be at least 1.")
    if options.inputs % 2:
        parser.error(f"--inputs {options.inputs}: must be even, for two bits per feature.")
    most = min(MAX_FAN_IN, options.inputs)
    if not all(1 <= n <= most for n in options.fan_in):
        parser.error(f"--fan-in {' '.join(map(str, options.fan_in))}: must be from 1 to {most}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU.")
    return options


def run(options: argparse.Namespace) -> Path:
    """Measure all that the options ask for, print the tables, and write the results to a directory of their own."""
    # a file gets lines that are easily read
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    peers, missing = find_peers()
    notes = [f"not compared with {line}" for line in missing]
    limits = measure_limits(options.device)
    machine = describe(options, limits)
    headline = (
        f"{machine['processor']}, {options.threads} of {machine['cores']} cores, "
        + ", ".join(f"{name} {machine[name]}" for name in PACKAGES if machine[name])
        + ", float32"
    )
    console.print(headline, f"limits: {limits}", sep="\n")
    torch.manual_seed(0)
    plan: list[tuple[Sizes, Case]] = []
    for batch, n in product(dict.fromkeys(options.batch), dict.fromkeys(options.fan_in)):
        sizes = Sizes(batch=batch, inputs=options.inputs, nodes=options.nodes, n=n, device=options.device)
        plan += ((sizes, case) for case in cases(sizes, options.only, peers, options.quick))
    if "packed" in options.only:
        plan += packed_cases(options.device)
    rows: list[Row] = []
    block: list[Row] = []
    end = time.perf_counter() + (QUICK_SECONDS if options.quick else SECONDS)
    # drawn when it changes: a thread that draws it meanwhile would take time from what is measured
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(plan))
        for index, (sizes, case) in enumerate(plan):
            label = f"{case.what}, {sizes}"
            progress.update(task, completed=index, description=label, refresh=True)
            share = max(0.0, end - time.perf_counter()) / (len(plan) - index)
            block += measure(case, sizes, options.runs, share, limits, notes)
            if index + 1 == len(plan) or plan[index + 1][0] != sizes:
                console.print(tabulate(block, sizes, machine["clock"]))
                rows += block
                block = []
    directory = Path(claim(f"outputs/benchmarks/{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    with open(directory / "benchmark.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    drawn = [row for row in rows if row["group"] != "packed"]
    if drawn and importlib.util.find_spec("matplotlib") is None:
        notes.append("no plot: matplotlib is not installed; pip install -e '.[bench]' installs it")
    elif drawn:
        title = f"{headline}; {options.inputs} inputs, {options.nodes} nodes; {machine['clock']}"
        plot(drawn, title, directory / "benchmark.png")
    write_json(directory / "machine.json", machine | {"notes": notes})
    for note in notes:
        console.print(note, markup=False)
    console.print(str(directory), soft_wrap=True)
    return directory


def describe(options: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """What the times are of: machine, versions, options and limits."""
    machine: dict[str, Any] = {
        "time": datetime.now().isoformat(timespec="seconds"),
        "processor": processor(options.device),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "clock": "GPU time" if options.device == "cuda" else "CPU time" if options.threads == 1 else "wall time",
        "system": platform.platform(),
        "python": platform.python_version(),
        "difflut_lab": difflut_lab.__version__,
        "revision": git_revision(),
    }
    for name in PACKAGES:
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = None
    # with the build
    machine["torch"] = str(torch.__version__)
    return machine | {"options": vars(options), "limits": asdict(limits)}


def processor(device: str) -> str:
    """Name of the GPU or of the processor."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
