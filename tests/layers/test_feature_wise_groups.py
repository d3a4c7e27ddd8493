from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers import FeatureWiseGroups
from difflut_lab.layers.feature_wise_groups import grouped_wiring
from difflut_lab.seeding import generator


def sets(wiring: Tensor) -> list[set[int]]:
    return [set(row) - {-1} for row in wiring.tolist()]


@pytest.mark.parametrize("shape", [(24, 30, 6, 4), (25, 40, 6, 4), (7, 9, 3, 2), (10, 50, 4, 10), (12, 5, 6, 1)])
def test_groups_and_windows(shape: tuple[int, int, int, int]) -> None:
    inputs, nodes, n, num_groups = shape
    wiring = grouped_wiring(inputs, nodes, n, num_groups, generator(0))
    assert wiring.dtype == torch.int32 and wiring.shape == (nodes, n)
    # one group's nodes, enough of them, read a run of neighbours
    many = grouped_wiring(inputs, 50 * num_groups, n, num_groups, generator(0))
    assert torch.equal(many[: min(nodes, len(many))], wiring[: len(many)])
    groups = [set.union(*sets(many[group::num_groups])) for group in range(num_groups)]
    assert set.union(*groups) == set(range(inputs)) and sum(map(len, groups)) == inputs
    assert all(max(group) - min(group) == len(group) - 1 for group in groups)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    for node, row in enumerate(wiring.tolist()):
        size = len(groups[node % num_groups])
        read = [source for source in row if source >= 0]
        assert set(read) <= groups[node % num_groups]
        assert len(set(read)) == len(read) == min(n, size)
        assert row[size:] == [-1] * (n - size)


def test_windows_follow_a_permutation_and_wrap() -> None:
    wiring = grouped_wiring(10, 5, 4, 1, generator(3)).flatten().tolist()
    assert sorted(wiring[:10]) == list(range(10))
    assert wiring[10:] == wiring[:10]
    assert wiring[:10] != list(range(10))


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, 4),
        ({"num_groups": 5}, 5),
        ({"num_groups": "features", "bits_per_feature": 3}, 9),
        ({"bits_per_feature": 3}, 4),
    ],
)
def test_num_groups(options: dict[str, Any], groups: int) -> None:
    layer = FeatureWiseGroups(27, 20, n=6, **options)
    assert layer.num_groups == groups
    assert f"num_groups={groups}" in repr(layer)


def test_few_inputs_make_one_padded_group() -> None:
    layer = FeatureWiseGroups(3, 8, "dwn", n=6)
    assert layer.num_groups == 1
    assert (layer.wiring()[:, 3:] == -1).all() and (layer.wiring()[:, :3] >= 0).all()
    x = torch.randint(0, 2, (20, 3)).float()
    routed = layer.route(x)
    assert routed[:, :, 3:].count_nonzero() == 0
    assert torch.equal(layer.eval()(x), layer.nodes(routed))


def test_features() -> None:
    layer = FeatureWiseGroups(30, 20, n=4, num_groups="features", bits_per_feature=3)
    for node, row in enumerate(layer.wiring().tolist()):
        feature = node % 10
        assert sorted(row[:3]) == [3 * feature, 3 * feature + 1, 3 * feature + 2] and row[3] == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": "features"}, "only the layer after the encoder"),
        ({"num_groups": "features", "bits_per_feature": 4}, "27 inputs are no multiple of 4 bits"),
        ({"num_groups": "feature"}, "must be a number of at least 1, features, or null"),
        ({"num_groups": 28}, "at most 27"),
        ({"num_groups": 0}, "at least 1"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureWiseGroups(27, 20, n=6, **options)


@pytest.mark.parametrize("value", [0, -3, "feature", 2.5, True])
def test_configuration_is_checked_in_one_line(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        schema.validate_part("layer", {"name": "feature_wise_groups", "num_groups": value}, "layer")
    assert str(caught.value).startswith(f"layer.num_groups={value}: must be a number") and "\n" not in str(caught.value)
    for good in (None, 7, "features"):
        spec = {"name": "feature_wise_groups", "num_groups": good}
        assert schema.validate_part("layer", spec, "layer") == spec
