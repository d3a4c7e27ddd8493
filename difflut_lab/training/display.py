"""What a run prints: its settings before, its results after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table
from rich.text import Text

from difflut_lab.training.compose import DISTILLATION, SCHEDULES, RunSettings
from difflut_lab.training.console import new_console, shown_path

# what models count, in metrics.json
COUNTS = ("tables", "ternary_weights")


@rank_zero_only
def show_config(config: Mapping[str, Any], directory: Path) -> None:
    """Print the resolved configuration, a line per part.

    Parameters
    ----------
    config : mapping
        The checked configuration.
    directory : Path
        The run directory, named below the table.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    settings = {key: value for key, value in config.items() if key in RunSettings.__dataclass_fields__}
    table.add_row("run", "", _text({key: value for key, value in settings.items() if value not in (None, [], False)}))
    for key, value in config.items():
        if key in settings or not value or (key == DISTILLATION and not value["ckpt"]):
            continue
        if "name" in value or "_target_" in value or key in ("layer_config", DISTILLATION):
            _add(table, key, value)
        elif key == SCHEDULES:
            for kind, values in value.items():
                for name, part in values.items():
                    _add(table, f"{key}.{kind}.{name}", part)
        else:
            for name, part in value.items():
                _add(table, key, part, name)
    console = new_console()
    console.print(table)
    console.print(f"\n{shown_path(directory)}\n", style="dim", soft_wrap=True, highlight=False)


@rank_zero_only
def show_results(results: Mapping[str, Any], directory: Path, *, brief: bool = False) -> None:
    """Print the final table.

    Parameters
    ----------
    results : mapping
        The content of ``metrics.json``.
    directory : Path
        The run directory.
    brief : bool
        One line, for a job of a sweep, whose table follows at the end.
    """
    if brief:
        hard, validation, seconds = results["test/acc"], results["val/acc"], results["train/seconds"]
        print(f"test acc {100 * hard:.2f} %  val acc {100 * validation:.2f} %  {seconds:.1f} s")
        return
    table = Table(show_header=False, title="Results", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    relaxes = "test/acc_soft" in results
    hard = "test accuracy, hard (truth tables)" if relaxes else "test accuracy"
    table.add_row(hard, f"{100 * results['test/acc']:.2f} %")
    if relaxes:
        table.add_row("test accuracy, soft (relaxation)", f"{100 * results['test/acc_soft']:.2f} %")
        table.add_row("discretisation gap", f"{100 * results['test/gap']:.2f} points")
    table.add_row(f"validation accuracy (best, epoch {results['best_epoch'] + 1})", f"{100 * results['val/acc']:.2f} %")
    table.add_row("parameters", f"{results['parameters']:,}")
    for name in COUNTS:
        if name in results:
            table.add_row(name.replace("_", " "), f"{results[name]:,}")
    table.add_row("epochs", f"{results['epochs']}")
    table.add_row("seconds of training", f"{results['train/seconds']:.1f}")
    console = new_console()
    console.print()
    console.print(table)
    console.print(f"{shown_path(directory)}", soft_wrap=True, highlight=False)


@rank_zero_only
def show_stopped(epoch: int, last: Path) -> None:
    """Say where an interrupted training stopped, and how to go on.

    Parameters
    ----------
    epoch : int
        The epoch that was not finished, counted from 1.
    last : Path
        The last checkpoint, if there is one yet.
    """
    how = f"continue with the same settings and ckpt={shown_path(last)}" if last.exists() else "no epoch was completed"
    new_console().print(f"\nStopped in epoch {epoch}; {how}.", soft_wrap=True, highlight=False)


def _add(table: Table, group: str, part: Mapping[str, Any], key: str = "") -> None:
    """A row for a part: registered parts have a name, library parts a path, LayerConfig and the like neither."""
    title = (key or part["_target_"].rpartition(".")[2]) if "_target_" in part else part.get("name", "")
    identity = "_target_" if "_target_" in part else "name"
    options = {word: value for word, value in part.items() if word != identity}
    table.add_row(group, title, _text(options))


def _text(options: Mapping[str, Any]) -> Text:
    # not a string, where brackets would be markup
    return Text("  ".join(f"{key}={_value(value)}" for key, value in options.items() if value is not None))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_value(part) for part in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
