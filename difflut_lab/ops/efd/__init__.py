"""The input gradient of a hard lookup, as a table: the extended finite difference."""

from __future__ import annotations

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from difflut_lab.ops.dispatch import choose
from difflut_lab.ops.shapes import compute_dtype, fan_in


@torch.library.custom_op("difflut_lab::efd_table", mutates_args=())
def _efd_table(table: Tensor, alpha: float, beta: float) -> Tensor:
    return choose("efd", fan_in(table), table).forward(table, alpha, beta)


@_efd_table.register_fake
def _(table: Tensor, alpha: float, beta: float) -> Tensor:
    return table.new_empty((table.shape[0], fan_in(table), table.shape[1]), dtype=compute_dtype(table))


@torch.library.custom_op("difflut_lab::harmonic_efd_table", mutates_args=())
def _harmonic_efd_table(table: Tensor, alpha: float) -> Tensor:
    n = fan_in(table)
    forward = choose("efd", n, table).forward
    points, weights = leggauss((n + 1) // 2)
    total: Tensor | None = None
    # the rule is one for [-1, 1]
    for point, weight in zip(points.tolist(), weights.tolist(), strict=True):
        part: Tensor = forward(table, alpha * weight / 2, (1 + point) / 2)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


@_harmonic_efd_table.register_fake
def _(table: Tensor, alpha: float) -> Tensor:
    return table.new_empty((table.shape[0], fan_in(table), table.shape[1]), dtype=compute_dtype(table))


@torch.no_grad()
def efd_table(table: Tensor, alpha: float | None = None, beta: float = 1 / 3) -> Tensor:
    """Extended finite difference of every node's table, in every input, at every address.

    ``D[j, l, a] = alpha * sum_b (-1)^(1 - b_l) table[j, b] * beta^H``, H the Hamming distance of a and b without bit l.
    Nothing is recorded for autograd.

    Parameters
    ----------
    table : Tensor
        ``(N, 2^n)``, address LSB first.
    alpha : float, optional
        Scale; ``0.5 * 0.75^(n - 1)`` by default, which makes the weights of an address sum to 1/2 at ``beta = 1/3``.
    beta : float
        What one further differing bit weighs, in ``[0, 1)``.

    Returns
    -------
    Tensor
        ``(N, n, 2^n)``, float32 (float64 for a float64 table).

    Raises
    ------
    ValueError
        If ``beta`` is not in ``[0, 1)`` or the width of the table is not a power of two.

    References
    ----------
    Bacellar et al., Differentiable Weightless Neural Networks, arXiv:2410.11112.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta={beta}: must be at least 0 and less than 1.")
    n = fan_in(table)
    return _efd_table(table.detach(), 0.5 * 0.75 ** (n - 1) if alpha is None else alpha, beta)


@torch.no_grad()
def harmonic_efd_table(table: Tensor, scale: float = 1.0) -> Tensor:
    """Extended finite difference whose weights fall with the distance as 1 / (H + 1), instead of as beta^H.

    ``D[j, l, a] = scale / (2 Z) * sum_b (-1)^(1 - b_l) table[j, b] / (H + 1)``, H the Hamming distance of a and b
    without bit l and ``Z = (2^n - 1) / n`` the sum of the weights of an address. Nothing is recorded for autograd.

    1 / (H + 1) is the integral of beta^H over beta from 0 to 1, and H is at most n - 1: a Gauss-Legendre rule of
    ceil(n / 2) points is exact, so that as many differences with decaying weights add up to this one.

    Parameters
    ----------
    table : Tensor
        ``(N, 2^n)``, address LSB first.
    scale : float
        Scale; the weights of an address sum to half of it.

    Returns
    -------
    Tensor
        ``(N, n, 2^n)``, float32 (float64 for a float64 table).

    Raises
    ------
    ValueError
        If the width of the table is not a power of two.
    """
    n = fan_in(table)
    return _harmonic_efd_table(table.detach(), 0.5 * scale * n / (2**n - 1))
