from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers import LayerConfig


def test_fields_and_defaults() -> None:
    assert dataclasses.asdict(LayerConfig()) == {
        "flip_probability": 0.0,
        "grad_stabilization": "none",
        "grad_target_std": 1.0,
        "grad_subtract_mean": False,
        "grad_epsilon": 1e-8,
    }


def test_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerConfig().flip_probability = 0.5  # type: ignore[misc]  # that is the test
    with pytest.raises(TypeError):
        LayerConfig(0.5)  # type: ignore[call-arg]  # that is the test


def test_batchwise_is_batch() -> None:
    assert LayerConfig(grad_stabilization="batchwise").grad_stabilization == "batch"  # type: ignore[arg-type]  # same
    checked = schema.validate(LayerConfig, {"grad_stabilization": "batchwise"}, "layer_config")
    assert checked["grad_stabilization"] == "batch"
    assert LayerConfig(**checked) == LayerConfig(grad_stabilization="batch")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("flip_probability", 1.5, "must be at least 0 and at most 1"),
        ("flip_probability", float("nan"), "must be"),
        ("flip_probability", True, "must be a number"),
        (
            "grad_stabilization",
            "layerwize",
            "must be one of none, layerwise, nodewise, batch. Did you mean 'layerwise'",
        ),
        ("grad_target_std", 0, "must be greater than 0"),
        ("grad_epsilon", -1e-8, "must be greater than 0"),
        ("grad_subtract_mean", "perhaps", "must be a valid boolean"),
    ],
)
def test_wrong_values(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^layer_config\.{field}={value}: {allowed}") as caught:
        LayerConfig(**{field: value})
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError, match=rf"^model.per_layer.0.layer_config\.{field}={value}: {allowed}"):
        schema.validate(LayerConfig, {field: value}, "model.per_layer.0.layer_config")


def test_unknown_field() -> None:
    with pytest.raises(ConfigError, match=r"'layer_config.flip_prob'.* Did you mean 'layer_config.flip_probability'"):
        schema.validate(LayerConfig, {"flip_prob": 0.1}, "layer_config")
