"""What happens in each epoch: scheduled values, checkpoints, a row of history, progress on the screen."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.registry import REGISTRY
from difflut_lab.schedules import Schedule
from difflut_lab.training.console import new_console
from difflut_lab.training.ema import AveragedWeights
from difflut_lab.training.network import Network
from difflut_lab.training.paths import replacing

HISTORY = ("epoch", "train/loss", "train/acc", "val/loss", "val/acc", "lr", "seconds")


class Schedules(Callback):
    """Sets scheduled values at the start of each epoch, in every part that has them, and logs ``schedule/KEY``.

    Parameters
    ----------
    network : Network
        The network as it was built, with the values that its parts are configured with.
    schedules : mapping
        By kind of part, by value, the name and options of a schedule, checked.

    Raises
    ------
    ConfigError
        If no part of the network has such a value, or may have it, or the parts are configured with several and none
        is said to be the start.
    """

    def __init__(self, network: Network, schedules: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        self._network = network
        self._schedules: dict[str, Schedule] = {}
        self._starts: dict[str, float] = {}
        for kind, scheduled in schedules.items():
            for name, spec in scheduled.items():
                key = f"{kind}.{name}"
                parts = network.parts_with(key)
                for part_class in {type(part) for part in parts}:
                    if option := schema.options(part_class).get(name):
                        values = {end: spec[end] for end in ("start", "end") if spec[end] is not None}
                        schema.check_values(option.annotation, values, f"schedules.{key}")
                own = sorted({float(getattr(part, name)) for part in parts})
                if spec["start"] is None and len(own) > 1:
                    raise ConfigError(
                        f"schedules.{key}.start: must be given, because the parts of the network start at "
                        f"{', '.join(f'{value:g}' for value in own)}."
                    )
                self._schedules[key] = REGISTRY.build("schedule", spec)
                self._starts[key] = own[0]
                # refuses a start that it cannot leave
                self._schedules[key].value(0, start=own[0], epochs=2)

    @property
    def keys(self) -> list[str]:
        """What is scheduled, such as ``["head.tau"]``."""
        return list(self._schedules)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the epoch's values."""
        assert trainer.max_epochs is not None
        for key, schedule in self._schedules.items():
            value = schedule.value(trainer.current_epoch, start=self._starts[key], epochs=trainer.max_epochs)
            self._network.set_scheduled({key: value})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch's values."""
        for key in self._schedules:
            pl_module.log(f"schedule/{key}", self._network.scheduled[key])


class Checkpoints(Checkpoint):
    """``best.ckpt``, the weights of highest hard ``val/acc`` (earliest on ties), and ``last.ckpt``, everything.

    Parameters
    ----------
    directory : Path
        Where they are written.
    averaged : AveragedWeights, optional
        What the network holds while it is saved.
    """

    def __init__(self, directory: Path, averaged: AveragedWeights | None = None) -> None:
        self._averaged = averaged
        self.best_path = directory / "best.ckpt"
        self.last_path = directory / "last.ckpt"
        self.best_score = float("-inf")
        self.best_epoch = -1

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, so that a continued training knows it."""
        return {"best_score": self.best_score, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score."""
        self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save; called after validation and after the module's own checks."""
        score = float(trainer.callback_metrics["val/acc"])
        with self._averaged.applied() if self._averaged else nullcontext():
            if score > self.best_score:
                self.best_score, self.best_epoch = score, trainer.current_epoch
                _save(trainer, self.best_path, weights_only=True)
            _save(trainer, self.last_path, weights_only=False)


def _save(trainer: L.Trainer, path: Path, *, weights_only: bool) -> None:
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            trainer.save_checkpoint(temporary, weights_only=weights_only)
    else:
        trainer.save_checkpoint(path, weights_only=weights_only)  # takes part; only rank 0 writes


class History(Callback):
    """Appends a row of metrics per epoch to ``history.csv``.

    Parameters
    ----------
    path : Path
        The file.
    more : sequence of str
        Metrics that this training logs beside those of every training.
    """

    def __init__(self, path: Path, more: Sequence[str] = ()) -> None:
        self.path = path
        self._columns = [*HISTORY[:-1], *more, HISTORY[-1]]
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the rows of epochs that are trained again, where a training is continued in its own directory."""
        if not self.path.exists() or not trainer.is_global_zero:
            return
        with open(self.path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < trainer.current_epoch]
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Append the epoch's row; nothing is buffered."""
        if not trainer.is_global_zero:
            return
        row = {name: f"{float(value):.6g}" for name, value in trainer.callback_metrics.items()}
        row |= {"epoch": str(trainer.current_epoch), "seconds": f"{time.perf_counter() - self._start:.3f}"}
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(row)


class EpochProgress(Callback):
    """One bar for the whole training on a terminal; elsewhere a line for about every tenth of it."""

    STEPS_PER_UPDATE = 10

    def __init__(self) -> None:
        self._console = new_console()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        if not (self._console.is_terminal and trainer.is_global_zero):
            return
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[results]}"),
            console=self._console,
            refresh_per_second=4,
        )
        self._bar.start()
        steps = int(trainer.num_training_batches)
        assert trainer.max_epochs is not None
        self._task = self._bar.add_task(
            "", total=trainer.max_epochs * steps, completed=trainer.current_epoch * steps,
            epoch=trainer.current_epoch, epochs=trainer.max_epochs, results="",
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._bar is not None and batch_idx % self.STEPS_PER_UPDATE == 0:
            done = trainer.current_epoch * trainer.num_training_batches + batch_idx + 1
            self._bar.update(self._task, completed=done, epoch=trainer.current_epoch + 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the epoch's results."""
        metrics, epochs = trainer.callback_metrics, trainer.max_epochs or 1
        epoch = trainer.current_epoch + 1
        results = f"loss {metrics['train/loss']:.4f}  val acc {100 * metrics['val/acc']:.2f} %"
        if self._bar is not None:
            self._bar.update(self._task, completed=epoch * trainer.num_training_batches, results=results)
        elif trainer.is_global_zero and (epoch % max(1, epochs // 10) == 0 or epoch == epochs):
            self._console.print(f"epoch {epoch}/{epochs}  {results}", highlight=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the bar as it is, also after an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
