"""Nodes whose inputs are read as probabilities of being 1."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from difflut_lab.nodes.base import FanIn
from difflut_lab.nodes.sampling import SampledNodes, Sampling
from difflut_lab.ops import Flips, Wiring, interpolate
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf, PositiveFloat


@register_node("probabilistic")
class ProbabilisticNodes(SampledNodes):
    """The expected table entry when every input is 1 with probability x: multilinear interpolation of sigmoid(W / T).

    The sigmoid is on the table, before interpolation (Bührer et al., BitLogic, arXiv 2602.07400).

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    temperature : float
        T. Small ones pull the entries towards 0 and 1.
    sampling, sampling_tau
        As of ``SampledNodes``.
    initializer : str or mapping
        Initial values of W; of W / T where they are tables.
    regularizer : str or mapping, optional
        Penalty on W.
    """

    SCHEDULABLE: tuple[str, ...] = ("temperature", "sampling_tau")

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        temperature: PositiveFloat = 0.25,
        sampling: Sampling = "soft",
        sampling_tau: PositiveFloat = 1.0,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "normal",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        # from_logits, called by the base class, reads it
        self.temperature = temperature
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
        return self.temperature * logits

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        return self.sample(interpolate(x, torch.sigmoid(self.weight / self.temperature), wiring, flips))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"
