"""The tables and the plot of ``benchmark.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_cases import Sizes
from benchmark_measure import BACKENDS
from rich.table import Table

COLUMNS = 3
COLORS = {"reference": "#8a8a8a", "cpu": "#1f77b4", "triton": "#1f77b4"}
OTHERS = ("#d62728", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")
SHORT = {"share of multiply-adds": "FMA", "share of copy": "copy"}


def tabulate(rows: Sequence[Mapping[str, Any]], sizes: Sizes, clock: str) -> Table:
    """The rows of one fan-in and batch, the parts of a variant side by side.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of the CSV file: forward, backward and full of each variant in turn.
    sizes : Sizes
        What they are of.
    clock : str
        Whose milliseconds they are.
    """
    fast = BACKENDS[sizes.device][1]
    nodes = f"{sizes.nodes} nodes" if sizes.n else f"{sizes.nodes} outputs"
    title = f"{sizes}; {sizes.inputs} inputs, {nodes}; milliseconds of {clock}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    columns = ["forward", "backward", "full", "20-80 %", "speed-up", f"/ {fast}", "of limit", "peak MiB", "saved MiB"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    what = None
    for forward, backward, full in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        if full["what"] != what:
            what = full["what"]
            table.add_row(f"[bold]{what}[/bold]")
        table.add_row(
            f"  {full['backend']}",
            *(figures(row["median ms"]) for row in (forward, backward, full)),
            f"{figures(full['20 % ms'])}-{figures(full['80 % ms'])}",
            *("" if full[name] is None else figures(full[name]) for name in ("speed-up", "slow-down")),
            of_limit(full),
            figures(full["peak MiB"]),
            figures(full["saved MiB"]),
        )
    return table


def of_limit(row: Mapping[str, Any]) -> str:
    """The larger of the two shares, and what of."""
    share, limit = max((row[share] or 0.0, short) for share, short in SHORT.items())
    return f"{share:.0%} {limit}" if share else ""


def figures(value: float) -> str:
    """Three figures, two after the point at most."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def plot(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw medians of forward and backward together, with quantiles: a panel per case, a colour per variant.

    Parameters
    ----------
    rows : sequence of mapping
        The rows of the CSV file.
    title : str
        Machine, versions and sizes.
    path : Path
        The image to write.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = [row for row in rows if row["part"] == "full"]
    names = list(dict.fromkeys(row["what"] for row in rows))
    others = iter(OTHERS * len(rows))
    colors = {name: COLORS.get(name) or next(others) for name in dict.fromkeys(row["backend"] for row in rows)}
    sizes = sorted({(row["n"], row["batch"]) for row in rows})
    fan_ins = sorted({n for n, _ in sizes})
    # fan-ins beside each other, with a gap between
    places = {(n, batch): index + 0.8 * fan_ins.index(n) for index, (n, batch) in enumerate(sizes)}
    columns = min(COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(max(5 * columns, 10), 1.3 + 3.1 * lines), layout="constrained")
    figure.suptitle(f"Forward and backward, milliseconds: median, 20 % to 80 %\n{title}", fontsize=11)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, what in zip(axes, names, strict=False):
        for backend, color in colors.items():
            for n in fan_ins:
                found = [row for row in rows if (row["what"], row["backend"], row["n"]) == (what, backend, n)]
                found.sort(key=lambda row: row["batch"])
                medians = [row["median ms"] for row in found]
                below = [row["median ms"] - row["20 % ms"] for row in found]
                above = [row["80 % ms"] - row["median ms"] for row in found]
                at = [places[n, row["batch"]] for row in found]
                axis.errorbar(at, medians, [below, above], color=color, marker="o", markersize=4, linewidth=1.2)
        axis.set_title(what, fontsize=10)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        # a decade at least, so that there are ticks
        axis.set_ylim(min(low, high / 10), high)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xticks(list(places.values()), [str(batch) for _, batch in sizes], fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        for n in fan_ins:
            middle = [place for (fan_in, _), place in places.items() if fan_in == n]
            center, below_axis = sum(middle) / len(middle), axis.get_xaxis_transform()
            axis.text(center, -0.12, f"batch, n = {n}", ha="center", va="top", fontsize=8, transform=below_axis)
        axis.set_xlim(-0.6, max(places.values()) + 0.6)
        axis.grid(axis="y", color="#e2e2e2", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    handles = [axes[0].plot([], [], color=color, marker="o", markersize=4)[0] for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside lower center", ncols=len(colors), frameon=False)
    figure.savefig(path, dpi=110)
