"""The butterfly of the extended finite difference gives its double sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflut_lab.ops import efd_table, interpolate
from difflut_lab.ops.efd import harmonic_efd_table


def double_sum(table: Tensor, alpha: float, beta: float) -> Tensor:
    """The definition: for every input and address, a signed sum over all entries."""
    num_nodes, entries = table.shape
    n = entries.bit_length() - 1
    out = torch.zeros(num_nodes, n, entries, dtype=table.dtype)
    for bit in range(n):
        for a in range(entries):
            for b in range(entries):
                distance = ((a ^ b) & ~(1 << bit)).bit_count()
                out[:, bit, a] += alpha * (1 if b >> bit & 1 else -1) * beta**distance * table[:, b]
    return out


@pytest.mark.parametrize("n", range(1, 7))
def test_equals_the_double_sum(n: int) -> None:
    table = torch.randn(3, 2**n, dtype=torch.float64)
    torch.testing.assert_close(efd_table(table), double_sum(table, 0.5 * 0.75 ** (n - 1), 1 / 3))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.3, 0.9), (-2.0, 0.5)])
def test_other_weights(alpha: float, beta: float) -> None:
    table = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(efd_table(table, alpha, beta), double_sum(table, alpha, beta))


@pytest.mark.parametrize("n", range(1, 9))
def test_is_half_the_multilinear_gradient_at_the_quarters(n: int) -> None:
    table = torch.randn(5, 2**n, dtype=torch.float64)
    address = torch.arange(2**n).unsqueeze(1)
    bits = address >> torch.arange(n) & 1
    x = (0.25 + 0.5 * bits.double()).repeat(1, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(interpolate(x, table).sum(), x)
    torch.testing.assert_close(efd_table(table), gradient.view(2**n, 5, n).permute(1, 2, 0) / 2)


def test_does_not_depend_on_its_own_bit() -> None:
    difference = efd_table(torch.randn(4, 64))
    for bit in range(6):
        halves = difference[:, bit].view(4, -1, 2, 1 << bit)
        assert torch.equal(halves[:, :, 0], halves[:, :, 1])


def test_types_and_autograd() -> None:
    table = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    difference = efd_table(table)
    assert difference.dtype == torch.float32
    assert not difference.requires_grad
    assert torch.equal(difference, efd_table(table.float()))


@pytest.mark.parametrize("beta", [1.0, -0.1, float("nan")])
def test_refuses_beta(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        efd_table(torch.zeros(1, 4), beta=beta)


def test_refuses_a_table_that_is_none() -> None:
    with pytest.raises(ValueError, match="entries"):
        efd_table(torch.zeros(1, 5))


def harmonic_double_sum(table: Tensor, scale: float) -> Tensor:
    """The definition: differences weighed by 1 / (distance + 1), weights that sum to half the scale."""
    num_nodes, entries = table.shape
    n = entries.bit_length() - 1
    out = torch.zeros(num_nodes, n, entries, dtype=table.dtype)
    for bit in range(n):
        for a in range(entries):
            weights = [1 / (((a ^ b) & ~(1 << bit)).bit_count() + 1) for b in range(entries)]
            total = sum(weights) / 2  # each of the other inputs' addresses occurs with both values of the bit
            for b in range(entries):
                out[:, bit, a] += scale / 2 * weights[b] / total * (1 if b >> bit & 1 else -1) * table[:, b]
    return out


@pytest.mark.parametrize("n", range(1, 8))
def test_harmonic_equals_the_double_sum(n: int) -> None:
    table = torch.randn(3, 2**n, dtype=torch.float64)
    wanted = harmonic_double_sum(table, 1.25)
    torch.testing.assert_close(harmonic_efd_table(table, 1.25), wanted)
    single = harmonic_efd_table(table.float(), 1.25)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, wanted.float())


def test_harmonic_weights_of_a_step_sum_to_half_the_scale() -> None:
    step = torch.tensor([[0.0, 1.0] * 32])
    torch.testing.assert_close(harmonic_efd_table(step, 3.0)[0, 0], torch.full((64,), 1.5))
    assert not harmonic_efd_table(step.clone().requires_grad_()).requires_grad
