"""One table of all trainings of a sweep, on the screen and as ``summary.csv``."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from difflut_lab.training.console import new_console, shown_path

METRICS = ("test/acc", "test/acc_soft", "test/gap", "val/acc", "train/seconds")

failed_jobs: list[str] = []
_directory: Path | None = None


class SweepSummary(Callback):
    """Hydra callback: collects the jobs' results when a sweep ends."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where the sweep's jobs go."""
        global _directory
        _directory = Path(str(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and print the table."""
        finish()


def finish() -> None:
    """Write and print the table of the sweep that was started, once; nothing if there was none."""
    global _directory
    if _directory is None:
        return
    directory, _directory = _directory, None
    rows = summarise(directory)
    if not rows:
        # Hydra composes all jobs before it starts one: nothing was done here
        for name in ("multirun.yaml", "summary.csv"):
            (directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            directory.rmdir()
        return
    failed_jobs.extend(row["job"] for row in rows if row["status"] != "done")
    show(rows, directory)


def summarise(directory: Path) -> list[dict[str, Any]]:
    """Collect a row per job of a sweep, ordered by job number, and write them to ``summary.csv``.

    Parameters
    ----------
    directory : Path
        The sweep's directory; its subdirectories are the jobs'.

    Returns
    -------
    list of dict
        ``job``, a column per swept key, ``status``, the metrics, ``directory``.
    """
    rows = []
    for path in sorted(directory.iterdir(), key=lambda path: _number(path.name)):
        if not path.is_dir() or _number(path.name) < 0:
            continue
        overrides = path / "overrides.yaml"
        words = [str(word) for word in OmegaConf.load(overrides)] if overrides.exists() else []
        metrics = path / "metrics.json"
        results = json.loads(metrics.read_text()) if metrics.exists() else {}
        row: dict[str, Any] = {"job": str(_number(path.name))} | {
            word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words
        }
        row |= {"status": "failed" if (path / "error.txt").exists() else "done" if results else "interrupted"}
        row |= {name: results[name] for name in METRICS if name in results}
        rows.append(row | {"directory": path.name})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    # keys of overrides first, then what rows have in common
    tail = ["status", *_metrics(rows), "directory"]
    columns = [key for key in columns if key not in tail] + tail
    with open(directory / "summary.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def show(rows: list[dict[str, Any]], directory: Path) -> None:
    """Print the rows; columns whose value is the same in all rows are named once, above the table."""
    keys = [key for key in rows[0] if key not in ("status", *METRICS, "directory")]
    keys += [key for row in rows for key in row if key not in keys and key not in ("status", *METRICS, "directory")]
    constant = [key for key in keys if len(rows) > 1 and len({row.get(key) for row in rows}) == 1]
    table = Table(title=f"{len(rows)} trainings", title_justify="left", caption_justify="left")
    # Text, because brackets in strings are markup
    table.caption = Text(", ".join(f"{key}={rows[0].get(key)}" for key in constant))
    shown = [key for key in dict.fromkeys(keys) if key not in constant]
    # the last word of a key is enough where it is unlike the others'
    short = len({key.rpartition(".")[2] for key in shown}) == len(shown)
    for key in shown:
        table.add_column(key.rpartition(".")[2] if short else key, overflow="fold", min_width=8)
    metrics = _metrics(rows)
    for name in metrics:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells: list[Text | str] = [Text(str(row.get(key, ""))) for key in shown]
        if row["status"] != "done":
            table.add_row(*cells, f"[red]{row['status']}[/red]", *[""] * (len(metrics) - 1))
        else:
            table.add_row(*cells, *(_cell(name, row.get(name)) for name in metrics))
    console = new_console()
    console.print()
    console.print(table)
    for row in rows:
        if row["status"] == "failed":
            console.print(
                f"job {row['job']} failed: {shown_path(directory / row['directory'] / 'error.txt')}", soft_wrap=True
            )
    console.print(f"{shown_path(directory / 'summary.csv')}", soft_wrap=True, highlight=False)


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that any row has; networks without a relaxation lack some."""
    return [name for name in METRICS if any(name in row for row in rows)] or [*METRICS]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if name.endswith("seconds") else f"{100 * value:.2f} %"


def _number(name: str) -> int:
    head = name.split("_", 1)[0]
    return int(head) if head.isdecimal() else -1
