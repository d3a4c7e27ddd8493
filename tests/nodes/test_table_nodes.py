"""Nodes with a table do what their formulas say: outputs and gradients, at all bits and between them, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab import REGISTRY
from difflut_lab.errors import ConfigError
from difflut_lab.nodes import DiffLogicNodes, TableNodes
from difflut_lab.ops import Flips, Wiring, flip_mask

NODES = 4
TABLES = [
    name
    for name in REGISTRY.names("node")
    if issubclass(REGISTRY.get_node(name), TableNodes)  # type: ignore[arg-type]  # nodes are classes
]
UNFIT = [("difflogic", 3), ("difflogic", 6)]

# The 16 gates of two inputs as real functions; gate f has the output for inputs (a, b) in bit a + 2 b of f.
GATES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: 0 * a,
    lambda a, b: 1 - (a + b - a * b),
    lambda a, b: a * (1 - b),
    lambda a, b: 1 - b,
    lambda a, b: b * (1 - a),
    lambda a, b: 1 - a,
    lambda a, b: a + b - 2 * a * b,
    lambda a, b: 1 - a * b,
    lambda a, b: a * b,
    lambda a, b: 1 - (a + b - 2 * a * b),
    lambda a, b: a,
    lambda a, b: 1 - b + a * b,
    lambda a, b: b,
    lambda a, b: 1 - a + a * b,
    lambda a, b: a + b - a * b,
    lambda a, b: 1 + 0 * a,
]


def bank(name: str, n: int, **options: Any) -> TableNodes:
    nodes = REGISTRY.get_node(name)(NODES, n, initializer={"name": "normal", "std": 1.0}, **options).double()
    assert isinstance(nodes, TableNodes)
    return nodes


def corners(n: int) -> Tensor:
    """All 2^n inputs, the same for every node: ``(2^n, NODES, n)``."""
    bits = [[address >> k & 1 for k in range(n)] for address in range(2**n)]
    return torch.tensor(bits, dtype=torch.float64).unsqueeze(1).repeat(1, NODES, 1)


def inputs(n: int) -> Tensor:
    """All bits, then values between them."""
    return torch.cat([corners(n), torch.rand(20, NODES, n, dtype=torch.float64)]).requires_grad_()


def interpolated(x: Tensor, table: Tensor) -> Tensor:
    """The textbook's sum over all entries."""
    y = torch.zeros(x.shape[:2], dtype=x.dtype)
    for address in range(table.shape[1]):
        product = torch.ones_like(y)
        for k in range(x.shape[2]):
            product = product * (x[:, :, k] if address >> k & 1 else 1 - x[:, :, k])
        y = y + table[:, address] * product
    return y


def addresses(x: Tensor) -> Tensor:
    return ((x >= 0.5).long() << torch.arange(x.shape[2])).sum(dim=2)


def probabilistic(x: Tensor, weight: Tensor) -> Tensor:
    return interpolated(x, torch.sigmoid(weight / 0.7))


def warp(x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(x.shape[:2], dtype=x.dtype)
    for members in range(weight.shape[1]):
        product = torch.ones_like(total)
        for k in range(x.shape[2]):
            if members >> k & 1:
                product = product * (2 * x[:, :, k] - 1)
        total = total + weight[:, members] * product
    return torch.sigmoid(total / 0.7)


def difflogic(x: Tensor, weight: Tensor) -> Tensor:
    share = weight.softmax(dim=1)
    return sum((share[:, f] * gate(x[:, :, 0], x[:, :, 1]) for f, gate in enumerate(GATES)), torch.zeros(()))


SOFT = [
    *(("probabilistic", n, {"temperature": 0.7}, probabilistic) for n in (1, 2, 3, 6)),
    *(("warp", n, {"tau": 0.7}, warp) for n in (1, 2, 3, 6)),
    ("difflogic", 2, {}, difflogic),
]


@pytest.mark.parametrize(("name", "n", "options", "formula"), SOFT)
def test_outputs_and_gradients_of_soft_nodes(
    name: str, n: int, options: dict[str, Any], formula: Callable[[Tensor, Tensor], Tensor]
) -> None:
    nodes, x = bank(name, n, **options), inputs(n)
    y, wanted = nodes(x), formula(x, nodes.weight)
    torch.testing.assert_close(y, wanted)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, nodes.weight], upstream)
    for gradient, right in zip(got, torch.autograd.grad(wanted, [x, nodes.weight], upstream), strict=True):
        torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize(("name", "n", "options"), [part[:3] for part in SOFT if part[1] in (2, 3)])
def test_gradients_are_those_of_small_differences(name: str, n: int, options: dict[str, Any]) -> None:
    nodes = bank(name, n, **options)
    x = (0.1 + 0.8 * torch.rand(3, NODES, n, dtype=torch.float64)).requires_grad_()

    def outputs(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(nodes, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(outputs, (x, nodes.weight))


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_hybrid_looks_up_with_the_gradients_of_interpolation(n: int) -> None:
    nodes, x = bank("hybrid", n), inputs(n)
    table = torch.sigmoid(nodes.weight)
    y = nodes(x)
    assert torch.equal(y, table.detach().gather(1, addresses(x).t()).t())
    with torch.no_grad():
        assert torch.equal(nodes(x), y)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, nodes.weight], upstream)
    wanted = torch.autograd.grad(interpolated(x, table), [x, nodes.weight], upstream)
    for gradient, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, right)


