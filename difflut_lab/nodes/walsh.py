"""The Walsh transform of the tables of a bank, by butterflies.

Shape letters: N nodes, n inputs per node, K = 2^n table entries. A set S of inputs is written as an address.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def walsh_table(coefficients: Tensor) -> Tensor:
    """Tables from their Walsh coefficients: ``H[a] = sum_S c[S] prod_{k in S} (2 a_k - 1)``.

    Parameters
    ----------
    coefficients : Tensor
        ``(N, K)``, bit k of a coefficient's index says whether input k is in S.

    Returns
    -------
    Tensor
        ``(N, K)``, address LSB first.
    """
    table: Tensor = _Walsh.apply(coefficients, False)
    return table


def walsh_coefficients(table: Tensor) -> Tensor:
    """Walsh coefficients ``(N, K)`` of tables ``(N, K)``, the inverse of ``walsh_table``."""
    sums: Tensor = _Walsh.apply(table, True)
    return sums / table.shape[1]


class _Walsh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        return _butterflies(values, transposed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Walsh.apply(gradient, not ctx.transposed), None


def _butterflies(values: Tensor, transposed: bool) -> Tensor:
    """Rows times the Kronecker power of [[1, 1], [-1, 1]], or of its transpose."""
    num_nodes, entries = values.shape
    # nodes innermost: every stage then adds long contiguous rows
    rows = values.t().contiguous()
    for bit in range(entries.bit_length() - 1):
        low, high = rows.view(-1, 2, 1 << bit, num_nodes).unbind(1)
        mixed = (low + high, high - low) if transposed else (low - high, low + high)
        rows = torch.stack(mixed, dim=1).view(entries, num_nodes)
    return rows.t().contiguous()
