"""One training, from a composed configuration to the files it leaves behind."""

from __future__ import annotations

import logging
import platform
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from difflut_lab import __version__
from difflut_lab.data import DataSet
from difflut_lab.errors import ConfigError
from difflut_lab.ops import chosen_kernels, use_kernels
from difflut_lab.registry import REGISTRY
from difflut_lab.training import checkpoint, display
from difflut_lab.training.callbacks import Checkpoints, EpochProgress, History, Schedules
from difflut_lab.training.compose import (
    DISTILLATION,
    SCHEDULES,
    Config,
    build_augmentations,
    build_model,
    groups_of,
    instantiate,
    model_of,
    resolve,
)
from difflut_lab.training.datamodule import InMemoryData
from difflut_lab.training.distillation import Teacher
from difflut_lab.training.ema import AveragedWeights
from difflut_lab.training.health import TernaryHealth, ternary_layers
from difflut_lab.training.module import Classifier
from difflut_lab.training.network import Network
from difflut_lab.training.paths import git_revision, replacing, write_json
from difflut_lab.training.tracking import build_loggers, close_loggers, log_picture
from difflut_lab.training.wiring_picture import WiringPicture


def run(composed: DictConfig, overrides: Sequence[str], directory: Path, sweep: str | None = None) -> float:
    """Train, test the best checkpoint, and write the run directory.

    Parameters
    ----------
    composed : DictConfig
        What Hydra composed, without Hydra's own part.
    overrides : sequence of str
        What the user typed.
    directory : Path
        The run directory; it exists.
    sweep : str, optional
        The name of the sweep that the run belongs to.

    Returns
    -------
    float
        The highest hard accuracy on validation.

    Raises
    ------
    UserError
        For everything that the user can mend; bad configurations before any data is read.
    """
    _quiet()
    config = resolve(composed, overrides)
    _check_trainer(config, sweep, directory)
    use_kernels(config["kernels"])
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    previous = None
    if config["ckpt"]:
        previous = checkpoint.read(config["ckpt"])
    lesson = config[DISTILLATION]
    teacher = Teacher(lesson["ckpt"], lesson["temperature"]) if lesson["ckpt"] else None
    data: DataSet = REGISTRY.build("data", config["data"]).load()
    _complete(config, data)
    if previous:
        checkpoint.check_continuation(previous, config, config["ckpt"])
    if teacher:
        teacher.check(data)
    augmentations = build_augmentations(config, data.input_shape, len(data.class_names))
    datamodule = InMemoryData(data, config["batch_size"], config["eval_batch_size"], config["seed"], augmentations)
    L.seed_everything(config["seed"], verbose=False)
    network = Network(
        build_model(config, data.input_shape, len(data.class_names)), data.mean, data.std, data.class_names
    )
    network.calibrate(data.train.x)
    schedules = Schedules(network, config[SCHEDULES])
    module = Classifier(network, config, checkpoint.header(config, overrides, data), teacher)
    _write_config(config, overrides, directory)
    if not sweep:
        display.show_config(config, directory)
    try:
        loggers = build_loggers(config, directory, overrides, sweep)
        results = _train(module, schedules, datamodule, config, loggers, directory)
    finally:
        close_loggers()
    display.show_results(results, directory, brief=sweep is not None)
    return float(results["val/acc"])


