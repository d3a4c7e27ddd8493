"""The command line: plugins, Hydra's composition, one-line errors, and the function that Hydra calls per job."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from difflut_lab.errors import ConfigError, UserError
from difflut_lab.registry import did_you_mean
from difflut_lab.training import plugins, sweep
from difflut_lab.training.paths import config_directory, register_resolvers

log = logging.getLogger(__name__)

FULL_ERROR = "HYDRA_FULL_ERROR"
# keys of checkpoints, and characters in the names of run directories that Hydra's grammar has other uses for
CHECKPOINTS = ("ckpt", "distillation.ckpt")
TAKEN_APART = "=,~"
_full_error = os.environ.get(FULL_ERROR) == "1"


def main() -> None:
    """Compose the configuration of ``sys.argv`` and train; exits with a status other than 0 after any failure."""
    register_resolvers()
    # large tensors in huge pages: a step of learnable routing over all inputs takes 30 % less time on a CPU
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # argparse accepts words on one side of an option only
    flags = [word for word in sys.argv[1:] if word in ("-m", "--multirun")]
    sys.argv[1:] = flags + [_with_quotes(word) for word in sys.argv[1:] if word not in flags]
    try:
        overrides = _overrides(sys.argv[1:])
        if plugins.load_plugins(_plugin_names(overrides)):
            plugins.offer_parts()
        _check_choices(overrides)
        _check_directory(overrides)
    except UserError as error:
        _stop(error)
    os.environ[FULL_ERROR] = "1"  # Hydra raises what it would print, and _in_words says it better
    decorated = hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="train")
    try:
        decorated(run_job)()
    except HydraException as error:
        words = _in_words(error, overrides)
        _stop(ConfigError(f"{words} No job of the sweep was started.") if flags else words)
    finally:
        # a job that Hydra cannot compose ends the sweep early: show what was done until then
        sweep.finish()
    if sweep.failed_jobs:
        sys.exit(1)


def run_job(config: DictConfig) -> float | None:
    """Train once with a composed configuration.

    Parameters
    ----------
    config : DictConfig
        The composed configuration, without Hydra's own part.

    Returns
    -------
    float or None
        The hard accuracy on validation, for sweepers that optimise; None if the job failed in a sweep.
    """
    register_resolvers()
    os.environ[FULL_ERROR] = "1" if _full_error else "0"  # processes that a job starts are told what the user wants
    hydra_config = HydraConfig.get()
    sweep_name = Path(hydra_config.sweep.dir).name if hydra_config.mode == RunMode.MULTIRUN else None
    directory, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
    try:
        # a launcher's process starts without what the parent imported
        config.plugins = plugins.load_plugins(config.plugins)
        if config.plugins:
            plugins.offer_parts()
        from difflut_lab.training.run import run

        return run(config, overrides, directory, sweep_name)
    except Exception as error:
        if sweep_name:
            # the other jobs go on; the sweep's table and exit status tell
            (directory / "error.txt").write_text(traceback.format_exc())
            OmegaConf.save(OmegaConf.create(overrides), directory / "overrides.yaml")
            log.error("%s", error if isinstance(error, UserError) else traceback.format_exc())
            return None
        if isinstance(error, UserError):
            with suppress(OSError):
                directory.rmdir()  # nothing was started: leave no empty directory
            _stop(error)
        raise


def _stop(error: UserError) -> NoReturn:
    if _full_error:
        raise error
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)


def _overrides(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments; what does not parse is left for Hydra to complain about."""
    parser = OverridesParser.create()
    parsed = []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            continue
        try:
            parsed.append(parser.parse_override(argument))
        except HydraException:
            continue
    return parsed


def _with_quotes(argument: str) -> str:
    """An override whose value is a path that Hydra would take apart, such as those of run directories, in quotes."""
    key, _, value = argument.partition("=")
    if argument.startswith("-") or not set(value) & set(TAKEN_APART):
        return argument
    is_path = Path(value).exists() or (key.lstrip("+") in CHECKPOINTS and not _overrides([argument]))
    quoted = value.replace("'", r"\'")
    return f"{key}='{quoted}'" if is_path else argument


