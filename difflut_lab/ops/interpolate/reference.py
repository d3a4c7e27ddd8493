"""Interpolation in plain torch.

The inputs of a node are cut into a lower and an upper half. The products of a half are, for each of its addresses a,
prod_k x_k^(a_k) (1 - x_k)^(1 - a_k); the table, as a matrix (upper address, lower address), joins the two as a bilinear
form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflut_lab.ops.flips import Draw, unpack
from difflut_lab.ops.shapes import chunks, compute_dtype, feature_major
from difflut_lab.ops.wiring import gather_rows, sum_over_readers


def forward(
    x: Tensor, table: Tensor, n: int, indices: Tensor | None, padded: bool, draw: Draw | None
) -> tuple[Tensor, Tensor | None]:
    """See ``interpolate``; returns ``(N, B)``, and the packed flips."""
    dtype = compute_dtype(x, table)
    features = _features(x.to(dtype), draw is not None)
    num_nodes, batch = table.shape[0], x.shape[0]
    packed, sample_offset = None, 0
    if draw is not None:
        packed, sample_offset = draw.packed(num_nodes, n, batch, x.device), draw.sample_offset
    y = features.new_empty(num_nodes, batch)
    for nodes in chunks(num_nodes, batch << (n + 1) // 2, x.device):
        routed = _routed(features, n, indices, padded, packed, sample_offset, nodes)
        lower, upper = _halves(routed)
        joined = torch.bmm(_matrix(table[nodes].to(dtype), n), _products(lower)[-1])
        torch.sum(joined.mul_(_products(upper)[-1]), dim=1, out=y[nodes])
    return y, packed


def backward(
    gradient: Tensor,
    x: Tensor,
    table: Tensor,
    n: int,
    indices: Tensor | None,
    padded: bool,
    inverse: tuple[Tensor, Tensor] | None,
    packed: Tensor | None,
    sample_offset: int,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x``, as ``(F, B)``, and of the table ``(N, K)``; None for one that is not wanted."""
    dtype = compute_dtype(x, table)
    features = _features(x.to(dtype), packed is not None)
    outputs = feature_major(gradient.to(dtype))
    num_nodes, batch = table.shape[0], x.shape[0]
    slot_gradient = features.new_empty(num_nodes, n, batch) if want_x else None
    table_gradient = features.new_empty(table.shape) if want_table else None
    for nodes in chunks(num_nodes, batch << (n + 1) // 2, x.device):
        routed = _routed(features, n, indices, padded, packed, sample_offset, nodes)
        lower, upper = _halves(routed)
        lower_products, upper_products = _products(lower), _products(upper)
        output = outputs[nodes].unsqueeze(1)
        weighted = upper_products[-1] * output
        if table_gradient is not None:
            torch.bmm(weighted, lower_products[-1].mT, out=_matrix(table_gradient[nodes], n))
        if slot_gradient is not None:
            matrix = _matrix(table[nodes].to(dtype), n)
            half = n // 2
            _fold(torch.bmm(matrix.mT, weighted), lower, lower_products, slot_gradient[nodes, :half])
            joined = torch.bmm(matrix, lower_products[-1]).mul_(output)
            _fold(joined, upper, upper_products, slot_gradient[nodes, half:])
    if slot_gradient is None:
        return None, table_gradient
    x_gradient = slot_gradient.flatten(0, 1)
    if inverse is not None:
        x_gradient = sum_over_readers(x_gradient, *inverse)
    inside = (x >= 0) & (x <= 1)
    return x_gradient.mul_(inside.t()), table_gradient


def _features(x: Tensor, flipped: bool) -> Tensor:
    """``(F, B)``, clamped; minus infinity, which never flips, stays where there are flips."""
    clamped = x.clamp(0, 1)
    return feature_major(clamped.masked_fill_(x == -torch.inf, -torch.inf) if flipped else clamped)


def _routed(
    features: Tensor,
    n: int,
    indices: Tensor | None,
    padded: bool,
    packed: Tensor | None,
    sample_offset: int,
    nodes: slice,
) -> Tensor:
    """What a run of nodes reads, ``(c, n, B)``, flips included."""
    routed = gather_rows(features, indices, nodes, n)
    if packed is not None:
        # abs(x - 1) is 1 - x
        flips = unpack(packed[nodes], sample_offset, routed.shape[2]).masked_fill_(routed < 0, 0)
        routed = (routed.clamp_min(0) - flips).abs_()
    if padded and indices is not None:
        routed = routed.masked_fill((indices[nodes] < 0).unsqueeze(2), 0)
    return routed


def _halves(routed: Tensor) -> tuple[Tensor, Tensor]:
    half = routed.shape[1] // 2
    return routed[:, :half], routed[:, half:]


def _matrix(table: Tensor, n: int) -> Tensor:
    """The table as a matrix per node: upper address by lower address."""
    return table.view(table.shape[0], -1, 1 << n // 2)


def _products(rows: Tensor) -> list[Tensor]:
    """The products of the first 0, 1, ..., h of ``rows`` ``(c, h, B)``; the last is ``(c, 2^h, B)``."""
    count, inputs, batch = rows.shape
    products = [rows.new_ones(1, 1, 1).expand(count, 1, batch)]
    for k in range(inputs):
        size = 1 << k
        grown = rows.new_empty(count, 2 * size, batch)
        torch.mul(products[-1], rows[:, k : k + 1], out=grown[:, size:])
        torch.sub(products[-1], grown[:, size:], out=grown[:, :size])
        products.append(grown)
    return products


def _fold(gradient: Tensor, rows: Tensor, products: list[Tensor], out: Tensor) -> None:
    """Gradient of ``rows`` ``(c, h, B)``, into ``out``, from that of their products ``(c, 2^h, B)``."""
    if rows.shape[1] == 0:
        return
    for k in range(rows.shape[1] - 1, 0, -1):
        low, high = gradient.split(1 << k, dim=1)
        difference = high - low
        torch.sum(products[k] * difference, dim=1, out=out[:, k])
        gradient = torch.addcmul(low, difference, rows[:, k : k + 1])
    torch.sub(gradient[:, 1], gradient[:, 0], out=out[:, 0])
