from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab import REGISTRY, schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers import soft
from difflut_lab.nodes import DWNNodes, LUTNodes, ProbabilisticNodes
from difflut_lab.ops import Flips, Wiring

NODES = REGISTRY.names("node")
FAN_INS = [1, 2, 3, 6]


def fan_in(name: str, n: int) -> int:
    return 2 if name == "difflogic" else n


def bank(name: str, num_nodes: int = 5, n: int | None = None, **options: Any) -> LUTNodes:
    n = fan_in(name, 3) if n is None else n
    nodes = REGISTRY.get_node(name)(num_nodes, n, **options)
    assert isinstance(nodes, LUTNodes)
    return nodes


def bits(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).float()


def looked_up(table: Tensor, routed: Tensor) -> Tensor:
    """Addresses least significant bit first, one sample and one node at a time."""
    batch, num_nodes, n = routed.shape
    output = torch.zeros(batch, num_nodes)
    for sample in range(batch):
        for node in range(num_nodes):
            address = sum(int(routed[sample, node, k] >= 0.5) << k for k in range(n))
            output[sample, node] = float(table[node, address])
    return output


def train(nodes: LUTNodes, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(nodes.parameters(), lr=0.3)
    for _ in range(steps):
        y = nodes(torch.rand(16, nodes.num_nodes, nodes.n, requires_grad=True))
        optimizer.zero_grad()
        (y - torch.rand_like(y)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "n"), [(name, n) for name in NODES for n in FAN_INS if n == fan_in(name, n)], ids=lambda value: str(value)
)
def test_eval_is_the_truth_table(name: str, n: int) -> None:
    nodes = bank(name, n=n)
    train(nodes)
    nodes.eval()
    routed = bits(40, 5, n)
    table = nodes.truth_table()
    assert table.dtype == torch.bool and table.shape == (5, 2**n)
    torch.testing.assert_close(nodes(routed), looked_up(table, routed), rtol=0, atol=0)
    wiring = Wiring(torch.arange(5 * n, dtype=torch.int32).view(5, n), 5 * n)
    torch.testing.assert_close(nodes.fused(routed.flatten(1), wiring), nodes(routed), rtol=0, atol=0)


# a difflogic node is its heaviest gate, not its mixture rounded
@pytest.mark.parametrize("name", [name for name in NODES if name != "difflogic"])
def test_truth_table_is_what_enumeration_of_the_relaxation_gives(name: str) -> None:
    nodes = bank(name, n=4)
    train(nodes)
    assert torch.equal(nodes.truth_table(), LUTNodes.tabulate(nodes))
    assert nodes.training


