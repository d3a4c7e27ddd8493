"""Every registered data set has a YAML file that says what its signature says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.registry import REGISTRY

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def read(path: Path) -> dict[str, Any]:
    """A YAML file as a plain dict; ``???`` stays what it is."""
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def test_files_and_names_are_the_same() -> None:
    built_in = {
        name for name in REGISTRY.names("data") if REGISTRY.get_data(name).__module__.startswith("difflut_lab.")
    }
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == built_in
    assert built_in == {"digits", "mnist", "fashion_mnist", "cifar10", "npz"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_says_what_the_signature_says(path: Path) -> None:
    values = read(path)
    assert values == schema.defaults("data", path.stem)
    assert next(iter(values)) == "name"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_is_valid_and_explains_every_option(path: Path) -> None:
    values = read(path) | ({"path": "arrays.npz"} if path.stem == "npz" else {})
    assert schema.validate_part("data", values, "data") == values
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("#", "name:"))]
    assert all(" # " in line for line in lines)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("digits", "test_fraction", 1.0),
        ("digits", "val_fraction", 0),
        ("mnist", "split_seed", -1),
        ("fashion_mnist", "val_fraction", float("nan")),
        ("npz", "folder", "arrays"),
    ],
)
def test_bad_options_are_refused_by_name(name: str, option: str, value: object) -> None:
    values = {"name": name, option: value} | ({"path": "arrays.npz"} if name == "npz" else {})
    with pytest.raises(ConfigError, match=f"data.{option}"):
        schema.validate_part("data", values, "data")
