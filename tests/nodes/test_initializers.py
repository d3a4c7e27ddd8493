from __future__ import annotations

import math

import pytest
import torch

from difflut_lab import REGISTRY, schema
from difflut_lab.errors import ConfigError
from difflut_lab.seeding import generator

SHAPE = (200, 64)


@pytest.mark.parametrize("name", REGISTRY.names("initializer"))
def test_every_initializer(name: str) -> None:
    before = torch.random.get_rng_state()
    initialize = REGISTRY.build("initializer", name)
    first, again = (initialize(SHAPE, generator(3)) for _ in range(2))
    assert first.shape == SHAPE and first.dtype == torch.float32 and torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())
    assert schema.validate_part("initializer", name, "node.initializer")["name"] == name


def test_normal() -> None:
    weight = REGISTRY.build("initializer", {"name": "normal", "mean": 2.0, "std": 0.5})(SHAPE, generator(0))
    assert abs(weight.mean() - 2) < 5 * 0.5 / math.sqrt(weight.numel())
    assert abs(weight.std() - 0.5) < 0.02


def test_uniform() -> None:
    weight = REGISTRY.build("initializer", {"name": "uniform", "low": -0.5, "high": 2.0})(SHAPE, generator(0))
    assert -0.5 <= weight.min() < -0.49 and 1.99 < weight.max() <= 2
    with pytest.raises(ConfigError, match=r"low=1.0 must be below high=1.0"):
        REGISTRY.build("initializer", {"name": "uniform", "low": 1.0})


def test_residual_copies_the_first_input() -> None:
    weight = REGISTRY.build("initializer", {"name": "residual", "clarity": 3.0})((2, 8), generator(0))
    assert torch.equal(weight, torch.tensor([-3.0, 3.0] * 4).expand(2, -1))
    nodes = REGISTRY.get_node("probabilistic")(7, 4, initializer={"name": "residual", "clarity": 5.0}).eval()
    x = torch.randint(0, 2, (30, 7, 4)).float()
    assert torch.equal(nodes(x), x[:, :, 0])


def test_options_are_checked_under_the_node() -> None:
    spec = {"name": "dwn", "initializer": {"name": "normal", "std": -1}}
    with pytest.raises(ConfigError, match=r"^node\.initializer\.std=-1: must be at least 0"):
        schema.validate_part("node", spec, "node")
    with pytest.raises(ConfigError, match=r"Unknown initializer 'residul' .*Did you mean 'residual'"):
        schema.validate_part("node", {"name": "dwn", "initializer": "residul"}, "node")
    checked = schema.validate_part("node", {"name": "dwn"}, "node")
    assert checked["initializer"] == {"name": "uniform", "low": -1.0, "high": 1.0}
