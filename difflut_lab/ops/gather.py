"""Routed inputs of the nodes that compute with them as rows, instead of looking them up."""

from __future__ import annotations

import torch
from torch import Tensor

from difflut_lab.ops.flips import Flips, flip_arguments
from difflut_lab.ops.interpolate import _interpolate
from difflut_lab.ops.shapes import check_inputs
from difflut_lab.ops.wiring import Wiring, wiring_arguments


def gather(x: Tensor, n: int, wiring: Wiring | None = None, flips: Flips | None = None) -> Tensor:
    """What each node reads, the batch contiguous.

    It is ``interpolate`` with one node per slot, whose table is (0, 1): kernels, clamping, flips and the deterministic
    gradient are those of that op.

    Parameters
    ----------
    x : Tensor
        ``(B, F)`` in any layout and dtype, clamped to [0, 1], with gradient 0 outside.
    n : int
        Inputs per node.
    wiring : Wiring, optional
        Which inputs each node reads. Without it x is routed already: ``(B, N * n)``.
    flips : Flips, optional
        Random flips of the routed inputs; the mask is the same as in the other ops.

    Returns
    -------
    Tensor
        ``(N, n, B)``, contiguous, in the dtype of x (the default dtype where x is not floating).

    Raises
    ------
    ValueError
        If shapes do not fit.
    """
    num_nodes = x.shape[-1] // n if wiring is None else wiring.indices.shape[0]
    check_inputs(x, num_nodes, n, wiring)
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    identity = torch.tensor([0.0, 1.0], dtype=dtype, device=x.device).expand(num_nodes * n, 2).contiguous()
    indices, *rest = wiring_arguments(wiring, x.requires_grad and torch.is_grad_enabled())
    # slot k of node j is node j * n + k here, which is its number among those that read an input, and in flips
    slots = None if indices is None else indices.view(-1, 1)
    y, _ = _interpolate(x, identity, slots, *rest, *flip_arguments(flips))
    return y.t().unflatten(0, (num_nodes, n))
