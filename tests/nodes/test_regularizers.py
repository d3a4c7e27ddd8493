from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difflut_lab import REGISTRY, schema
from difflut_lab.errors import ConfigError
from difflut_lab.nodes import LUTNodes, TableNodes

NODES = REGISTRY.names("node")


def bank(name: str, regularizer: Any = None, **options: Any) -> LUTNodes:
    nodes = REGISTRY.get_node(name)(5, 2 if name == "difflogic" else 3, regularizer=regularizer, **options)
    assert isinstance(nodes, LUTNodes)
    return nodes


def walsh_energy(table: Tensor, power: float) -> float:
    """Coefficients by their definition, each with its number of members, in float64."""
    num_nodes, entries = table.shape
    energy = 0.0
    for node in range(num_nodes):
        for members in range(entries):
            coefficient = 0.0
            for address in range(entries):
                zeros = (members & ~address).bit_count()
                coefficient += float(table[node, address]) * (-1) ** zeros / entries
            energy += members.bit_count() ** power * coefficient**2
    return energy / num_nodes


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_spectral_is_the_energy_of_the_walsh_coefficients(n: int, power: float) -> None:
    table = torch.randn(3, 2**n, dtype=torch.float64, requires_grad=True)
    penalty = REGISTRY.build("regularizer", {"name": "spectral", "power": power})
    assert penalty(table).item() == pytest.approx(walsh_energy(table.detach(), power), rel=1e-12)
    assert torch.autograd.gradcheck(penalty, table)


def test_spectral_by_its_theorems() -> None:
    table = torch.randn(3, 64, dtype=torch.float64)
    neighbours = torch.arange(64).unsqueeze(1) ^ (1 << torch.arange(6))
    influence = (table.unsqueeze(2) - table[:, neighbours]).square().sum(2).mean() / 4
    torch.testing.assert_close(REGISTRY.build("regularizer", "spectral")(table), influence)
    plain = REGISTRY.build("regularizer", {"name": "spectral", "power": 0})(table)
    torch.testing.assert_close(plain, REGISTRY.build("regularizer", "l2")(table))


def test_norms() -> None:
    values = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, -6.0]])
    assert REGISTRY.build("regularizer", "l1")(values).item() == pytest.approx(16 / 6)
    assert REGISTRY.build("regularizer", "l2")(values).item() == pytest.approx(66 / 6)


@pytest.mark.parametrize("regularizer", REGISTRY.names("regularizer"))
@pytest.mark.parametrize("name", NODES)
def test_every_regularizer_with_every_node(name: str, regularizer: str) -> None:
    spec = {"name": regularizer, "weight": 0.5}
    if regularizer == "spectral" and not issubclass(REGISTRY.get_node(name), TableNodes):  # type: ignore[arg-type]  # classes
        with pytest.raises(ConfigError, match=r"regularizer=spectral: needs tables; \w+ have none"):
            bank(name, spec)
        return
    nodes, heavy = bank(name, spec), bank(name, spec | {"weight": 1.0})
    penalty = nodes.regularization()
    assert penalty.shape == () and penalty > 0
    torch.testing.assert_close(2 * penalty, heavy.regularization())
    penalty.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in nodes.parameters())
    assert nodes.regularized().shape[0] == 5
    nodes.freeze()
    assert nodes.regularization().item() == 0


@pytest.mark.parametrize("name", NODES)
def test_none_by_default(name: str) -> None:
    penalty = bank(name).double().regularization()
    assert penalty.shape == () and penalty.item() == 0 and penalty.dtype == torch.float64
    assert schema.validate_part("node", {"name": name}, "node")["regularizer"] is None


@pytest.mark.parametrize("name", ["probabilistic", "dwn", "dwn_stable", "hybrid", "difflogic", "warp"])
def test_norms_are_of_the_weights(name: str) -> None:
    nodes = bank(name, {"name": "l1", "weight": 1.0})
    torch.testing.assert_close(nodes.regularization(), nodes.get_parameter("weight").abs().mean())


def test_spectral_of_warp_weighs_its_coefficients_by_degree() -> None:
    nodes = bank("warp", {"name": "spectral", "weight": 1.0}, tau=0.5)
    degree = torch.tensor([members.bit_count() for members in range(8)])
    wanted = ((nodes.get_parameter("weight") / 0.5).square() * degree).sum(1).mean()
    torch.testing.assert_close(nodes.regularization(), wanted)


def test_of_nodes_without_a_table_all_parameters_count() -> None:
    class Affine(LUTNodes):
        def __init__(self, num_nodes: int, n: int = 6, *, regularizer: Any = None, seed: int = 42) -> None:
            super().__init__(num_nodes, n, regularizer=regularizer, seed=seed)
            self.slope = nn.Parameter(torch.full((num_nodes, n, 2), 3.0))
            self.offset = nn.Parameter(torch.full((num_nodes,), -1.0))

    nodes = Affine(4, 2, regularizer={"name": "l1", "weight": 2.0})
    assert nodes.regularized().shape == (4, 5)
    assert nodes.regularization().item() == pytest.approx(2 * (4 * 3 + 1) / 5)
    with pytest.raises(ConfigError, match="regularizer=spectral: needs tables; Affine have none"):
        Affine(4, 2, regularizer="spectral")


def test_options_are_checked_under_the_node() -> None:
    with pytest.raises(ConfigError, match=r"^node\.regularizer\.weight=-1: must be at least 0"):
        schema.validate_part("node", {"name": "dwn", "regularizer": {"name": "l1", "weight": -1}}, "node")
    with pytest.raises(ConfigError, match=r"Unknown regularizer 'l3' \(node\.regularizer\.name=l3\)"):
        schema.validate_part("node", {"name": "dwn", "regularizer": "l3"}, "node")
    checked = schema.validate_part("node", {"name": "dwn", "regularizer": "spectral"}, "node")
    assert checked["regularizer"] == {"name": "spectral", "weight": 1e-4, "power": 1.0}
