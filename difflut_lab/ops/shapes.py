"""What the ops ask of their arguments' shapes and types.

Shape letters of the whole package: B batch, F inputs of a layer, N nodes, n inputs per node, K = 2^n table entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from difflut_lab.ops.wiring import Wiring

MAX_FAN_IN = 15  # a looked-up address is kept in 8 or 16 bits

# Measured: temporaries of 1 MiB are still cached and amortise the calls. An accelerator wants few launches instead.
CPU_CHUNK = 1 << 18
ACCELERATOR_CHUNK = 1 << 26


def fan_in(table: Tensor) -> int:
    """The n of a table ``(N, 2^n)``.

    Raises
    ------
    ValueError
        If the table has another shape, or n is out of range.
    """
    if table.dim() != 2:
        raise ValueError(f"table: must have shape (N, 2^n), not {tuple(table.shape)}.")
    entries = table.shape[1]
    n = entries.bit_length() - 1
    if entries != 1 << n or not 1 <= n <= MAX_FAN_IN:
        raise ValueError(f"table: must have 2^n entries per node with n from 1 to {MAX_FAN_IN}, not {entries}.")
    return n


def check_inputs(x: Tensor, num_nodes: int, n: int, wiring: Wiring | None) -> None:
    """Refuse an ``x`` or a wiring that does not fit a bank of nodes.

    Raises
    ------
    ValueError
        Names the shape that is wrong and the one that is wanted.
    """
    if x.dim() != 2:
        raise ValueError(f"x: must have shape (B, F), not {tuple(x.shape)}.")
    if wiring is not None and tuple(wiring.indices.shape) != (num_nodes, n):
        raise ValueError(f"wiring: must have shape {(num_nodes, n)}, not {tuple(wiring.indices.shape)}.")
    wanted = num_nodes * n if wiring is None else wiring.num_inputs
    if x.shape[1] != wanted:
        raise ValueError(f"x: must have {wanted} inputs, as the wiring and the table say, not {x.shape[1]}.")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def output_dtype(x: Tensor, parameter: Tensor) -> torch.dtype:
    """The dtype of what an op returns: that of ``x``, or of the parameter where ``x`` holds bits or integers."""
    return x.dtype if x.dtype.is_floating_point else parameter.dtype


def feature_major(x: Tensor) -> Tensor:
    """``(B, F)`` in any layout as contiguous ``(F, B)``; without a copy if it is a view of that."""
    return x.t().contiguous()


def empty_batch_first(x: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised ``(B, features)`` for the batch of ``x``, stored feature-major."""
    return x.new_empty((features, x.shape[0]), dtype=dtype).t()


def chunks(count: int, size: int, device: torch.device) -> Iterator[slice]:
    """Cut ``count`` nodes, each with temporaries of ``size`` elements, into runs that suit the device's caches."""
    step = max(1, (CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK) // max(1, size))
    for begin in range(0, count, step):
        yield slice(begin, min(count, begin + step))
