"""Learnable routing in plain torch."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from difflut_lab.ops.shapes import chunks, compute_dtype, feature_major
from difflut_lab.ops.wiring import invert, sum_over_readers


def forward(x: Tensor, scores: Tensor, candidates: Tensor | None) -> Tensor:
    """See ``route``; returns ``(N * n, B)``."""
    chosen = scores.argmax(dim=-1)
    if candidates is not None:
        chosen = candidates.gather(-1, chosen.unsqueeze(-1))
    return feature_major(x).index_select(0, chosen.flatten())


def backward(
    gradient: Tensor,
    x: Tensor,
    scores: Tensor,
    candidates: Tensor | None,
    inverse: tuple[Tensor, Tensor] | None,
    tau: float,
    want_x: bool,
    want_scores: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, as ``(F, B)``, and of the scores ``(N, n, k)``; None for one that is not wanted."""
    dtype = compute_dtype(x, scores)
    slots = feature_major(gradient.to(dtype))
    count = scores.shape[-1]
    x_gradient = score_gradient = None
    if want_scores:
        signs = feature_major(x.to(dtype)).mul(2).sub_(1)
        if candidates is None:
            score_gradient = slots @ signs.t()
        else:
            product = _sampled_product if x.device.type == "cpu" else _gathered_product
            score_gradient = product(slots, signs, candidates.flatten(0, 1))
        score_gradient = score_gradient.view(scores.shape)
    if want_x:
        weights = (scores.to(dtype) / tau).softmax(dim=-1)
        if candidates is None:
            x_gradient = weights.flatten(0, 1).t() @ slots
        else:
            readers, start = inverse or invert(candidates, x.shape[1])
            ordered = weights.flatten().index_select(0, readers)
            x_gradient = sum_over_readers(slots, readers, start, ordered, entries_per_row=count)
    return x_gradient, score_gradient


def _gathered_product(slots: Tensor, signs: Tensor, candidates: Tensor) -> Tensor:
    """``out[s, c] = slots[s] . signs[candidates[s, c]]``, for slots ``(S, B)`` and candidates ``(S, k)``."""
    total, count = candidates.shape
    out = slots.new_empty(total, count)
    for part in chunks(total, count * slots.shape[1], slots.device):
        rows = signs.index_select(0, candidates[part].flatten()).unflatten(0, (-1, count))
        torch.bmm(slots[part].unsqueeze(1), rows.mT, out=out[part].unsqueeze(1))
    return out


def _sampled_product(slots: Tensor, signs: Tensor, candidates: Tensor) -> Tensor:
    """The same, as those entries of a matrix product that a sparse pattern asks for: 4 times as fast on a CPU."""
    total, count = candidates.shape
    lowest, highest = candidates.aminmax()
    if lowest < 0 or highest >= signs.shape[0]:
        raise IndexError(f"candidates: must be from 0 to {signs.shape[0] - 1}, found {lowest} to {highest}.")
    _acknowledge_sparse()
    bounds = torch.arange(0, total * count + 1, count, dtype=candidates.dtype)
    values = slots.new_zeros(total * count)
    size = (total, signs.shape[0])
    pattern = torch.sparse_csr_tensor(bounds, candidates.flatten(), values, size, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, slots, signs.t(), beta=0).values().view(total, count)


@functools.cache
def _acknowledge_sparse() -> None:
    """Take torch's notice that sparse matrices are a beta, given once per process, out of the user's sight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
