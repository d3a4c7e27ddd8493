from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from difflut_lab.nodes import LinearLUTNodes


def reference(nodes: LinearLUTNodes, node: int, x: list[float]) -> float:
    """w.x + b of one node and one sample, a product at a time."""
    total = nodes.bias[node, 0].item()
    for k, value in enumerate(x):
        total += nodes.weight[node, k].item() * value
    return total


def bank(num_nodes: int, n: int) -> LinearLUTNodes:
    nodes = LinearLUTNodes(num_nodes, n).double()
    with torch.no_grad():
        nodes.bias.add_(torch.randn(num_nodes, 1).double())
    return nodes


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_every_address(n: int) -> None:
    nodes = bank(3, n)
    bits = [list(reversed(word)) for word in itertools.product([0.0, 1.0], repeat=n)]
    wanted = torch.tensor([[reference(nodes, node, x) for x in bits] for node in range(3)], dtype=torch.float64)
    rows = torch.tensor(bits, dtype=torch.float64)
    torch.testing.assert_close(nodes(rows.unsqueeze(1).expand(-1, 3, -1)), torch.sigmoid(wanted).t())
    assert torch.equal(nodes.truth_table(), wanted >= 0)
    assert torch.equal(nodes.eval()(rows.unsqueeze(1).expand(-1, 3, -1)), (wanted >= 0).double().t())


def test_between_and_outside_of_bits() -> None:
    nodes = bank(4, 6)
    x = 3 * torch.rand(20, 4, 6, dtype=torch.float64) - 1
    y = nodes(x)
    for sample in range(20):
        for node in range(4):
            inside = x[sample, node].clamp(0, 1).tolist()
            wanted = torch.sigmoid(torch.tensor(reference(nodes, node, inside), dtype=torch.float64))
            torch.testing.assert_close(y[sample, node], wanted)


def test_gradients() -> None:
    nodes = bank(3, 4)
    x = torch.rand(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(nodes, {"weight": weight, "bias": bias}, (x,))
        return y

    assert torch.autograd.gradcheck(run, (x, nodes.weight, nodes.bias))


@pytest.mark.parametrize("initializer", ["kaiming", "normal", "uniform"])
def test_starts_with_half_of_each_table(initializer: str) -> None:
    table = LinearLUTNodes(200, 5, initializer=initializer).truth_table()
    assert torch.equal(table.sum(1), torch.full((200,), 16))


def test_residual_copies_the_first_input() -> None:
    nodes = LinearLUTNodes(3, 4, initializer={"name": "residual", "clarity": 2.0})
    first_input = torch.arange(16) & 1
    torch.testing.assert_close(nodes.real_table(), (4.0 * first_input - 2).expand(3, -1))


def test_spectral_regularisation_reads_the_logits() -> None:
    nodes = LinearLUTNodes(3, 4, regularizer="spectral")
    nodes.regularization().backward()
    assert nodes.weight.grad is not None and nodes.weight.grad.abs().sum() > 0
