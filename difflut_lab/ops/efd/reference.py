"""The input gradient of a hard lookup, as a table: the extended finite difference."""

from __future__ import annotations

import torch
from torch import Tensor

from difflut_lab.ops.shapes import compute_dtype, fan_in


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
    num_nodes, entries = table.shape
    if alpha is None:
        alpha = 0.5 * 0.75 ** (n - 1)
    spread = table.to(compute_dtype(table))
    for bit in range(n):
        low, high = spread.reshape(num_nodes, -1, 2, 1 << bit).unbind(2)
        spread = torch.stack((torch.add(low, high, alpha=beta), torch.add(high, low, alpha=beta)), dim=2)
    # This spreads over bit l too; the difference over bit l is then (1 - beta) times the one wanted.
    spread = spread.view(num_nodes, entries) * (alpha / (1 - beta))
    address = torch.arange(entries, device=table.device)
    bits = 1 << torch.arange(n, device=table.device).unsqueeze(1)
    neighbours = spread.index_select(1, (address ^ bits).flatten()).view(num_nodes, n, entries)
    signs = torch.where(address & bits != 0, 1.0, -1.0).to(spread.dtype)
    return torch.sub(spread.unsqueeze(1), neighbours).mul_(signs)