def _in_words(error: HydraException, overrides: Sequence[Override]) -> ConfigError:
    """What Hydra could not compose, in one line; for a key that does not exist, with those that do."""
    found = re.match(r"Could not override '([^']+)'", str(error))
    if not found or "defaults list" in str(error):
        return ConfigError(" ".join(str(error).split()))
    key = found.group(1)
    lines = [override.input_line or "" for override in overrides if not override.is_sweep_override()]
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = compose("train", [line for line in lines if _is_group(line)])
    parent, _, word = key.rpartition(".")
    siblings = OmegaConf.select(config, parent) if parent else config
    while siblings is None and parent:
        parent, _, word = parent.rpartition(".")
        siblings = OmegaConf.select(config, parent) if parent else config
    known = [str(name) for name in siblings] if isinstance(siblings, DictConfig) else []
    prefix = f"{parent}." if parent else ""
    if isinstance(siblings, DictConfig) and not known:
        return _why_not_added(key, lines) or ConfigError(
            f"Unknown key '{key}': {parent} is empty; to add to it, write +{key}=..."
        )
    library = isinstance(siblings, DictConfig) and "_target_" in siblings
    more = f" (other parameters of {siblings['_target_']}: +{prefix}NAME=...)" if library else ""
    return ConfigError(
        f"Unknown key '{key}'.{did_you_mean(word, known, prefix)} "
        f"Allowed keys: {', '.join(prefix + name for name in known)}{more}."
    )


def _why_not_added(key: str, lines: Sequence[str]) -> ConfigError | None:
    """What would be wrong with a key that is added to an empty mapping, if anything."""
    from difflut_lab.training.compose import resolve

    added = [f"+{line}" if line.startswith(f"{key}=") else line for line in lines]
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            resolve(compose("train", [line for line in added if not line.lstrip("+").startswith("hydra.")]), added)
    except ConfigError as error:
        return error
    except HydraException:
        return None
    return None


def _is_group(line: str) -> bool:
    return (config_directory() / line.lstrip("+").partition("=")[0].partition("@")[0]).is_dir()


def _plugin_names(overrides: Sequence[Override]) -> list[str]:
    for override in overrides:
        if override.key_or_group == "plugins":
            value = override.value()
            return [str(name) for name in value] if isinstance(value, list) else [str(value)]
    return []


def _check_directory(overrides: Sequence[Override]) -> None:
    """Refuse a directory that holds another run, unless that is the run to continue."""
    if "LOCAL_RANK" in os.environ:
        return  # a further process of a run that was checked
    typed = {override.key_or_group: str(override.value()) for override in overrides if not override.is_sweep_override()}
    for key, trace in (("hydra.run.dir", "config.yaml"), ("hydra.sweep.dir", "summary.csv")):
        directory = Path(typed.get(key, "."))
        if key in typed and (directory / trace).exists():
            if key == "hydra.run.dir" and directory.resolve() in Path(typed.get("ckpt", ".")).resolve().parents:
                continue
            raise ConfigError(f"{key}={directory}: holds another run already; name a new directory.")


def _check_choices(overrides: Sequence[Override]) -> None:
    """Name the choices of a group, and the nearest, before Hydra fails on one that does not exist."""
    for override in overrides:
        group = override.key_or_group
        known = plugins.choices(group) if (config_directory() / group).is_dir() else []
        if not known or override.is_delete():
            continue
        if group == "schedule" and not override.package:
            raise ConfigError(f"{override.input_line}: say what it moves, as in +schedule@schedules.head.tau=cosine.")
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
        for value in values:
            for choice in value if isinstance(value, list) else [value]:
                name = "null" if choice is None else str(choice).removesuffix(".yaml")
                if name not in known:
                    raise ConfigError(
                        f"Unknown {group} '{name}'.{did_you_mean(name, known)} Choices: {', '.join(known)}."
                    )
