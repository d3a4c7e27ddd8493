"""Nodes that are polynomials of their inputs.

Shape letters: N nodes, n inputs per node, K = 2^n table entries. A set of inputs is written as an address.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from difflut_lab.nodes.base import FanIn, TableNodes
from difflut_lab.nodes.walsh import walsh_coefficients, walsh_table
from difflut_lab.ops import Flips, Wiring, interpolate
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf, PositiveInt


@register_node("polylut")
class PolyLUTNodes(TableNodes):
    """The sigmoid of a polynomial, tabulated after training (Andronic and Constantinides, PolyLUT, arXiv 2309.02334).

    The polynomial is sum_S w_S prod_{k in S} x_k over the sets S of at most ``degree`` inputs: powers of a bit are the
    bit, so no input is squared. It is linear in each input, so it equals the interpolation of its values at the
    addresses, which are sums of w over subsets. An entry of the truth table is 1 where that sum is at least 0.

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    degree : int
        The most inputs in a product, at least 1. From n on there are all 2^n products, and a node can be any function.
    initializer : str or mapping
        Initial values of the coefficients of the same polynomial in 2 x - 1, whose products are -1 or 1 at every
        address: draws for w itself would add up to large logits where many inputs are 1 and to small ones elsewhere.
        An initialiser of tables gives the part of its logits that has the degree.
    regularizer : str or mapping, optional
        Penalty on w; on the logits of the table where it needs one.

    Attributes
    ----------
    weight : nn.Parameter
        w, ``(N, terms)``, the sets in the order of ``terms``.
    """

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        degree: PositiveInt = 2,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "kaiming",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        # terms, which the base class asks for, reads it
        self.degree = degree
        super().__init__(num_nodes, n, initializer=initializer, regularizer=regularizer, seed=seed)
        coefficients = self._at_terms(self.weight.detach())
        self.weight = nn.Parameter(_accumulate(walsh_table(coefficients), factor=-1)[:, self.terms])

    @functools.cached_property
    def terms(self) -> list[int]:
        """The sets of at most ``degree`` inputs, ascending as addresses."""
        return [address for address in range(2**self.n) if address.bit_count() <= self.degree]

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_nodes, len(self.terms)

    def from_logits(self, logits: Tensor) -> Tensor:
        return walsh_coefficients(logits)[:, self.terms]

    def real_table(self) -> Tensor:
        table: Tensor = _SubsetSums.apply(self._at_terms(self.weight), False)
        return table

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        return torch.sigmoid(interpolate(x, self.real_table(), wiring, flips))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, degree={self.degree}"

    def _at_terms(self, values: Tensor) -> Tensor:
        """Values ``(N, terms)`` at the addresses of their sets, ``(N, K)``; 0 elsewhere."""
        entries = 2**self.n
        if len(self.terms) == entries:
            return values
        terms = torch.tensor(self.terms, device=values.device)
        return values.new_zeros(values.shape[0], entries).index_copy(1, terms, values)


class _SubsetSums(torch.autograd.Function):
    """For each address the sum over its subsets; ``transposed``, over its supersets."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        return _accumulate(values, transposed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SubsetSums.apply(gradient, not ctx.transposed), None


def _accumulate(values: Tensor, transposed: bool = False, factor: int = 1) -> Tensor:
    """Rows times the Kronecker power of [[1, 0], [factor, 1]], or of its transpose; factor -1 is the inverse of 1."""
    num_nodes, entries = values.shape
    # nodes innermost: every stage then adds long contiguous rows
    rows = values.t().clone(memory_format=torch.contiguous_format)
    for bit in range(entries.bit_length() - 1):
        low, high = rows.view(-1, 2, 1 << bit, num_nodes).unbind(1)
        if transposed:
            low.add_(high, alpha=factor)
        else:
            high.add_(low, alpha=factor)
    return rows.t().contiguous()
