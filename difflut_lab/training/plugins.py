"""Modules of the user's own that register parts: imported before the configuration is composed."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from hydra.core.config_store import ConfigStore

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.registry import REGISTRY
from difflut_lab.training.paths import config_directory

ENVIRONMENT_VARIABLE = "DIFFLUT_LAB_PLUGINS"
ENTRY_POINTS = "difflut_lab.plugins"


def load_plugins(names: Iterable[str]) -> list[str]:
    """Import plugins: those named, those of the environment variable, those that installed packages offer.

    The working directory is put on the import path first.

    Parameters
    ----------
    names : iterable of str
        Module names.

    Returns
    -------
    list of str
        The names of all modules imported.

    Raises
    ------
    ConfigError
        If a module cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    environment = [name.strip() for name in os.environ.get(ENVIRONMENT_VARIABLE, "").split(",") if name.strip()]
    installed = [entry.module for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    loaded = list(dict.fromkeys([*names, *environment, *installed]))
    for name in loaded:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise
            raise ConfigError(
                f"plugins=[{name}]: there is no module '{name}' in the working directory or on the import path."
            ) from None
    return loaded


def offer_parts() -> None:
    """Make a group choice, with its signature's defaults, of each registered part that has no YAML file."""
    for kind in REGISTRY.kinds():
        folder = config_directory() / kind
        if not folder.is_dir():
            continue  # not a configuration group: initialisers are options of nodes
        for name in REGISTRY.names(kind):
            if not (folder / f"{name}.yaml").exists():
                ConfigStore.instance().store(group=kind, name=name, node=_node(kind, name), provider="plugin")


def choices(group: str) -> list[str]:
    """What a configuration group can be set to: its YAML files, and the parts of plugins."""
    files = {path.stem for path in Path(config_directory() / group).glob("*.yaml")}
    stored = ConfigStore.instance().repo.get(group, {})
    return sorted(files | {name.removesuffix(".yaml") for name in stored})


def _node(kind: str, name: str) -> dict[str, object]:
    values = schema.defaults(kind, name)
    if kind == "node" and values.get("n") == 6:
        values["n"] = "${fan_in}"  # as the files of the built-in nodes say
    if kind == "model":
        return {"model": values}
    return values
