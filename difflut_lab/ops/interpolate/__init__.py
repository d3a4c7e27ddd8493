"""Soft lookup: the table, interpolated between its entries at inputs in [0, 1]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflut_lab.ops.dispatch import choose
from difflut_lab.ops.flips import Draw, Flips, flip_arguments, groups
from difflut_lab.ops.shapes import check_inputs, empty_batch_first, fan_in, output_dtype
from difflut_lab.ops.wiring import Wiring, wiring_arguments


@torch.library.custom_op("difflut_lab::interpolate", mutates_args=())
def _interpolate(
    x: Tensor,
    table: Tensor,
    indices: Tensor | None,
    padded: bool,
    slots: Tensor | None,
    start: Tensor | None,
    step: Tensor | None,
    threshold: int,
    seed: int,
    layer: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    n = fan_in(table)
    draw = None if step is None else Draw(step, threshold, seed, layer, sample_offset)
    with torch.autocast(x.device.type, enabled=False):
        y, packed = choose("interpolate", n, x, table).forward(x, table, n, indices, padded, draw)
    return y.to(output_dtype(x, table)).t(), x.new_empty(0, dtype=torch.uint8) if packed is None else packed


@_interpolate.register_fake
def _(
    x: Tensor,
    table: Tensor,
    indices: Tensor | None,
    padded: bool,
    slots: Tensor | None,
    start: Tensor | None,
    step: Tensor | None,
    threshold: int,
    seed: int,
    layer: int,
    sample_offset: int,
) -> tuple[Tensor, Tensor]:
    shape = (0,) if step is None else (table.shape[0], fan_in(table), groups(sample_offset, x.shape[0]))
    packed = x.new_empty(shape, dtype=torch.uint8)
    return empty_batch_first(x, table.shape[0], output_dtype(x, table)), packed


@torch.library.custom_op("difflut_lab::interpolate_backward", mutates_args=())
def _interpolate_backward(
    gradient: Tensor,
    x: Tensor,
    table: Tensor,
    indices: Tensor | None,
    padded: bool,
    slots: Tensor | None,
    start: Tensor | None,
    packed: Tensor | None,
    sample_offset: int,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor, Tensor]:
    inverse = None if slots is None or start is None else (slots, start)
    n = fan_in(table)
    with torch.autocast(x.device.type, enabled=False):
        x_gradient, table_gradient = choose("interpolate", n, x, table).backward(
            gradient, x, table, n, indices, padded, inverse, packed, sample_offset, want_x, want_table
        )
    return (
        x.new_empty(0) if x_gradient is None else x_gradient.to(x.dtype).t(),
        table.new_empty(0) if table_gradient is None else table_gradient.to(table.dtype),
    )


@_interpolate_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    table: Tensor,
    indices: Tensor | None,
    padded: bool,
    slots: Tensor | None,
    start: Tensor | None,
    packed: Tensor | None,
    sample_offset: int,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor, Tensor]:
    return (
        empty_batch_first(x, x.shape[1], x.dtype) if want_x else x.new_empty(0),
        table.new_empty(table.shape) if want_table else table.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, table, indices, ctx.padded, slots, start, step, _, _, _, ctx.sample_offset = inputs
    ctx.save_for_backward(x, table, indices, slots, start, None if step is None else output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    want_x, want_table = ctx.needs_input_grad[:2]
    nothing = (None,) * 9
    if gradient is None or not (want_x or want_table):
        return None, None, *nothing
    x, table, indices, slots, start, packed = ctx.saved_tensors
    x_gradient, table_gradient = _interpolate_backward(
        gradient, x, table, indices, ctx.padded, slots, start, packed, ctx.sample_offset, want_x, want_table
    )
    return x_gradient if want_x else None, table_gradient if want_table else None, *nothing


_interpolate.register_autograd(_differentiate, setup_context=_setup_context)


def interpolate(x: Tensor, table: Tensor, wiring: Wiring | None = None, flips: Flips | None = None) -> Tensor:
    """Soft lookup: ``y = sum_a table[a] prod_k x_k^(a_k) (1 - x_k)^(1 - a_k)``, with exact gradients.

    Parameters
    ----------
    x : Tensor
        ``(B, F)`` in any layout and dtype; fastest as a transposed view of ``(F, B)`` storage. Clamped to [0, 1], with
        gradient 0 outside. A NaN gives NaN.
    table : Tensor
        ``(N, 2^n)``, address LSB first.
    wiring : Wiring, optional
        Which inputs each node reads. Without it x is routed already: ``(B, N * n)``, node j reads the columns from
        ``j * n`` on.
    flips : Flips, optional
        Random flips of the routed inputs. The gradient is taken at the flipped value and reaches x with factor +1.
        Slots that read a constant never flip, nor do inputs of minus infinity, which stand for a constant 0.

    Returns
    -------
    Tensor
        ``(B, N)``, a transposed view of ``(N, B)`` storage, in the dtype of x (of the table where x is not floating).
        Computed in float32, under autocast too, or in float64 where x or the table is.

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    check_inputs(x, table.shape[0], fan_in(table), wiring)
    wants_inverse = x.requires_grad and torch.is_grad_enabled()
    y, _ = _interpolate(x, table, *wiring_arguments(wiring, wants_inverse), *flip_arguments(flips))
    return y
