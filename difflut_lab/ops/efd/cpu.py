"""The extended finite difference on a CPU: butterflies in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir
from numba.core import types
from torch import Tensor

from difflut_lab.ops.kernel.cpu import FLOAT, I32, I64, LANES, Vectors, array, intrinsic, kernel
from difflut_lab.ops.shapes import fan_in
from difflut_lab.ops.threads.cpu import run


@intrinsic
def _differences(typingctx, fan, table, scale, beta, out):  # type: ignore[no-untyped-def]
    """The differences of one node; ``fan`` has the length n."""
    n = fan.count
    width = min(1 << n, LANES)
    lane_bits = width.bit_length() - 1

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Sequence[ir.Value]) -> ir.Value:
        v = Vectors(builder)
        kind = ir.VectorType(FLOAT, width)
        _, table, scale, beta, out = arguments
        table, out, beta = v.pointer(table), v.pointer(out), v.splat(beta, width)
        scales = {sign: v.splat(builder.fmul(scale, FLOAT(sign)), width) for sign in (-1.0, 1.0)}
        spread = [v.load(table, I64(at), kind) for at in range(0, 1 << n, width)]

        def neighbours(bit: int) -> list[ir.Value]:
            if bit >= lane_bits:
                return [spread[i ^ (1 << bit - lane_bits)] for i in range(len(spread))]
            swapped = v.constant(I32, [lane ^ (1 << bit) for lane in range(width)])
            return [builder.shuffle_vector(part, part, swapped) for part in spread]

        for bit in range(n):
            spread = [
                builder.fadd(builder.fmul(other, beta), part)
                for part, other in zip(spread, neighbours(bit), strict=True)
            ]
        for bit in range(n):
            for i, (part, other) in enumerate(zip(spread, neighbours(bit), strict=True)):
                if bit >= lane_bits:
                    signed = scales[1.0 if i >> bit - lane_bits & 1 else -1.0]
                else:
                    signs = v.constant(I32, [lane if lane >> bit & 1 else width + lane for lane in range(width)])
                    signed = builder.shuffle_vector(scales[1.0], scales[-1.0], signs)
                v.store(builder.fmul(builder.fsub(part, other), signed), out, I64((bit << n) + i * width))
        return context.get_dummy_value()

    return types.void(fan, types.int64, types.float32, types.float32, types.int64), generate


@kernel
def differences(begin, end, fan, table, scale, beta, out):  # type: ignore[no-untyped-def]
    """Differences ``out (N, n, K)`` of a run of nodes."""
    n, entries = len(fan), table.shape[1]
    for j in range(begin, end):
        at = out.ctypes.data + 4 * j * n * entries
        _differences(fan, table.ctypes.data + 4 * j * entries, scale, beta, at)


def forward(table: Tensor, alpha: float, beta: float) -> Tensor:
    """See ``efd_table``."""
    n, num_nodes = fan_in(table), table.shape[0]
    out = torch.empty(num_nodes, n, table.shape[1])
    # the spreading includes the bit of the difference, and makes it 1 - beta times the one wanted
    scale = alpha / (1 - beta)
    run(differences, num_nodes, out.numel() >> 2, (0,) * n, array(table.float()), scale, beta, array(out))
    return out
