"""Nodes like those of differentiable weightless networks, with probabilities and a slower decay of differences."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from difflut_lab.nodes.base import FanIn, TableNodes
from difflut_lab.ops import Flips, Wiring, lookup
from difflut_lab.ops.efd import harmonic_efd_table
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf, PositiveFloat


@register_node("dwn_stable")
class DWNStableNodes(TableNodes):
    """The entry of sigmoid(W) at the address of the inputs, with an extended finite difference as input gradient.

    The differences (Bacellar et al., arXiv 2410.11112) weigh 1 / (H + 1), H the number of other inputs in which an
    address differs from the one looked up (Bührer et al., BitLogic, arXiv 2602.07400), normalised to sum to 1/2 as
    those of ``dwn`` do, times ``gradient_scale``. The gradient of the table is that of the lookup. In training a node
    passes on a probability, in evaluation a bit.

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    gradient_scale : float
        Scale of the input gradient. The forward does not contain it, so that it cannot be trained.
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
        gradient_scale: PositiveFloat = 1.25,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "normal",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        super().__init__(num_nodes, n, initializer=initializer, regularizer=regularizer, seed=seed)
        self.gradient_scale = gradient_scale

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        table = torch.sigmoid(self.weight)
        gradient = None
        if x.requires_grad and torch.is_grad_enabled():
            gradient = harmonic_efd_table(table, self.gradient_scale)
        return lookup(x, table, gradient, wiring, flips)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gradient_scale={self.gradient_scale}"
