from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.nodes import PolyLUTNodes
from difflut_lab.nodes.walsh import walsh_coefficients


def reference(nodes: PolyLUTNodes, node: int, x: list[float]) -> float:
    """The polynomial of one node at one sample, a monomial at a time, the sets of inputs from itertools."""
    n = len(x)
    sets = [inputs for size in range(nodes.degree + 1) for inputs in itertools.combinations(range(n), size)]
    sets.sort(key=lambda inputs: sum(1 << k for k in inputs))
    assert len(sets) == nodes.weight.shape[1]
    return sum(
        weight * math.prod(x[k] for k in inputs)
        for weight, inputs in zip(nodes.weight[node].tolist(), sets, strict=True)
    )


@pytest.mark.parametrize(("degree", "terms"), list(enumerate([7, 22, 42, 57, 63, 64, 64], start=1)))
def test_number_of_monomials(degree: int, terms: int) -> None:
    nodes = PolyLUTNodes(2, 6, degree=degree)
    assert nodes.weight.shape == (2, terms)
    assert sum(parameter.numel() for parameter in nodes.parameters()) == 2 * terms


@pytest.mark.parametrize(("n", "degree"), [(1, 1), (3, 2), (5, 1), (5, 3), (5, 5), (9, 2)])
def test_every_address(n: int, degree: int) -> None:
    nodes = PolyLUTNodes(3, n, degree=degree).double()
    bits = [list(reversed(word)) for word in itertools.product([0.0, 1.0], repeat=n)]
    wanted = torch.tensor([[reference(nodes, node, x) for x in bits] for node in range(3)], dtype=torch.float64)
    routed = torch.tensor(bits, dtype=torch.float64).unsqueeze(1).expand(-1, 3, -1)
    torch.testing.assert_close(nodes(routed), torch.sigmoid(wanted).t())
    assert wanted.abs().min() > 1e-9
    assert torch.equal(nodes.truth_table(), wanted >= 0)
    assert torch.equal(nodes.eval()(routed), (wanted >= 0).double().t())


@pytest.mark.parametrize("degree", [1, 2, 4, 6])
def test_between_and_outside_of_bits(degree: int) -> None:
    nodes = PolyLUTNodes(3, 6, degree=degree).double()
    x = 3 * torch.rand(10, 3, 6, dtype=torch.float64) - 1
    y = nodes(x)
    for sample in range(10):
        for node in range(3):
            inside = x[sample, node].clamp(0, 1).tolist()
            wanted = torch.sigmoid(torch.tensor(reference(nodes, node, inside), dtype=torch.float64))
            torch.testing.assert_close(y[sample, node], wanted)


@pytest.mark.parametrize("degree", [2, 4])
def test_gradients(degree: int) -> None:
    nodes = PolyLUTNodes(3, 4, degree=degree).double()
    x = torch.rand(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(nodes, {"weight": weight}, (x,))
        return y

    assert torch.autograd.gradcheck(run, (x, nodes.weight))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_initial_logits_are_alike_at_every_address(degree: int) -> None:
    table = PolyLUTNodes(4000, 4, degree=degree, initializer={"name": "normal", "std": 0.5}).real_table()
    terms = sum(math.comb(4, size) for size in range(degree + 1))
    wanted = torch.full((16,), 0.5 * math.sqrt(terms))
    torch.testing.assert_close(table.std(0), wanted, rtol=0.06, atol=0)


def test_an_initial_table_is_cut_to_the_degree() -> None:
    nodes = PolyLUTNodes(3, 4, initializer="residual")
    torch.testing.assert_close(nodes.real_table(), (2.0 * (torch.arange(16) & 1) - 1).expand(3, -1))
    coefficients = walsh_coefficients(PolyLUTNodes(3, 4, initializer="variance_stabilized").real_table())
    high = [address.bit_count() > 2 for address in range(16)]
    torch.testing.assert_close(coefficients[:, high], torch.zeros(3, sum(high)))
    assert (coefficients[:, [not flag for flag in high]] != 0).any()


def test_degree_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"^node\.degree=0: must be at least 1"):
        schema.validate_part("node", {"name": "polylut", "degree": 0}, "node")
