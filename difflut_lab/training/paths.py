"""Where configurations come from and where runs go."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# characters of a directory's name that overrides may take: file systems stop at 255, wandb's groups at 128
WORDS_LENGTH = 80


def config_directory() -> Path:
    """The Hydra tree: inside an installed package, or beside the package in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def override_words(overrides: Sequence[str]) -> str:
    """The overrides as a piece of a file name: ``layer=random_routing,node.n=4``, shortened when long."""
    bare = (re.sub(r"[\[\]{}()'\" ]|^\++", "", override) for override in overrides)
    words = ",".join(re.sub(r"[^\w.=,+-]+", "-", override) for override in bare)
    return words if len(words) <= WORDS_LENGTH else words[: WORDS_LENGTH - 1] + "~"


def config_hash(config: Any) -> str:
    """Eight hexadecimal digits that identify a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:8]


def register_resolvers() -> None:
    """Register the interpolation that ``train.yaml`` names directories with."""
    OmegaConf.register_new_resolver("job_words", _job_words, replace=True)


class ClaimDirectory(Callback):
    """Hydra callback: gives the run or the sweep a directory that no other has, unless the user named one."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Claim ``hydra.run.dir``."""
        if not _is_typed("hydra.run.dir", config):
            config.hydra.run.dir = claim(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Claim ``hydra.sweep.dir``, for all jobs."""
        if not _is_typed("hydra.sweep.dir", config):
            config.hydra.sweep.dir = claim(config.hydra.sweep.dir)
            # every job is composed anew, from these
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{config.hydra.sweep.dir}'")


def claim(directory: str) -> str:
    """Make a directory, a number added to its name where there is one already, and return its path."""
    Path(directory).parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = Path(directory if number == 1 else f"{directory}_{number}")
        with suppress(FileExistsError):
            path.mkdir()  # one of two processes fails: two starts in one second never share a directory
            return str(path)
    raise AssertionError  # count has no end


def _is_typed(key: str, config: DictConfig) -> bool:
    return any(override.lstrip("+").startswith(f"{key}=") for override in config.hydra.overrides.hydra)


def _job_words(*, _root_: DictConfig) -> str:
    """The typed overrides and the hash of the resolved configuration."""
    words = override_words(_root_.hydra.overrides.task)
    task = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    try:
        content = OmegaConf.to_container(task, resolve=True)
    except OmegaConfBaseException:
        content = OmegaConf.to_container(task, resolve=False)  # the run itself reports what does not resolve
    return "_".join(part for part in (words, config_hash(content)) if part)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it, complete and synced to disk, when the block ends well."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def git_revision() -> str | None:
    """The commit of the working directory, ``-dirty`` added where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