def _train(
    module: Classifier,
    schedules: Schedules,
    datamodule: InMemoryData,
    config: Config,
    loggers: list[Logger],
    directory: Path,
) -> dict[str, Any]:
    averaged = AveragedWeights(module.network, config["ema_decay"]) if config["ema_decay"] else None
    checkpoints = Checkpoints(directory / "checkpoints", averaged)
    if config["ckpt"]:
        _bring_best(Path(config["ckpt"]), checkpoints.best_path)
    logged = ["val/acc_soft", "val/gap"] * module.relaxes
    logged += [f"schedule/{key}" for key in schedules.keys] + ["train/regularization"] * module.regularizes
    logged += ["train/distillation"] * (module.teacher is not None)
    history = History(directory / "history.csv", logged)
    health = [TernaryHealth(module.network, directory / "health.csv")] if ternary_layers(module.network) else []
    callbacks = [schedules, *([averaged] if averaged else []), *health, history, EpochProgress(), checkpoints]
    trainer = _build_trainer(config, loggers, directory, callbacks)
    picture = None if config["fast_dev_run"] else WiringPicture(module.network, datamodule.data.input_shape)
    start = time.perf_counter()
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=config["ckpt"], weights_only=True)
    except SystemExit as stop:  # what Lightning makes of SIGINT and SIGTERM
        display.show_stopped(trainer.current_epoch + 1, checkpoints.last_path)
        raise SystemExit(143 if isinstance(stop, SIGTERMException) else 130) from None
    seconds = time.perf_counter() - start
    epochs = trainer.current_epoch
    trainer.strategy.barrier()  # the first process may still be renaming its files
    checkpoint.load_weights(module.network, checkpoint.read(checkpoints.best_path), checkpoints.best_path)
    (test,) = trainer.test(module, datamodule=datamodule, verbose=False)
    results = dict(test) | {
        "val/acc": checkpoints.best_score,
        "best_epoch": checkpoints.best_epoch,
        "epochs": epochs,
        "train/seconds": round(seconds, 3),
        "parameters": sum(parameter.numel() for parameter in module.network.parameters() if parameter.requires_grad),
        **module.network.model.counts,
        "seed": config["seed"],
        "kernels": chosen_kernels(),
        "device": str(trainer.strategy.root_device),
        "threads": torch.get_num_threads(),
        "git": git_revision(),
        "versions": {"difflut_lab": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if trainer.is_global_zero:
        write_json(directory / "metrics.json", results)
        if picture:
            _draw_wiring(picture, directory / "wiring.png", loggers)
    return results


def _draw_wiring(picture: WiringPicture, path: Path, loggers: list[Logger]) -> None:
    image = picture.draw()
    if image is not None:
        with replacing(path) as temporary:
            image.save(temporary, format="png")
        log_picture(loggers, "wiring", path)


def _build_trainer(config: Config, loggers: list[Logger], directory: Path, own: Sequence[Callback]) -> L.Trainer:
    callbacks = [*own]
    callbacks += [instantiate(values, f"callbacks.{name}") for name, values in (config["callbacks"] or {}).items()]
    options = dict(config["trainer"])
    if config["fast_dev_run"]:
        options |= {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}
    trainer: L.Trainer = instantiate(
        {
            # what this framework has of its own
            "enable_checkpointing": True,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
        }
        | options,
        "trainer",
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=directory,
    )
    return trainer


def _quiet() -> None:
    """Only warnings that a user can act on."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # about data loaders that need workers, and GPUs that are not used: neither is so here
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")


def _check_trainer(config: Config, sweep: str | None, directory: Path) -> None:
    """Build the trainer once, so that what it refuses is refused before data is read."""
    accelerator = config["trainer"].get("accelerator", "auto")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.accelerator={accelerator}: there is no GPU here; use trainer=cpu.")
    distributed = str(config["trainer"].get("strategy", "auto")) != "auto"
    if distributed and sweep:
        # each process of Lightning's would start the whole sweep anew
        raise ConfigError("trainer=ddp cannot run inside a sweep (-m): start its trainings one by one.")
    try:
        _build_trainer(config, [], directory, [Checkpoints(directory)])
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error


def _complete(config: Config, data: DataSet) -> None:
    """Fill in what depends on the data, such as a last width that must be a multiple of the classes."""
    model_class = model_of(config)
    groups = {group: config[group] for group in groups_of(model_class)}
    own = {key: value for key, value in config["model"].items() if key != "name"}
    config["model"] |= model_class.resolve(own, groups, len(data.class_names))


@rank_zero_only
def _write_config(config: Mapping[str, Any], overrides: Sequence[str], directory: Path) -> None:
    OmegaConf.save(OmegaConf.create(dict(config)), directory / "config.yaml")
    OmegaConf.save(OmegaConf.create(list(overrides)), directory / "overrides.yaml")


@rank_zero_only
def _bring_best(last: Path, best: Path) -> None:
    """The best epoch may lie before the point of continuation: take its checkpoint along."""
    earlier = last.with_name("best.ckpt")
    if earlier.exists() and earlier.resolve() != best.resolve():
        best.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(earlier, best)
