"""Hard lookup: the table's entry at the address that the inputs' bits spell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflut_lab.ops.dispatch import choose
from difflut_lab.ops.flips import Draw, Flips, flip_arguments
from difflut_lab.ops.shapes import check_inputs, empty_batch_first, fan_in, output_dtype
from difflut_lab.ops.wiring import Wiring, wiring_arguments


@torch.library.custom_op("difflut_lab::lookup", mutates_args=())
def _lookup(
    x: Tensor,
    table: Tensor,
    slope: Tensor | None,
    indices: Tensor | None,
    padded: bool,
    slots: Tensor | None,
    start: Tensor | None,
    step: Tensor | None,
    threshold: int,
    seed: int,
    layer: int,
    sample_offset: int,
    binary: bool = False,
) -> tuple[Tensor, Tensor]:
    n = fan_in(table)
    draw = None if step is None else Draw(step, threshold, seed, layer, sample_offset)
    y, address = choose("lookup", n, table).forward(x, table, n, indices, padded, draw, binary)
    return y.to(output_dtype(x, table)).t(), address


@_lookup.register_fake
def _(
    x: Tensor,
    table: Tensor,
    slope: Tensor | None,
    indices: Tensor | None,
    padded: bool,
    slots: Tensor | None,
    start: Tensor | None,
    step: Tensor | None,
    threshold: int,
    seed: int,
    layer: int,
    sample_offset: int,
    binary: bool = False,
) -> tuple[Tensor, Tensor]:
    address = x.new_empty((table.shape[0], x.shape[0]), dtype=torch.uint8 if fan_in(table) <= 8 else torch.int16)
    return empty_batch_first(x, table.shape[0], output_dtype(x, table)), address


@torch.library.custom_op("difflut_lab::lookup_backward", mutates_args=())
def _lookup_backward(
    gradient: Tensor,
    address: Tensor,
    slope: Tensor | None,
    slots: Tensor | None,
    start: Tensor | None,
    num_inputs: int,
    entries: int,
    dtype: torch.dtype,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor, Tensor]:
    inverse = None if slots is None or start is None else (slots, start)
    outputs = gradient.double() if dtype == torch.float64 else gradient
    tensors = (outputs,) if slope is None else (outputs, slope)
    x_gradient, table_gradient = choose("lookup", entries.bit_length() - 1, *tensors).backward(
        outputs, address, entries, slope, inverse, want_x, want_table
    )
    return (
        gradient.new_empty(0) if x_gradient is None else x_gradient.to(gradient.dtype).t(),
        gradient.new_empty(0, dtype=dtype) if table_gradient is None else table_gradient.to(dtype),
    )


@_lookup_backward.register_fake
def _(
    gradient: Tensor,
    address: Tensor,
    slope: Tensor | None,
    slots: Tensor | None,
    start: Tensor | None,
    num_inputs: int,
    entries: int,
    dtype: torch.dtype,
    want_x: bool,
    want_table: bool,
) -> tuple[Tensor, Tensor]:
    return (
        empty_batch_first(gradient, num_inputs, gradient.dtype) if want_x else gradient.new_empty(0),
        gradient.new_empty((address.shape[0], entries) if want_table else 0, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, table, slope, _, _, slots, start, *_ = inputs
    ctx.num_inputs, ctx.entries, ctx.dtype = x.shape[1], table.shape[1], table.dtype
    ctx.has_slope = slope is not None
    # the table's values are not needed: it may be changed in place before the backward
    ctx.save_for_backward(output[1], slope, slots, start)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    want_x, want_table = ctx.needs_input_grad[0] and ctx.has_slope, ctx.needs_input_grad[1]
    nothing = (None,) * 11
    if gradient is None or not (want_x or want_table):
        return None, None, *nothing
    x_gradient, table_gradient = _lookup_backward(
        gradient, *ctx.saved_tensors, ctx.num_inputs, ctx.entries, ctx.dtype, want_x, want_table
    )
    return x_gradient if want_x else None, table_gradient if want_table else None, *nothing


_lookup.register_autograd(_differentiate, setup_context=_setup_context)


def lookup(
    x: Tensor,
    table: Tensor,
    gradient: Tensor | None = None,
    wiring: Wiring | None = None,
    flips: Flips | None = None,
    *,
    binary: bool = False,
) -> Tensor:
    """Hard lookup: ``y = table[a]`` at the address ``a = sum_k [x_k >= 1/2] 2^k``.

    The gradient of the table is the sum over the batch of the output's gradient at the addressed entry; that of the
    inputs is the output's gradient times ``gradient`` at the address.

    Parameters
    ----------
    x : Tensor
        ``(B, F)`` in any layout and dtype; fastest as a transposed view of ``(F, B)`` storage.
    table : Tensor
        ``(N, 2^n)``, address LSB first.
    gradient : Tensor, optional
        ``(N, n, 2^n)``: what takes the place of dy/dx_k at each address, such as ``efd_table(table)``. Receives no
        gradient itself. Without it x receives none.
    wiring : Wiring, optional
        Which inputs each node reads. Without it x is routed already: ``(B, N * n)``, node j reads the columns from
        ``j * n`` on.
    flips : Flips, optional
        Random flips of the routed bits. The gradient is taken at the flipped address and reaches x with factor +1.
        Slots that read a constant never flip, nor do inputs of minus infinity, which stand for a constant 0.
    binary : bool
        Give ``[table[a] >= 0]``, 0 or 1; the gradient passes straight through the comparison.

    Returns
    -------
    Tensor
        ``(B, N)``, a transposed view of ``(N, B)`` storage, in the dtype of x (of the table where x is not floating).

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    n = fan_in(table)
    check_inputs(x, table.shape[0], n, wiring)
    if gradient is not None and tuple(gradient.shape) != (table.shape[0], n, table.shape[1]):
        wanted = (table.shape[0], n, table.shape[1])
        raise ValueError(f"gradient: must have shape {wanted}, not {tuple(gradient.shape)}.")
    wants_inverse = gradient is not None and x.requires_grad and torch.is_grad_enabled()
    slope = gradient.detach() if gradient is not None else None
    y, _ = _lookup(x, table, slope, *wiring_arguments(wiring, wants_inverse), *flip_arguments(flips), binary)
    return y
