"""Nodes that look up in the forward pass and interpolate in the backward pass."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from difflut_lab.nodes.base import FanIn, TableNodes
from difflut_lab.nodes.sampling import straight_through
from difflut_lab.ops import Flips, Wiring, interpolate, lookup
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf


@register_node("hybrid")
class HybridNodes(TableNodes):
    """The entry of sigmoid(W) at the address of the inputs, with the gradients of its interpolation at the inputs.

    Bührer et al., BitLogic, arXiv 2602.07400. In training a node passes on a probability, in evaluation a bit.

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    initializer : str or mapping
        Initial values of W.
    regularizer : str or mapping, optional
        Penalty on W.
    """

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "normal",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        super().__init__(num_nodes, n, initializer=initializer, regularizer=regularizer, seed=seed)

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        table = torch.sigmoid(self.weight)
        # flips are drawn by counter: both halves see the same
        found = lookup(x, table.detach(), None, wiring, flips)
        if not torch.is_grad_enabled():
            return found
        return straight_through(interpolate(x, table, wiring, flips), found)
