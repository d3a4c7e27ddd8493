"""Lookup written out in plain Python, to compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def look_up(table: Tensor, routed: Tensor) -> np.ndarray:
    """Entries of truth tables: input k of a node is bit k of its address, least significant first.

    Parameters
    ----------
    table : Tensor
        bool ``(N, 2^n)``.
    routed : Tensor
        What each node reads, ``(B, N, n)``; a bit is x >= 1/2.

    Returns
    -------
    ndarray
        bool ``(B, N)``.
    """
    entries, bits = table.cpu().numpy(), routed.detach().cpu().numpy() >= 0.5
    output = np.zeros(bits.shape[:2], dtype=bool)
    for node in range(bits.shape[1]):
        address = np.zeros(len(bits), dtype=np.int64)
        for slot in range(bits.shape[2]):
            address += bits[:, node, slot] * 2**slot
        output[:, node] = entries[node][address]
    return output


def read_inputs(x: Tensor, wiring: Tensor) -> Tensor:
    """What a wiring routes: ``(B, N, n)`` of inputs ``(B, F)``, 0 where the wiring is -1."""
    routed = x.new_zeros(len(x), *wiring.shape)
    for node, slots in enumerate(wiring.tolist()):
        for slot, source in enumerate(slots):
            if source >= 0:
                routed[:, node, slot] = x[:, source]
    return routed


def every_address(num_nodes: int, n: int) -> Tensor:
    """All inputs that nodes can have, ``(2^n, N, n)``; row a of node j is address a XOR j, so that nodes differ."""
    rows = np.arange(2**n)[:, None] ^ (np.arange(num_nodes)[None, :] % 2**n)
    bits = (rows[:, :, None] >> np.arange(n)) & 1
    return torch.from_numpy(bits.astype(np.float32))
