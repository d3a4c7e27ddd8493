"""Hard lookup in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from difflut_lab.ops.flips import Draw, unpack
from difflut_lab.ops.shapes import chunks, compute_dtype, feature_major
from difflut_lab.ops.wiring import gather_rows, sum_over_readers


def forward(
    x: Tensor,
    table: Tensor,
    n: int,
    indices: Tensor | None,
    padded: bool,
    draw: Draw | None,
    binary: bool = False,
) -> tuple[Tensor, Tensor]:
    """See ``lookup``; returns the entries and their addresses (uint8 up to n = 8, else int16), both ``(N, B)``."""
    if binary:
        table = (table >= 0).to(table.dtype)
    bits = feature_major((x >= 0.5).view(torch.uint8))
    num_nodes, batch = table.shape[0], x.shape[0]
    packed, sample_offset = None, 0
    if draw is not None:
        # a byte of 2, flipped or not, is no 1
        bits = bits.masked_fill(feature_major(x == -torch.inf), 2)
        packed, sample_offset = draw.packed(num_nodes, n, batch, x.device), draw.sample_offset
    address = torch.empty(num_nodes, batch, dtype=torch.uint8 if n <= 8 else torch.int16, device=x.device)
    y = table.new_empty(num_nodes, batch)
    for nodes in chunks(num_nodes, 2 * batch, x.device):
        routed = gather_rows(bits, indices, nodes, n)
        if packed is not None:
            routed = (routed ^ unpack(packed[nodes], sample_offset, batch)) == 1
        if padded and indices is not None:
            routed = routed.masked_fill((indices[nodes] < 0).unsqueeze(2), 0)
        part = address[nodes].copy_(routed[:, 0])
        for k in range(1, n):
            part |= routed[:, k].to(part.dtype) << k
        torch.gather(table[nodes], 1, part.long(), out=y[nodes])
    return y, address


def backward(
    gradient: Tensor,
    address: Tensor,
    entries: int,
    slope: Tensor | None,
    inverse: tuple[Tensor, Tensor] | None,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, as ``(F, B)``, and of the table ``(N, entries)``; None for one that is not wanted.

    ``slope`` is the input gradient as a table, ``(N, n, K)``.
    """
    dtype = compute_dtype(gradient)
    outputs = feature_major(gradient.to(dtype))
    num_nodes, batch = address.shape
    table_gradient = None
    if want_table:
        add = _add_scattered if address.device.type == "cpu" else _add_sorted
        table_gradient = add(address, outputs, entries)
    if not want_x or slope is None:
        return None, table_gradient
    slope = slope.to(dtype)
    n = slope.shape[1]
    slot_gradient = outputs.new_empty(num_nodes, n, batch)
    for nodes in chunks(num_nodes, 2 * n * batch, address.device):
        part = slot_gradient[nodes]
        torch.gather(slope[nodes], 2, address[nodes].long().unsqueeze(1).expand(part.shape), out=part)
        part *= outputs[nodes].unsqueeze(1)
    x_gradient = slot_gradient.flatten(0, 1)
    return x_gradient if inverse is None else sum_over_readers(x_gradient, *inverse), table_gradient


def _add_scattered(address: Tensor, values: Tensor, entries: int) -> Tensor:
    """Sum ``values`` ``(N, B)`` at their addresses; ``(N, entries)``. In a fixed order on a CPU."""
    return values.new_zeros(values.shape[0], entries).scatter_add_(1, address.long(), values)


def _add_sorted(address: Tensor, values: Tensor, entries: int) -> Tensor:
    """The same on an accelerator, where scattering is atomic and ``index_put_`` sorts first."""
    total = values.new_zeros(values.shape[0], entries)
    nodes = torch.arange(values.shape[0], device=values.device).unsqueeze(1).expand(values.shape)
    return total.index_put_((nodes, address.long()), values, accumulate=True)
