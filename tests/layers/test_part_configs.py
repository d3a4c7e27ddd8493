"""The YAML files of layers, nodes, encoders and heads say what the classes say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from difflut_lab import REGISTRY, schema
from difflut_lab.layers import LayerConfig

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = [path for kind in ("layer", "node", "encoder", "head") for path in sorted((CONFIGS / kind).glob("*.yaml"))]


def read(path: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_hold_every_option_with_its_default(path: Path) -> None:
    kind, content = path.parent.name, read(path)
    wanted = schema.defaults(kind, path.stem)
    if kind == "node":
        # difflogic has gates of two inputs only
        assert content["n"] == (2 if path.stem == "difflogic" else "${fan_in}")
        content["n"] = wanted["n"]
    assert list(content) == list(wanted)
    if kind == "head":
        # a temperature that suits the default data set
        content["tau"] = wanted["tau"]
    assert content == wanted
    assert schema.validate_part(kind, content, kind)["name"] == path.stem


def test_every_built_in_part_has_a_file() -> None:
    for kind in ("layer", "node", "encoder", "head"):
        built_in = {
            name for name in REGISTRY.names(kind) if REGISTRY.get(kind, name).__module__.startswith("difflut_lab.")
        }
        assert {path.stem for path in FILES if path.parent.name == kind} == built_in


def test_layer_config() -> None:
    content = read(CONFIGS / "layer_config" / "default.yaml")
    assert LayerConfig(**content) == LayerConfig()
    assert schema.validate(LayerConfig, content, "layer_config") == content
