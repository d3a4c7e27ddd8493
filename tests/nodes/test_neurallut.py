from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.nodes import NeuralLUTNodes

SHAPES: list[dict[str, Any]] = [
    {"width": 5, "depth": 1, "skip": 0},
    {"width": 5, "depth": 1, "skip": 1},
    {"width": 4, "depth": 3, "skip": 0},
    {"width": 8, "depth": 2, "skip": 2},
    {"width": 3, "depth": 4, "skip": 2},
    {"width": 3, "depth": 3, "skip": 1},
]


def reference(nodes: NeuralLUTNodes, node: int, x: Tensor) -> Tensor:
    """The network of one node at one sample: matrices cut from the row of weights by hand, one vector at a time."""
    sizes = [nodes.n, *[nodes.width] * (nodes.depth - 1), 1]
    row, cut = nodes.weight[node].detach(), 0

    def take(*shape: int) -> Tensor:
        nonlocal cut
        count = torch.Size(shape).numel()
        cut += count
        return row[cut - count : cut].view(shape)

    matrices = [take(sizes[i + 1], sizes[i]) for i in range(nodes.depth)]
    biases = [take(sizes[i + 1]) for i in range(nodes.depth)]
    starts = range(0, nodes.depth, nodes.skip) if nodes.skip else range(0)
    bridges = {start: take(sizes[start + nodes.skip], sizes[start]) for start in starts}
    assert cut == len(row)
    values = [x]
    for index in range(nodes.depth):
        value = matrices[index] @ values[-1] + biases[index]
        start = index + 1 - nodes.skip
        if start in bridges:
            value = value + bridges[start] @ values[start]
        values.append(value.clamp(min=0) if index + 1 < nodes.depth else value)
    return values[-1].squeeze()


def bank(num_nodes: int, n: int, **options: Any) -> NeuralLUTNodes:
    nodes = NeuralLUTNodes(num_nodes, n, **options).double()
    with torch.no_grad():
        nodes.weight.add_(0.3 * torch.randn(nodes.weight.shape).double())
    return nodes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_address(shape: dict[str, Any]) -> None:
    nodes = bank(3, 5, **shape)
    bits = [list(reversed(word)) for word in itertools.product([0.0, 1.0], repeat=5)]
    x = torch.tensor(bits, dtype=torch.float64)
    wanted = torch.stack([torch.stack([reference(nodes, node, row) for row in x]) for node in range(3)])
    routed = x.unsqueeze(1).expand(-1, 3, -1)
    torch.testing.assert_close(nodes(routed), torch.sigmoid(wanted).t())
    assert wanted.abs().min() > 1e-9
    assert torch.equal(nodes.truth_table(), wanted >= 0)
    assert torch.equal(nodes.eval()(routed), (wanted >= 0).double().t())


def test_between_and_outside_of_bits() -> None:
    nodes = bank(3, 6)
    x = 3 * torch.rand(10, 3, 6, dtype=torch.float64) - 1
    y = nodes(x)
    for sample in range(10):
        for node in range(3):
            wanted = torch.sigmoid(reference(nodes, node, x[sample, node].clamp(0, 1)))
            torch.testing.assert_close(y[sample, node], wanted)


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4]], ids=str)
def test_gradients(shape: dict[str, Any]) -> None:
    nodes = bank(3, 3, **shape)
    x = torch.rand(5, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(nodes, {"weight": weight}, (x,))
        return y

    assert torch.autograd.gradcheck(run, (x, nodes.weight))


def test_more_addresses_than_are_tabulated_at_once() -> None:
    nodes = bank(2, 10)
    routed = torch.randint(0, 2, (300, 2, 10)).double()
    wanted = nodes(routed) >= 0.5
    assert torch.equal(nodes.eval()(routed), wanted.double())
    assert nodes.truth_table().shape == (2, 1024)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_initial_logits_are_standardised_over_the_addresses(shape: dict[str, Any]) -> None:
    nodes = NeuralLUTNodes(200, 4, **shape)
    addresses = torch.arange(16)
    bits = (addresses >> torch.arange(4).unsqueeze(1) & 1).float()
    logits = nodes.logits(bits.expand(200, -1, -1)).detach()
    torch.testing.assert_close(logits.mean(1), torch.zeros(200), rtol=0, atol=1e-5)
    std = logits.std(1, correction=0)
    # hidden units that are 0 at every address leave a node nothing to tell addresses apart by
    alive = std > 0.1
    assert alive.double().mean() > 0.6
    torch.testing.assert_close(std[alive], torch.ones(int(alive.sum())))


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"skip=2: must divide depth=3, or be 0"):
        NeuralLUTNodes(2, 3, depth=3, skip=2)
    for option, value in (("width", 0), ("depth", 0), ("skip", -1)):
        with pytest.raises(ConfigError, match=rf"^node\.{option}={value}: must be at least"):
            schema.validate_part("node", {"name": "neurallut", option: value}, "node")
