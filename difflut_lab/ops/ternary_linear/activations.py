"""Activations rounded to 8-bit integers, with a step per token (the A8 of W1.58A8, BitNet b1.58, arXiv 2402.17764)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 127  # largest magnitude of a rounded value
EXACT = 1 << 24  # float32 holds all integers up to it


def quantize_activations(x: Tensor, dims: Sequence[int] = (-1,)) -> tuple[Tensor, Tensor]:
    """Integers and their step.

    Parameters
    ----------
    x : Tensor
        Any shape.
    dims : sequence of int
        The dimensions that the values which share a step extend over.

    Returns
    -------
    levels, step : Tensor
        ``round(x / step)``, from -127 to 127, in the dtype of x, and ``max|x| / 127``, at least the smallest normal
        number, of 1 in the dimensions of ``dims``.
    """
    largest = x.abs().amax(dim=tuple(dims), keepdim=True)
    # by a tensor: torch on a GPU divides by a number through its inverse, which is one bit off
    step = (largest / largest.new_full((), LEVELS)).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / step).round().clamp(-LEVELS, LEVELS), step
