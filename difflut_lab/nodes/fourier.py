"""Nodes that are sums of waves.

Shape letters: N nodes, n inputs per node, W waves.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from difflut_lab.nodes.base import FanIn
from difflut_lab.nodes.gathered import GatheredNodes
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf
from difflut_lab.seeding import generator

# exactly at 0 or pi a phase has no gradient on bits; validation on digits, hard: 90.6 % with 0.1, 89.2 % with 0.3,
# 79.2 % with phases all around the circle
_PHASE_STD = 0.1


@register_node("fourier")
class FourierNodes(GatheredNodes):
    """A sum of cosines, clamp(b + sum_f A_f cos(2 pi k_f.x + phi_f), 0, 1) (BitLogic, arXiv 2602.07400).

    A frequency k_f is 0 or 1/2 for each input, so that a wave turns by half a period with each of its inputs: whole
    frequencies would be constant on bits. The frequencies are those with the fewest inputs, at random among those with
    as many, without the one that is constant; the nodes of a bank share them, and they are not trained. Amplitudes are
    at least 0 and scaled down to a sum of 1/2 where they exceed it. An entry of the truth table is 1 where the sum is
    at least 1/2.

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    frequencies : int
        The most waves per node, 1 to 32; there are 2^n - 1.
    regularizer : str or mapping, optional
        Penalty on amplitudes, phases and b.

    Attributes
    ----------
    turns : Tensor
        bool ``(W, n)``, a buffer: which inputs of a wave have the frequency 1/2.
    weight : nn.Parameter
        ``(N, W)``; the amplitudes are its magnitudes, scaled.
    phase : nn.Parameter
        phi, ``(N, W)``; starts near 0 or pi.
    bias : nn.Parameter
        b, ``(N, 1)``; starts at 1/2, where no input reaches the clamp.
    """

    turns: Tensor

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        frequencies: Annotated[int, Field(ge=1, le=32)] = 32,
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        super().__init__(num_nodes, n, regularizer=regularizer, seed=seed)
        draws = generator(seed, "frequencies")
        rank = torch.rand(2**n, generator=draws).tolist()
        chosen = sorted(range(1, 2**n), key=lambda address: (address.bit_count(), rank[address]))[:frequencies]
        self.register_buffer("turns", (torch.tensor(chosen).unsqueeze(1) >> torch.arange(n) & 1).bool())
        draws = generator(seed, "weight")
        waves = len(chosen)
        self.weight = nn.Parameter(torch.rand(num_nodes, waves, generator=draws) / waves)
        # near 0 or pi a wave is at its full height on bits; elsewhere its height is spent between them, where the truth
        # table does not see it
        signs = torch.randint(0, 2, (num_nodes, waves), generator=draws)
        self.phase = nn.Parameter(torch.normal(math.pi * signs, _PHASE_STD, generator=draws))
        self.bias = nn.Parameter(torch.full((num_nodes, 1), 0.5))

    def logits(self, rows: Tensor) -> Tensor:
        amplitude = self.weight.abs()
        amplitude = amplitude / (2 * amplitude.sum(dim=1, keepdim=True)).clamp_min(1)
        turns = (math.pi * self.turns).to(rows.dtype).expand(rows.shape[0], -1, -1)
        waves = torch.baddbmm(self.phase.unsqueeze(2), turns, rows).cos()
        return torch.baddbmm((self.bias - 0.5).unsqueeze(2), amplitude.unsqueeze(1), waves).squeeze(1)

    def squash(self, logits: Tensor) -> Tensor:
        return (logits + 0.5).clamp(0, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, waves={len(self.turns)}"
