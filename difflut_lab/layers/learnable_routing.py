"""Layers that learn which inputs their nodes read."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from difflut_lab import schema
from difflut_lab.layers.base import BaseLUTLayer
from difflut_lab.layers.wiring_cache import WiringCache
from difflut_lab.ops import Wiring, route
from difflut_lab.registry import REGISTRY, register_layer
from difflut_lab.schema import PositiveFloat, PositiveInt
from difflut_lab.seeding import generator

# entries of the table of taken inputs that is in memory at once, in bytes
_CHUNK = 1 << 24


@register_layer("learnable_routing")
class LearnableRouting(BaseLUTLayer):
    """Every slot of a node reads the candidate input with the highest score; the scores are trained.

    The choice is hard in training too. The gradient of a score is sum_b g (2 x - 1), with g the gradient of the slot
    and x the candidate's value; the gradient of the inputs is g spread over the candidates by softmax(scores / tau).
    Ties go to the lowest candidate; two slots of a node may choose the same input.

    Parameters
    ----------
    *args, **kwargs
        As of ``BaseLUTLayer``.
    candidates : int, optional
        k, distinct inputs drawn at random for every slot; None, or F and more, for all inputs.
    tau : float
        Temperature of the gradient of the inputs.

    Attributes
    ----------
    scores : nn.Parameter
        ``(N, n, k)``.
    candidates : Tensor or None
        int32 ``(N, n, k)``, ascending, a buffer; None where every input is a candidate.
    """

    SCHEDULABLE: ClassVar[tuple[str, ...]] = ("tau",)

    candidates: Tensor | None

    def __init__(
        self, *args: Any, candidates: PositiveInt | None = None, tau: PositiveFloat = 0.001, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        schema.validate(LearnableRouting, {"candidates": candidates, "tau": tau}, "layer", REGISTRY.provided("layer"))
        slots = (self.output_size, self.n)
        drawn = None
        if candidates is not None and candidates < self.input_size:
            drawn = draw_candidates(self.input_size, slots, candidates, generator(self.seed, "wiring"))
        self.register_buffer("candidates", drawn)
        count = self.input_size if drawn is None else drawn.shape[-1]
        scores = torch.empty(*slots, count).normal_(0, 0.01, generator=generator(self.seed, "scores"))
        self.scores = nn.Parameter(scores)
        self.tau = tau
        self._candidate_cache = WiringCache()
        self._refresh()

    @property
    def fixed_wiring(self) -> bool:
        # compiled code cannot look at the choice, and routes by the scores in eval mode as well
        return self.is_frozen or not (self.training or torch.compiler.is_compiling())

    @torch.no_grad()
    def wiring(self) -> Tensor:
        choice = self.scores.argmax(dim=-1)
        if self.candidates is None:
            return choice.to(torch.int32)
        return self.candidates.gather(-1, choice.unsqueeze(-1)).squeeze(-1)

    def route(self, x: Tensor) -> Tensor:
        candidates = None if self.candidates is None else self._candidate_wiring(self.candidates)
        return route(x, self.scores, candidates, self.tau).unflatten(1, (self.output_size, self.n))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, candidates={self.scores.shape[-1]}, tau={self.tau}"

    def _candidate_wiring(self, candidates: Tensor) -> Wiring:
        return self._candidate_cache.get(candidates, self.input_size)

    def _refresh(self) -> None:
        super()._refresh()
        if self.candidates is not None and not self.candidates.is_meta:
            self._candidate_wiring(self.candidates)


def draw_candidates(num_inputs: int, slots: tuple[int, int], count: int, generator: Generator) -> Tensor:
    """Draw distinct inputs for every slot, each set as likely as any other.

    Floyd's sampling (Bentley and Floyd, A Sample of Brilliance, CACM 1987), for all slots at once.

    Parameters
    ----------
    num_inputs : int
        F.
    slots : tuple of int
        N and n.
    count : int
        k, at most F.
    generator : Generator
        Source of randomness.

    Returns
    -------
    Tensor
        int32 ``(N, n, k)``, ascending along the last dimension.
    """
    total = slots[0] * slots[1]
    drawn = []
    for first in range(0, total, max(1, _CHUNK // num_inputs)):
        rows = torch.arange(min(total - first, max(1, _CHUNK // num_inputs)))
        taken = torch.zeros(len(rows), num_inputs, dtype=torch.bool)
        for highest in range(num_inputs - count, num_inputs):
            pick = torch.randint(0, highest + 1, rows.shape, generator=generator)
            pick = torch.where(taken[rows, pick], highest, pick)
            taken[rows, pick] = True
        drawn.append(taken.nonzero()[:, 1].to(torch.int32))
    return torch.cat(drawn).view(*slots, count)
