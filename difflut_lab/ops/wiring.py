"""Which inputs each node reads, and the gather in both directions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class Wiring:
    """The fixed wiring of a bank of nodes.

    Parameters
    ----------
    indices : Tensor
        int32 ``(N, n)``: the input that slot k of node j reads, or -1 for a constant 0. Not to be changed in place
        afterwards: another wiring is another ``Wiring``.
    num_inputs : int
        F, the number of inputs there are.

    Attributes
    ----------
    indices : Tensor
    num_inputs : int
    padded : bool
        Whether any slot is -1.

    Raises
    ------
    ValueError
        If the shape or dtype is another, or an index is not in -1 .. F - 1.
    """

    def __init__(self, indices: Tensor, num_inputs: int) -> None:
        if indices.dim() != 2 or indices.dtype != torch.int32:
            raise ValueError(
                f"indices: must be int32 of shape (N, n), not {indices.dtype} of shape {tuple(indices.shape)}."
            )
        lowest, highest = (int(bound) for bound in indices.aminmax()) if indices.numel() else (0, -1)
        if lowest < -1 or highest >= num_inputs:
            raise ValueError(f"indices: must be from -1 to {num_inputs - 1}, found {lowest} to {highest}.")
        self.indices = indices.detach().contiguous()
        self.num_inputs = num_inputs
        self.padded = lowest < 0
        self._num_padded = int((indices < 0).sum()) if self.padded else 0
        self._inverse: tuple[Tensor, Tensor] | None = None

    @property
    def inverse(self) -> tuple[Tensor, Tensor]:
        """Who reads an input: ``(slots, start)``, made at the first use and kept.

        ``slots[start[f]:start[f + 1]]`` are the flat slots ``j * n + k`` that read input f, ascending. ``slots`` is
        int32 ``(M,)``, M the number of slots that are not -1; ``start`` is int32 ``(F + 1,)``.
        """
        if self._inverse is None:
            self._inverse = invert(self.indices, self.num_inputs, self._num_padded)
        return self._inverse


def wiring_arguments(
    wiring: Wiring | None, want_inverse: bool
) -> tuple[Tensor | None, bool, Tensor | None, Tensor | None]:
    """A wiring as the arguments ``indices, padded, slots, start`` of an op."""
    if wiring is None:
        return None, False, None, None
    slots, start = wiring.inverse if want_inverse else (None, None)
    return wiring.indices, wiring.padded, slots, start


def invert(indices: Tensor, num_inputs: int, num_padded: int = 0) -> tuple[Tensor, Tensor]:
    """The inverse of a gather, in compressed rows.

    Parameters
    ----------
    indices : Tensor
        int32, any shape: what each slot reads.
    num_inputs : int
        F.
    num_padded : int
        How many of the indices are -1.

    Returns
    -------
    slots, start : Tensor
        int32 ``(M,)`` and ``(F + 1,)``, as ``Wiring.inverse``.
    """
    readers, order = indices.flatten().sort(stable=True)
    bounds = torch.arange(num_inputs + 1, dtype=readers.dtype, device=indices.device)
    start = torch.searchsorted(readers[num_padded:], bounds, out_int32=True)
    return order[num_padded:].to(torch.int32), start


def gather_rows(rows: Tensor, indices: Tensor | None, nodes: slice, n: int) -> Tensor:
    """What a run of nodes reads; -1 reads row 0, to be overwritten by the caller.

    Parameters
    ----------
    rows : Tensor
        ``(F, B)``, or ``(N * n, B)`` where they are routed already.
    indices : Tensor or None
        int32 ``(N, n)``, or None for routed rows.
    nodes : slice
        The nodes, c of them.
    n : int
        Inputs per node.

    Returns
    -------
    Tensor
        ``(c, n, B)``; a view of ``rows`` where they are routed already.
    """
    if indices is None:
        return rows[nodes.start * n : nodes.stop * n].unflatten(0, (-1, n))
    wanted = indices[nodes]
    return rows.index_select(0, wanted.flatten().clamp_min(0)).unflatten(0, wanted.shape)


def sum_over_readers(
    rows: Tensor, slots: Tensor, start: Tensor, weights: Tensor | None = None, entries_per_row: int = 1
) -> Tensor:
    """Sum for each input the rows of the slots that read it, always in the same order.

    Parameters
    ----------
    rows : Tensor
        ``(M', B)`` contiguous, one row per slot, or per ``entries_per_row`` slots.
    slots, start : Tensor
        The inverse of the gather, as ``Wiring.inverse``.
    weights : Tensor, optional
        ``(M,)``, a factor for each of ``slots``.
    entries_per_row : int
        How many neighbouring slots share a row.

    Returns
    -------
    Tensor
        ``(F, B)``
    """
    if rows.shape[1] == 0 or slots.shape[0] == 0:
        return rows.new_zeros(start.shape[0] - 1, rows.shape[1])
    if entries_per_row > 1:
        slots = slots.div(entries_per_row, rounding_mode="floor")
    return functional.embedding_bag(
        slots, rows, offsets=start, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
