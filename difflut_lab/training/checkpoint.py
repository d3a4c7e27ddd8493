"""Checkpoints: self-contained, safe to load, complete or not there."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from difflut_lab.data import DataSet
from difflut_lab.errors import CheckpointError
from difflut_lab.training import plugins
from difflut_lab.training.compose import DISTILLATION, NO_RECIPE, build_model
from difflut_lab.training.network import Network

FORMAT = 1
KEY = "difflut_lab"  # of our part beside Lightning's
STATE_PREFIX = "network."
# what decides the network's shape; training behaviour (layer_config among it) may change between two runs
STRUCTURE = ("model", "encoder", "layer", "node", "head", "quantizer")
# what decides the course of a training, and where data lies, which does not
COURSE = (
    *("optimizer", "scheduler", "schedules", "augmentations", "data", "seed", "batch_size"),
    *("label_smoothing", "ema_decay", DISTILLATION),
)
TRAINER_COURSE = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
LOCATIONS = ("data.root", "data.path")


def header(config: Mapping[str, Any], overrides: Sequence[str], data: DataSet) -> dict[str, Any]:
    """What a checkpoint says of itself, as plain Python types.

    Parameters
    ----------
    config : mapping
        The checked configuration.
    overrides : sequence of str
        What the user typed.
    data : DataSet
        Gives input shape, class names and normalisation.
    """
    return {
        "format": FORMAT,
        "config": dict(config),
        "overrides": list(overrides),
        "plugins": list(config["plugins"]),
        "input_shape": list(data.input_shape),
        "class_names": list(data.class_names),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def read(path: str | Path, key: str = "ckpt") -> dict[str, Any]:
    """Read a checkpoint without running any code of the file.

    Parameters
    ----------
    path : str or Path
        The file.
    key : str
        The configuration key that named it, for messages.

    Returns
    -------
    dict
        Lightning's content, and ours under ``difflut_lab``.

    Raises
    ------
    CheckpointError
        If there is no such file, or it is not a checkpoint of this framework.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{key}={path}: there is no such file.") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{key}={path}: cannot be read: it is damaged, no checkpoint, or holds objects that could run code."
        ) from None
    except Exception as error:  # the unpickler stumbles over arbitrary bytes in arbitrary ways
        raise CheckpointError(f"{key}={path}: cannot be read ({type(error).__name__}).") from None
    if not isinstance(content, dict) or KEY not in content:
        raise CheckpointError(f"{key}={path}: is not a checkpoint of difflut_lab.")
    if content[KEY]["format"] != FORMAT:
        raise CheckpointError(
            f"{key}={path}: has format {content[KEY]['format']}; this version of difflut_lab reads format {FORMAT}."
        )
    return content


def load_network(path: str | Path, key: str = "ckpt") -> Network:
    """Rebuild a trained network from its checkpoint alone, in evaluation mode: it is its truth tables.

    Only registered parts are built. The plugins that the checkpoint names are imported first, from the working
    directory or the import path.

    Parameters
    ----------
    path : str or Path
        ``best.ckpt`` or ``last.ckpt``.
    key : str
        The configuration key that named it, for messages.

    Raises
    ------
    CheckpointError, ConfigError
        If the file is no checkpoint, or a part that it names is not registered.
    """
    content = read(path, key)
    about = content[KEY]
    plugins.load_plugins(about["plugins"])
    model = build_model(about["config"], about["input_shape"], len(about["class_names"]))
    network = Network(model, about["mean"], about["std"], about["class_names"])
    load_weights(network, content, path, key)
    return network.eval()


def load_weights(network: Network, content: Mapping[str, Any], path: str | Path, key: str = "ckpt") -> None:
    """Copy a checkpoint's weights, and the scheduled values of its epoch, into a network of the same structure."""
    state = {name.removeprefix(STATE_PREFIX): value for name, value in content["state_dict"].items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise CheckpointError(f"{key}={path}: its weights do not fit this network: {lines}") from None
    network.set_scheduled(content[KEY].get("scheduled", {}))


def check_continuation(content: Mapping[str, Any], config: Mapping[str, Any], path: str | Path) -> None:
    """Refuse to continue training from a checkpoint of another network, or with settings that it would not heed.

    Raises
    ------
    CheckpointError
        Names the settings that differ, and the overrides that the checkpoint was trained with.
    """
    about = content[KEY]
    there = dict(_leaves({group: about["config"].get(group) for group in STRUCTURE}))
    here = dict(_leaves({group: config.get(group) for group in STRUCTURE}))
    differing = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    if differing:
        shown = _differences(differing, there, here)
        raise CheckpointError(
            f"ckpt={path}: belongs to another network: {shown}. "
            f"It was trained with: {' '.join(about['overrides']) or 'no overrides'}."
        )
    if "optimizer_states" not in content:
        raise CheckpointError(f"ckpt={path}: holds weights only; training continues from last.ckpt.")
    # the state of the optimizer and the scheduler is restored, whatever is typed: say so rather than ignore it
    there, here = _course(NO_RECIPE | about["config"]), _course(config)
    differing = [
        key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key) and key not in LOCATIONS
    ]
    if differing:
        raise CheckpointError(
            f"ckpt={path}: cannot be continued with other settings: {_differences(differing, there, here)}."
        )
    done = content["epoch"] + 1
    if done >= config["trainer"]["max_epochs"]:
        raise CheckpointError(
            f"ckpt={path}: has {done} epochs already; set trainer.max_epochs={config['trainer']['max_epochs']} higher."
        )


def _differences(keys: Sequence[str], there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    shown = "; ".join(f"{key} is {there.get(key)} there, {here.get(key)} here" for key in keys[:4])
    return shown + (f" (and {len(keys) - 4} more)" if len(keys) > 4 else "")


def _course(config: Mapping[str, Any]) -> dict[str, Any]:
    """By key, what decides the course of a training."""
    trainer = {key: config["trainer"][key] for key in TRAINER_COURSE if key in config["trainer"]}
    return dict(_leaves({group: config.get(group) for group in COURSE} | {"trainer": trainer}))


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
