from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from difflut_lab.training.paths import config_directory, register_resolvers

# a run of a second: few epochs, no logger, and a small network where a test does not choose its own
SHORT = ["trainer=cpu", "trainer.max_epochs=2", "logger=none"]
SMALL = ["model.widths=[40,20]"]


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """Composes overrides as the command line does."""
    register_resolvers()

    def from_overrides(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            return compose("train", list(overrides))

    return from_overrides


@pytest.fixture
def train(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Path]:
    """Trains in this process and returns the run directory."""
    from difflut_lab.training.run import run

    def with_overrides(*overrides: str, name: str = "run", **options: Any) -> Path:
        chosen = any(word.startswith("model=") for word in overrides)
        words = [*([] if chosen else SMALL), *SHORT, *overrides]
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        run(composed(*words), words, directory, **options)
        return directory

    return with_overrides
