"""Nodes of differentiable weightless networks: hard lookups, trained with extended finite differences."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from difflut_lab.nodes.base import FanIn, TableNodes
from difflut_lab.ops import Flips, Wiring, efd_table, lookup
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf, PositiveFloat


@register_node("dwn")
class DWNNodes(TableNodes):
    """The sign of the addressed weight, in training and evaluation alike (Bacellar et al., arXiv 2410.11112).

    The gradient passes straight through the sign to the weight; the gradient of an input is an extended finite
    difference: the differences between weights whose addresses have that input at 1 and at 0, discounted by ``beta``
    per other input in which their address differs from the one looked up, times ``alpha``. Weights are kept in
    [-1, 1]: they are clamped at the start of each training forward.

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    alpha : float, optional
        Scale of the input gradient; None for 0.5 * 0.75^(n - 1).
    beta : float
        Discount per differing input.
    initializer : str or mapping
        Initial values of the weights, clamped to [-1, 1].
    regularizer : str or mapping, optional
        Penalty on the weights.
    """

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        alpha: PositiveFloat | None = None,
        beta: Annotated[float, Field(ge=0, lt=1)] = 1 / 3,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "uniform",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        super().__init__(num_nodes, n, initializer=initializer, regularizer=regularizer, seed=seed)
        self.alpha = 0.5 * 0.75 ** (n - 1) if alpha is None else alpha
        self.beta = beta
        self._clamp()

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        if self.training:
            self._clamp()
        gradient = None
        if x.requires_grad and torch.is_grad_enabled():
            gradient = efd_table(self.weight.detach(), self.alpha, self.beta)
        return lookup(x, self.weight, gradient, wiring, flips, binary=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha:.4g}, beta={self.beta:.4g}"

    @torch.no_grad()
    def _clamp(self) -> None:
        self.weight.clamp_(-1, 1)
