from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from difflut_lab import REGISTRY, schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers.random_routing import RandomRouting
from difflut_lab.nodes import LUTNodes, TableNodes
from difflut_lab.seeding import generator

SHAPE = (200, 64)
TABLES = [
    name
    for name in REGISTRY.names("node")
    if issubclass(REGISTRY.get_node(name), TableNodes)  # type: ignore[arg-type]  # nodes are classes
]


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


@pytest.mark.parametrize(("name", "value"), [("zeros", 0.0), ("ones", 1.0)])
def test_constants(name: str, value: float) -> None:
    assert torch.equal(REGISTRY.build("initializer", name)(SHAPE, generator(0)), torch.full(SHAPE, value))


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_xavier_and_kaiming(gain: float) -> None:
    xavier = REGISTRY.build("initializer", {"name": "xavier", "gain": gain})(SHAPE, generator(0))
    bound = gain * math.sqrt(6 / (64 + 1))
    assert bound * 0.99 < xavier.abs().max() <= bound
    assert xavier.var().item() == pytest.approx(gain**2 * 2 / (64 + 1), rel=0.03)
    kaiming = REGISTRY.build("initializer", {"name": "kaiming", "gain": gain})(SHAPE, generator(0))
    assert kaiming.var().item() == pytest.approx(gain**2 / 64, rel=0.05)
    assert REGISTRY.build("initializer", "kaiming").gain == pytest.approx(math.sqrt(2))


def bank(name: str, initializer: Any, n: int = 3) -> TableNodes:
    nodes = REGISTRY.get_node(name)(7, 2 if name == "difflogic" else n, initializer=initializer)
    assert isinstance(nodes, TableNodes)
    return nodes


def all_inputs(n: int) -> Tensor:
    """Every address as bits, the same for every node: ``(2^n, 7, n)``."""
    return (torch.arange(2**n).unsqueeze(1) >> torch.arange(n) & 1).float().unsqueeze(1).repeat(1, 7, 1)


@pytest.mark.parametrize("initializer", REGISTRY.names("initializer"))
@pytest.mark.parametrize("name", TABLES)
def test_every_initializer_with_every_table(name: str, initializer: str) -> None:
    nodes = bank(name, initializer)
    x = torch.rand(20, 7, nodes.n, requires_grad=True)
    y = nodes(x)
    gradient = torch.autograd.grad(y.sum(), nodes.weight)[0]
    assert torch.isfinite(y).all() and torch.isfinite(gradient).all()
    assert torch.equal(nodes.eval()(all_inputs(nodes.n)), nodes.truth_table().t().float())


@pytest.mark.parametrize("name", TABLES)
def test_residual_copies_the_first_input(name: str) -> None:
    nodes = bank(name, {"name": "residual", "clarity": 3.0})
    x = all_inputs(nodes.n)
    if name == "dwn":
        assert torch.equal(nodes(x), x[:, :, 0])
        assert torch.equal(nodes.weight, torch.tensor([-1.0, 1.0] * 4).expand(7, -1))
    else:
        # clarity is the logit of what is passed on, whatever the parameters are
        torch.testing.assert_close(nodes(x), torch.sigmoid(3 * (2 * x[:, :, 0] - 1)))
    assert torch.equal(nodes.eval()(x), x[:, :, 0])


def test_residual_in_the_parameters() -> None:
    weight = REGISTRY.build("initializer", {"name": "residual", "clarity": 3.0})((2, 8), generator(0))
    assert torch.equal(weight, torch.tensor([-3.0, 3.0] * 4).expand(2, -1))
    # the gate that is the first input is number 10, the set of the first input alone is number 1
    assert (bank("difflogic", "residual").weight.argmax(1) == 10).all()
    single = torch.zeros(7, 8)
    single[:, 1] = 1.0
    torch.testing.assert_close(bank("warp", "residual").weight.detach(), single)


@pytest.mark.parametrize("kept", [0.5, 0.9])
@pytest.mark.parametrize("name", ["dwn", "dwn_stable", "difflogic", "hybrid", "probabilistic", "warp"])
def test_variance_stabilized_keeps_the_variance_of_random_bits(name: str, kept: float) -> None:
    nodes = bank(name, {"name": "variance_stabilized", "kept": kept}, n=6)
    # over all inputs, alike often, in every node
    x = all_inputs(nodes.n)
    y, bit = nodes(x), nodes.eval()(x)
    torch.testing.assert_close(y.mean(0), torch.full((7,), 0.5))
    expected = 1.0 if name == "dwn" else kept
    torch.testing.assert_close(y.var(0, correction=0), torch.full((7,), expected / 4))
    torch.testing.assert_close(bit.var(0, correction=0), torch.full((7,), 0.25))
    assert len(set(map(tuple, bit.t().tolist()))) > 1


def test_tables_make_no_sense_for_nodes_without_one() -> None:
    class Threshold(LUTNodes):
        def __init__(self, num_nodes: int, n: int = 6, *, initializer: Any = "normal", seed: int = 42) -> None:
            super().__init__(num_nodes, n, seed=seed)
            self.weight = nn.Parameter(self.initial_values(initializer, (num_nodes, n)))

    assert Threshold(3, 4).get_parameter("weight").shape == (3, 4)
    for initializer in ("residual", "variance_stabilized"):
        with pytest.raises(ConfigError, match=rf"initializer={initializer}: makes tables; Threshold have none"):
            Threshold(3, 4, initializer=initializer)


def test_residual_makes_a_deep_stack_train() -> None:
    """Six layers, 40 steps on digits: from normal draws, outputs do not depend on the input yet."""
    data = load_digits()
    pixels, label = torch.tensor(data.data).float(), torch.tensor(data.target)
    x = torch.cat([(pixels > threshold).float() for threshold in (4, 8, 12)], dim=1)

    def train(initializer: Any) -> tuple[float, float]:
        layers = [
            RandomRouting(100 if i else 192, 100, "probabilistic", 6, {"initializer": initializer}, seed=i)
            for i in range(6)
        ]
        model = nn.Sequential(*layers)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        order = torch.Generator().manual_seed(3)
        for _ in range(40):
            batch = torch.randint(0, 1200, (128,), generator=order)
            loss = nn.functional.cross_entropy(model(x[batch]).view(128, 10, 10).sum(2) / 3, label[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        score = model.eval()(x[1200:]).view(-1, 10, 10).sum(2)
        return loss.item(), (score.argmax(1) == label[1200:]).float().mean().item()

    chance = math.log(10)
    # 40 steps of 0.02 over the temperature of 1/4 move a logit by up to 3.2, more than a clarity of 2; normal draws
    # need 0.1 to begin, and are then at 75 %, residual at 83 %
    loss, accuracy = train({"name": "residual", "clarity": 2.0})
    assert loss < 0.7 * chance and accuracy > 0.6
    loss, accuracy = train("normal")
    assert loss > 0.98 * chance and accuracy < 0.2


def test_options_are_checked_under_the_node() -> None:
    spec = {"name": "dwn", "initializer": {"name": "normal", "std": -1}}
    with pytest.raises(ConfigError, match=r"^node\.initializer\.std=-1: must be at least 0"):
        schema.validate_part("node", spec, "node")
    with pytest.raises(ConfigError, match=r"Unknown initializer 'residul' .*Did you mean 'residual'"):
        schema.validate_part("node", {"name": "dwn", "initializer": "residul"}, "node")
    checked = schema.validate_part("node", {"name": "dwn"}, "node")
    assert checked["initializer"] == {"name": "uniform", "low": -1.0, "high": 1.0}
