"""Nodes that compute with their routed inputs, instead of interpolating a table.

Shape letters: B batch, N nodes, n inputs per node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from difflut_lab.nodes.base import LUTNodes
from difflut_lab.ops import Flips, Wiring
from difflut_lab.ops.gather import gather

# addresses tabulated at once; bounds the memory that enumeration takes
_CHUNK = 256


class GatheredNodes(LUTNodes):
    """The base class of banks that compute with rows of inputs, ``(N, n, B)``, the batch contiguous.

    A kind of node supplies ``logits`` and ``squash``. Inputs are clamped to [0, 1], with gradient 0 outside. An entry
    of the truth table is 1 where its logit is at least 0.
    """

    def logits(self, rows: Tensor) -> Tensor:
        """Real numbers ``(N, B)`` of routed inputs ``(N, n, B)``."""
        raise NotImplementedError(f"{type(self).__name__} must supply logits(rows)")

    def squash(self, logits: Tensor) -> Tensor:
        """Outputs in [0, 1] of logits, elementwise: 1/2 for 0."""
        return torch.sigmoid(logits)

    def relaxed(self, routed: Tensor) -> Tensor:
        return self.relaxed_fused(routed.flatten(1), None, None)

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        rows = gather(x, self.n, wiring, flips)
        # batched products of reduced precision would not agree with the truth table
        with torch.autocast(x.device.type, enabled=False):
            y = self.squash(self.logits(rows.to(next(self.parameters()).dtype)))
        return y.to(rows.dtype).t()

    @torch.no_grad()
    def tabulate(self) -> Tensor:
        parameter = next(self.parameters())
        bits = torch.arange(2**self.n) >> torch.arange(self.n).unsqueeze(1) & 1
        # a view of one node has parameters of one
        rows = bits.to(parameter).expand(parameter.shape[0], -1, -1)
        return torch.cat([self.logits(chunk) >= 0 for chunk in rows.split(_CHUNK, dim=2)], dim=1)

    @property
    def can_fuse(self) -> bool:
        return True