def test_both_halves_of_hybrid_see_the_same_flips() -> None:
    nodes = bank("hybrid", 3)
    flips = Flips(probability=0.4, seed=5, step=torch.tensor(7))
    x = torch.rand(50, NODES, 3, dtype=torch.float64, requires_grad=True)
    mask = flip_mask(flips, NODES, 3, 50).permute(2, 0, 1)
    flipped = torch.where(mask, 1 - x, x).detach().requires_grad_()
    wiring = Wiring(torch.arange(3 * NODES, dtype=torch.int32).view(NODES, 3), 3 * NODES)
    y, wanted = nodes.fused(x.flatten(1), wiring, flips), nodes(flipped)
    assert mask.any() and torch.equal(y, wanted)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, nodes.weight], upstream)
    # gradients are taken at the flipped value, and reach x as they are
    for gradient, right in zip(got, torch.autograd.grad(wanted, [flipped, nodes.weight], upstream), strict=True):
        torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_dwn_stable_looks_up_with_harmonic_differences(n: int) -> None:
    nodes, x = bank("dwn_stable", n, gradient_scale=2.0), inputs(n)
    table = torch.sigmoid(nodes.weight.detach())
    found = addresses(x)
    y = nodes(x)
    assert torch.equal(y, table.gather(1, found.t()).t())
    upstream = torch.randn_like(y)
    x_gradient, weight_gradient = torch.autograd.grad(y, [x, nodes.weight], upstream)

    looked_up = torch.zeros_like(table)
    wanted = torch.zeros_like(x)
    total = sum(math.comb(n - 1, distance) / (distance + 1) for distance in range(n))
    for node in range(NODES):
        for slot in range(n):
            for a in range(2**n):
                difference = 0.0
                for b in range(2**n):
                    distance = ((a ^ b) & ~(1 << slot)).bit_count()
                    difference += (1 if b >> slot & 1 else -1) * float(table[node, b]) / (distance + 1)
                at = found[:, node] == a
                # the weights sum to 1/2, times the scale of 2
                wanted[at, node, slot] = upstream[at, node] * difference / total
                looked_up[node, a] = upstream[at, node].sum()
    torch.testing.assert_close(x_gradient, wanted)
    torch.testing.assert_close(weight_gradient, looked_up * table * (1 - table))


@pytest.mark.parametrize(("name", "n"), [(name, n) for name in TABLES for n in (2, 3, 6) if (name, n) not in UNFIT])
def test_truth_table_is_the_sign_of_the_real_table_and_the_eval_forward(name: str, n: int) -> None:
    nodes = bank(name, n)
    table = nodes.truth_table()
    assert torch.equal(nodes.eval()(corners(n)), table.t().double())
    if name != "difflogic":
        assert torch.equal(nodes.real_table() >= 0, table)
        # a logit of 0 is a 1, whatever its sigmoid rounds to
        with torch.no_grad():
            for parameter in nodes.parameters():
                parameter.fill_(0.0)
        assert nodes.truth_table().all()


def test_difflogic_is_its_heaviest_gate() -> None:
    nodes = DiffLogicNodes(16, initializer="zeros")
    with torch.no_grad():
        nodes.weight.copy_(torch.eye(16))
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    wanted = torch.stack([gate(x[:, 0], x[:, 1]) for gate in GATES])
    assert torch.equal(nodes.truth_table(), wanted > 0)
    assert [nodes.truth_table()[f].tolist() for f in (8, 10, 12, 6, 14)] == [
        [False, False, False, True],
        [False, True, False, True],
        [False, False, True, True],
        [False, True, True, False],
        [False, True, True, True],
    ]
    # AND weighs most, but the mixture has a 1 wherever both OR and XOR do
    with torch.no_grad():
        nodes.weight.fill_(-9.0)
        nodes.weight[:, 8], nodes.weight[:, 14], nodes.weight[:, 6] = 1.0, 0.9, 0.9
    assert nodes.truth_table()[0].tolist() == [False, False, False, True]
    assert (nodes.real_table()[0] >= 0).tolist() == [False, True, True, True]


@pytest.mark.parametrize("n", [1, 3, 6])
def test_difflogic_has_two_inputs(n: int) -> None:
    with pytest.raises(ConfigError, match=rf"^n={n}: must be 2, the only choice"):
        DiffLogicNodes(3, n)


@pytest.mark.parametrize("name", ["hybrid", "dwn_stable", "difflogic", "warp"])
def test_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    nodes = REGISTRY.get_node(name)(5, 2)
    wiring = Wiring(torch.randint(0, 6, (5, 2), dtype=torch.int32), 6)
    x = torch.rand(9, 6, requires_grad=True)
    compiled = torch.compile(nodes.fused, fullgraph=True, backend="eager")
    outputs = [run(x, wiring) for run in (nodes.fused, compiled)]
    torch.testing.assert_close(outputs[1], outputs[0])
    gradients = [torch.autograd.grad(y.square().sum(), [x, nodes.weight]) for y in outputs]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)