@pytest.mark.parametrize("name", NODES)
def test_every_parameter_leads_with_the_nodes_and_gets_a_gradient(name: str) -> None:
    nodes = bank(name)
    x = torch.rand(64, 5, nodes.n, requires_grad=True)
    nodes(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for parameter in nodes.parameters():
        assert parameter.shape[0] == 5
        assert parameter.grad is not None and (parameter.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", NODES)
def test_fused_equals_routed(name: str) -> None:
    first = bank(name)
    second = copy.deepcopy(first)
    indices = torch.randint(0, 7, (5, first.n), dtype=torch.int32)
    x = torch.rand(9, 7, requires_grad=True)
    upstream = torch.randn(9, 5)
    outputs, gradients = [], []
    for nodes, run in (
        (first, lambda nodes: nodes.fused(x, Wiring(indices, 7))),
        (second, lambda nodes: nodes(x[:, indices])),
    ):
        y = run(nodes)
        outputs.append(y)
        gradients.append(torch.autograd.grad(y, [x, *nodes.parameters()], upstream))
    torch.testing.assert_close(outputs[0], outputs[1])
    for fused, routed in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, routed)


@pytest.mark.parametrize("mode", ["train", "eval", "soft", "frozen"])
@pytest.mark.parametrize("name", NODES)
def test_views_agree_with_the_bank(name: str, mode: str) -> None:
    nodes = bank(name)
    train(nodes)
    nodes.train(mode == "train")
    nodes.soft = mode == "soft"
    if mode == "frozen":
        nodes.freeze()
    else:
        # beyond what dwn keeps, so that its clamp has work to do
        with torch.no_grad():
            for parameter in nodes.parameters():
                parameter.mul_(3)
    twin = copy.deepcopy(nodes)
    x = torch.rand(8, 5, nodes.n, requires_grad=True)
    whole = nodes(x)
    views = torch.cat([twin[j](x[:, j]) for j in range(len(twin))], dim=1)
    assert views.shape == (8, 5)
    torch.testing.assert_close(views, whole)
    for parameter, twin_parameter in zip(nodes.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin_parameter, rtol=0, atol=0)
    if mode not in ("train", "soft"):
        return
    upstream = torch.randn(8, 5)
    wanted = torch.autograd.grad(whole, [x, *nodes.parameters()], upstream)
    got = torch.autograd.grad(views, [x, *twin.parameters()], upstream)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_views_count_like_a_list() -> None:
    nodes = bank("dwn")
    x = bits(4, 3)
    assert len(nodes) == len(list(nodes)) == 5
    assert torch.equal(nodes[-1](x), nodes[4](x))
    with pytest.raises(IndexError, match="node 5 of a bank of 5"):
        nodes[5]
    with pytest.raises(ValueError, match=r"\(batch, 3\), got \(4, 5, 3\)"):
        nodes[0](bits(4, 5, 3))


@pytest.mark.parametrize("name", NODES)
def test_seeds(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = bank(name, seed=1), bank(name, seed=1), bank(name, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", NODES)
def test_freeze(name: str) -> None:
    nodes = bank(name)
    train(nodes)
    routed = bits(30, 5, nodes.n)
    nodes.eval()
    wanted, table = nodes(routed), nodes.truth_table()
    nodes.train()
    nodes.freeze()
    with torch.no_grad():
        for parameter in nodes.parameters():
            parameter.neg_()
    for training in (True, False):
        nodes.train(training)
        assert torch.equal(nodes(routed), wanted)
    with soft(nodes):
        assert torch.equal(nodes(routed), wanted)
    assert torch.equal(nodes.truth_table(), table)
    assert not any(parameter.requires_grad for parameter in nodes.parameters())

    fresh = bank(name, seed=7)
    fresh.freeze()
    fresh.load_state_dict(nodes.state_dict())
    assert torch.equal(fresh(routed), wanted)
    with pytest.raises(RuntimeError, match="frozen_table"):
        bank(name).load_state_dict(nodes.state_dict())


@pytest.mark.parametrize("name", NODES)
def test_copies_pickles_and_dtypes(name: str) -> None:
    nodes = bank(name).eval()
    routed = bits(20, 5, nodes.n)
    wanted = nodes(routed)
    for other in (copy.deepcopy(nodes), pickle.loads(pickle.dumps(nodes))):
        assert torch.equal(other(routed), wanted)
    nodes.to(torch.float64)
    assert torch.equal(nodes(routed.double()), wanted.double())
    assert nodes(routed.bool()).dtype == torch.float32
    nodes.train()
    assert nodes(routed.double()).dtype == torch.float64


@pytest.mark.parametrize("name", NODES)
def test_no_nan_outside_the_unit_interval(name: str) -> None:
    nodes = bank(name)
    x = (5 * torch.randn(30, 5, nodes.n)).requires_grad_()
    y = nodes(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("n", [0, -1, 13])
@pytest.mark.parametrize("name", NODES)
def test_fan_in_out_of_range(name: str, n: int) -> None:
    choices = "2, the only choice" if name == "difflogic" else "at (least 1 and at )?most 12"
    with pytest.raises(ConfigError, match=rf"^n={n}: must be {choices}"):
        bank(name, n=n)
    with pytest.raises(ConfigError, match=rf"^node.n={n}: must be {choices}"):
        schema.validate_part("node", {"name": name, "n": n}, "node")


def test_fan_in_says_what_it_costs() -> None:
    with pytest.raises(ConfigError) as caught:
        schema.validate_part("node", {"name": "dwn", "n": 20}, "node")
    assert str(caught.value) == (
        "node.n=20: must be at most 12; that is 1,048,576 entries per node, 4 MiB of float32 each, "
        "3.9 GiB for 1,000 nodes."
    )
    with pytest.raises(ConfigError, match=r"n=10000: .* 2\^10000 entries per node"):
        bank("dwn", n=10000)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("probabilistic", "temperature", 0),
        ("probabilistic", "temperature", float("nan")),
        ("dwn", "alpha", -1),
        ("dwn", "beta", 1),
        ("dwn", "beta", -0.1),
    ],
)
def test_options_are_checked(name: str, option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^node\.{option}={value}: "):
        schema.validate_part("node", {"name": name, option: value}, "node")


def test_unknown_option_of_a_hand_built_bank() -> None:
    with pytest.raises(TypeError, match="temperatur"):
        ProbabilisticNodes(4, 2, temperatur=1)  # type: ignore[call-arg]  # that is the test


def test_probabilistic_interpolates_the_sigmoids() -> None:
    nodes = bank("probabilistic", num_nodes=1, n=2, temperature=0.5)
    x = torch.tensor([[[0.3, 0.9]]])
    table = torch.sigmoid(nodes.get_parameter("weight")[0] / 0.5)
    wanted = 0.7 * 0.1 * table[0] + 0.3 * 0.1 * table[1] + 0.7 * 0.9 * table[2] + 0.3 * 0.9 * table[3]
    torch.testing.assert_close(nodes(x)[0, 0], wanted)


def efd(weight: Tensor, n: int, alpha: float, beta: float) -> Tensor:
    """The definition, address by address: ``(n, 2^n)``."""
    table = torch.zeros(n, 2**n)
    for slot in range(n):
        for address in range(2**n):
            for other in range(2**n):
                rest = (address ^ other) & ~(1 << slot)
                sign = 1 if other >> slot & 1 else -1
                table[slot, address] += alpha * sign * weight[other] * beta ** rest.bit_count()
    return table


@pytest.mark.parametrize(("alpha", "beta"), [(None, 1 / 3), (0.2, 0.5), (1.0, 0.0)])
def test_dwn_gradients(alpha: float | None, beta: float) -> None:
    nodes = DWNNodes(3, 3, alpha=alpha, beta=beta)
    x = torch.rand(6, 3, 3, requires_grad=True)
    upstream = torch.randn(6, 3)
    nodes(x).backward(upstream)
    weight = nodes.weight.detach()
    addresses = ((x >= 0.5).int() << torch.arange(3)).sum(-1)
    scale = 0.5 * 0.75**2 if alpha is None else alpha
    assert x.grad is not None and nodes.weight.grad is not None
    wanted = torch.zeros_like(weight)
    for node in range(3):
        differences = efd(weight[node], 3, scale, beta)
        for sample in range(6):
            address = int(addresses[sample, node])
            wanted[node, address] += upstream[sample, node]
            torch.testing.assert_close(x.grad[sample, node], upstream[sample, node] * differences[:, address])
    torch.testing.assert_close(nodes.weight.grad, wanted)


def test_dwn_has_no_gap_and_clamps_in_training_only() -> None:
    nodes = DWNNodes(8, 4)
    x = torch.rand(50, 8, 4)
    with torch.no_grad():
        nodes.weight.mul_(3)
    too_large = nodes.weight.detach().clone()
    nodes.eval()
    hard = nodes(x)
    with soft(nodes):
        assert torch.equal(nodes(x), hard)
    assert torch.equal(nodes.weight, too_large)
    nodes.train()
    assert torch.equal(nodes(x), hard)
    assert torch.equal(nodes.weight, too_large.clamp(-1, 1))


def test_dwn_clamps_its_initial_values() -> None:
    nodes = DWNNodes(4, 2, initializer={"name": "residual", "clarity": 5.0})
    assert torch.equal(nodes.weight, torch.tensor([-1.0, 1.0, -1.0, 1.0]).expand(4, -1))


def test_soft_and_hard_differ_and_soft_restores() -> None:
    nodes = bank("probabilistic")
    x = bits(20, 5, 3)
    relaxed = nodes(x)
    nodes.eval()
    hard = nodes(x)
    assert not torch.equal(hard, relaxed)
    nodes.train()
    with soft(nodes):
        assert torch.equal(nodes(x), relaxed)
    assert [nodes.training, nodes.soft] == [True, False]
    with pytest.raises(IndexError), soft(nodes):
        nodes[99]
    assert [nodes.training, nodes.soft] == [True, False]


def test_a_node_of_ones_own_needs_relaxed_only() -> None:
    class Mean(LUTNodes):
        def __init__(self, num_nodes: int, n: int = 6, *, seed: int = 42) -> None:
            super().__init__(num_nodes, n, seed=seed)
            self.scale = torch.nn.Parameter(torch.ones(num_nodes, 1))

        def relaxed(self, routed: Tensor) -> Tensor:
            return (routed * self.scale).mean(dim=2)

    nodes = Mean(4, 9)
    counts = torch.tensor([address.bit_count() for address in range(2**9)])
    assert torch.equal(nodes.truth_table(), (counts >= 4.5).expand(4, -1))
    x = bits(10, 4, 9)
    assert torch.equal(nodes.eval()(x), looked_up(nodes.truth_table(), x))
    nodes.train()
    torch.testing.assert_close(nodes[2](x[:, 2]), nodes(x)[:, 2:3])
    assert not nodes.can_fuse
    with pytest.raises(NotImplementedError, match="Mean"):
        nodes.fused(x.flatten(1), None, Flips(probability=0.1, seed=0, step=torch.tensor(0)))
