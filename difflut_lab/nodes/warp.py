"""Nodes whose tables are given by Walsh coefficients."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from difflut_lab.nodes.base import FanIn
from difflut_lab.nodes.sampling import SampledNodes, Sampling
from difflut_lab.nodes.walsh import walsh_coefficients, walsh_table
from difflut_lab.ops import Flips, Wiring, interpolate
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf, PositiveFloat


@register_node("warp")
class WARPNodes(SampledNodes):
    """The sigmoid of a Walsh sum, sum_S c_S prod_{k in S} (2 x_k - 1) / tau (Gerlach et al., arXiv 2510.15655).

    A Walsh sum is multilinear, so it is the interpolation of its table H, which n butterflies make of the coefficients.
    The sigmoid comes after interpolation. An entry of the truth table is 1 where that of H is at least 0.

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    tau : float
        Temperature that the sum is divided by.
    sampling, sampling_tau
        As of ``SampledNodes``.
    initializer : str or mapping
        Initial values of the coefficients; of H where they are tables.
    regularizer : str or mapping, optional
        Penalty on the coefficients; on H where it needs tables.

    Attributes
    ----------
    weight : nn.Parameter
        The coefficients c, ``(N, K)``; bit k of an index says whether input k is in S.
    """

    SCHEDULABLE: tuple[str, ...] = ("tau", "sampling_tau")

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        tau: PositiveFloat = 1.0,
        sampling: Sampling = "soft",
        sampling_tau: PositiveFloat = 1.0,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "normal",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        # from_logits, called by the base class, reads it
        self.tau = tau
        super().__init__(
            num_nodes,
            n,
            sampling=sampling,
            sampling_tau=sampling_tau,
            initializer=initializer,
            regularizer=regularizer,
            seed=seed,
        )

    def from_logits(self, logits: Tensor) -> Tensor:
        return self.tau * walsh_coefficients(logits)

    def real_table(self) -> Tensor:
        return walsh_table(self.weight) / self.tau

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        logit = interpolate(x, self.real_table(), wiring, flips)
        return self.sample(torch.sigmoid(logit), logit)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau}"
