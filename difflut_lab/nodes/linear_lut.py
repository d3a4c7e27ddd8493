"""Nodes that are linear threshold units."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from difflut_lab.nodes.base import FanIn, TableNodes
from difflut_lab.nodes.walsh import walsh_coefficients
from difflut_lab.ops import Flips, Wiring, interpolate
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf


@register_node("linear_lut")
class LinearLUTNodes(TableNodes):
    """A neuron, sigmoid(w.x + b), tabulated after training (Umuroglu et al., LogicNets, arXiv 2004.03021).

    A linear function equals the interpolation of its values at the addresses. An entry of the truth table is 1 where
    w.x + b is at least 0: of the functions of n bits, a node can be those that a plane separates.

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    initializer : str or mapping
        Initial values of w. The plane starts in the middle of the cube, b = -sum(w) / 2, so that half of a truth table
        is 1. An initialiser of tables gives the linear part of its logits.
    regularizer : str or mapping, optional
        Penalty on w and b; on the logits of the table where it needs one.

    Attributes
    ----------
    weight : nn.Parameter
        w, ``(N, n)``.
    bias : nn.Parameter
        b, ``(N, 1)``.
    """

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "kaiming",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        super().__init__(num_nodes, n, initializer=initializer, regularizer=regularizer, seed=seed)
        self.bias = nn.Parameter(-self.weight.detach().sum(1, keepdim=True) / 2)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_nodes, self.n

    def from_logits(self, logits: Tensor) -> Tensor:
        # a coefficient of 2 x - 1 is half of one of x
        return 2 * walsh_coefficients(logits)[:, [1 << k for k in range(self.n)]]

    def real_table(self) -> Tensor:
        table: Tensor = self.bias
        for k in range(self.n):
            # addresses with bit k follow those without
            table = torch.cat((table, table + self.weight[:, k : k + 1]), dim=1)
        return table

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        return torch.sigmoid(interpolate(x, self.real_table(), wiring, flips))
