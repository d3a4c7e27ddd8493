"""Learnable routing in plain torch."""

from __future__ import annotations

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
            score_gradient = _at_candidates(slots, signs, candidates.flatten(0, 1))
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


def _at_candidates(slots: Tensor, signs: Tensor, candidates: Tensor) -> Tensor:
    """``out[s, c] = slots[s] . signs[candidates[s, c]]``, for slots ``(S, B)`` and candidates ``(S, k)``."""
    total, count = candidates.shape
    batch = slots.shape[1]
    out = slots.new_empty(total, count)
    for part in chunks(total, 2 * count * batch, slots.device):
        rows = signs.index_select(0, candidates[part].flatten()).view(-1, count, batch)
        torch.bmm(rows, slots[part].unsqueeze(2), out=out[part].unsqueeze(2))
    return out
