"""Loggers: wandb as a run should look there, and any other that Lightning knows."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.loggers import Logger, WandbLogger

from difflut_lab.training.compose import instantiate

NAME_LENGTH = 128  # what wandb takes


def build_loggers(
    config: Mapping[str, Any], directory: Path, overrides: Sequence[str], sweep: str | None
) -> list[Logger]:
    """Build the configured loggers.

    Parameters
    ----------
    config : mapping
        The checked configuration.
    directory : Path
        The run directory, where loggers write.
    overrides : sequence of str
        What the user typed; it names the run.
    sweep : str, optional
        The name of the sweep that the run belongs to.
    """
    return [
        instantiate(values, f"logger.{name}", save_dir=str(directory), config=config, overrides=overrides, sweep=sweep)
        for name, values in (config["logger"] or {}).items()
    ]


def wandb_logger(
    *,
    mode: Literal["offline", "online", "disabled"] = "offline",
    project: str = "difflut_lab",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    save_dir: str,
    config: Mapping[str, Any],
    overrides: Sequence[str],
    sweep: str | None,
) -> WandbLogger:
    """Start a wandb run: named by its overrides, grouped by sweep, tagged by its parts, plotted over epochs.

    Parameters
    ----------
    mode : {"offline", "online", "disabled"}
        Offline writes ``save_dir/wandb`` and needs no account; ``wandb sync`` uploads it.
    project, entity : str, optional
        Where wandb files the run.
    name, group : str, optional
        The run's name and group; by default its overrides and its sweep.
    tags : list of str, optional
        Added to the names of model, data set, layer, node and quantizer.
    save_dir, config, overrides, sweep
        Supplied by ``build_loggers``.
    """
    import wandb

    parts = [config[key]["name"] for key in ("model", "data", "layer", "node", "quantizer") if key in config]
    run = wandb.init(
        dir=save_dir,
        project=project,
        entity=entity,
        # of several processes, the first one tracks
        mode="disabled" if int(os.environ.get("LOCAL_RANK", 0)) else mode,
        name=name or " ".join(overrides)[:NAME_LENGTH] or "defaults",
        group=group or sweep,
        tags=list(dict.fromkeys([*parts, *(tags or [])])),
        config={**config, "overrides": list(overrides)},
        settings=wandb.Settings(silent=True),
    )
    logger = WandbLogger(experiment=run)
    for metric in ("train/*", "val/*", "test/*", "schedule/*", "health/*", "lr"):
        run.define_metric(metric, step_metric="epoch")
    return logger


def log_picture(loggers: Sequence[Logger], name: str, path: Path) -> None:
    """Show a picture in the wandb run, if that is where the run is tracked."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)])


def log_histograms(
    loggers: Sequence[Logger], histograms: Mapping[str, tuple[list[float], list[float]]], epoch: int
) -> None:
    """Show an epoch's histograms in the wandb run, if that is where the run is tracked.

    Parameters
    ----------
    loggers : sequence of Logger
        Of the run.
    histograms : mapping
        By name, counts and the edges of their bins, one more than counts.
    epoch : int
        What they are plotted over.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            from wandb import Histogram

            content = {
                name: Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))
                for name, (counts, edges) in histograms.items()
            }
            logger.experiment.log({**content, "epoch": epoch}, commit=False)


def close_loggers() -> None:
    """End the wandb run, if one was started, so that the next job of a sweep starts its own."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
