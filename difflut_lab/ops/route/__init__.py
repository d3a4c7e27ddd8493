"""Learnable routing: each slot reads the candidate with the highest score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflut_lab.ops.dispatch import choose
from difflut_lab.ops.shapes import empty_batch_first, output_dtype
from difflut_lab.ops.wiring import Wiring


@torch.library.custom_op("difflut_lab::route", mutates_args=())
def _route(
    x: Tensor, scores: Tensor, candidates: Tensor | None, slots: Tensor | None, start: Tensor | None, tau: float
) -> Tensor:
    return choose("route", 1, x, scores).forward(x, scores, candidates).to(output_dtype(x, scores)).t()


@_route.register_fake
def _(
    x: Tensor, scores: Tensor, candidates: Tensor | None, slots: Tensor | None, start: Tensor | None, tau: float
) -> Tensor:
    return empty_batch_first(x, scores.shape[0] * scores.shape[1], output_dtype(x, scores))


@torch.library.custom_op("difflut_lab::route_backward", mutates_args=())
def _route_backward(
    gradient: Tensor,
    x: Tensor,
    scores: Tensor,
    candidates: Tensor | None,
    slots: Tensor | None,
    start: Tensor | None,
    tau: float,
    want_x: bool,
    want_scores: bool,
) -> tuple[Tensor, Tensor]:
    inverse = None if slots is None or start is None else (slots, start)
    with torch.autocast(x.device.type, enabled=False):
        x_gradient, score_gradient = choose("route", 1, x, scores).backward(
            gradient, x, scores, candidates, inverse, tau, want_x, want_scores
        )
    return (
        x.new_empty(0) if x_gradient is None else x_gradient.to(x.dtype).t(),
        scores.new_empty(0) if score_gradient is None else score_gradient.to(scores.dtype),
    )


@_route_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    scores: Tensor,
    candidates: Tensor | None,
    slots: Tensor | None,
    start: Tensor | None,
    tau: float,
    want_x: bool,
    want_scores: bool,
) -> tuple[Tensor, Tensor]:
    return (
        empty_batch_first(x, x.shape[1], x.dtype) if want_x else x.new_empty(0),
        scores.new_empty(scores.shape) if want_scores else scores.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tau = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    want_x, want_scores = ctx.needs_input_grad[:2]
    if gradient is None or not (want_x or want_scores):
        return (None,) * 6
    x_gradient, score_gradient = _route_backward(gradient, *ctx.saved_tensors, ctx.tau, want_x, want_scores)
    return x_gradient if want_x else None, score_gradient if want_scores else None, None, None, None, None


_route.register_autograd(_differentiate, setup_context=_setup_context)


def route(x: Tensor, scores: Tensor, candidates: Tensor | Wiring | None = None, tau: float = 0.001) -> Tensor:
    """Learnable routing: slot k of node j reads the candidate with the highest score, the first of equals.

    The gradient of a score is ``sum_b g (2 x - 1)``, g that of the slot and x the score's candidate: a candidate that
    agrees with where the slot ought to go gains, chosen or not. The gradient of x is g, spread over the candidates by
    ``softmax(scores / tau)``.

    Parameters
    ----------
    x : Tensor
        ``(B, F)`` in any layout and dtype; fastest as a transposed view of ``(F, B)`` storage.
    scores : Tensor
        ``(N, n, k)``
    candidates : Tensor or Wiring, optional
        int32 ``(N, n, k)``: the inputs that the scores stand for. Without it all inputs are candidates, k = F. A
        ``Wiring`` of shape ``(N * n, k)`` keeps its inverse, which saves a sort in every backward that reaches x.
    tau : float
        Temperature of the gradient of x.

    Returns
    -------
    Tensor
        ``(B, N * n)``, a transposed view of ``(N * n, B)`` storage, in the dtype of x (of the scores where x is not
        floating).

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    if x.dim() != 2 or scores.dim() != 3:
        raise ValueError(f"must be x (B, F) and scores (N, n, k), not {tuple(x.shape)} and {tuple(scores.shape)}.")
    slots = start = None
    if isinstance(candidates, Wiring):
        if candidates.num_inputs != x.shape[1] or candidates.padded:
            raise ValueError(f"candidates: must be a wiring of {x.shape[1]} inputs, without -1.")
        if x.requires_grad and torch.is_grad_enabled():
            slots, start = candidates.inverse
        candidates = candidates.indices
        if candidates.numel() == scores.numel():
            candidates = candidates.view(scores.shape)
    wanted = (*scores.shape[:2], x.shape[1]) if candidates is None else tuple(candidates.shape)
    if tuple(scores.shape) != wanted:
        raise ValueError(f"scores: must have shape {wanted}, as the candidates say, not {tuple(scores.shape)}.")
    return _route(x, scores, candidates, slots, start, tau)
