"""The extended finite difference in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from difflut_lab.ops.shapes import compute_dtype, fan_in


def forward(table: Tensor, alpha: float, beta: float) -> Tensor:
    """See ``efd_table``."""
    n = fan_in(table)
    num_nodes, entries = table.shape
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
