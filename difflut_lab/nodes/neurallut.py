"""Nodes that are small neural networks.

Shape letters: N nodes, n inputs per node.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.nodes.base import FanIn
from difflut_lab.nodes.gathered import GatheredNodes
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf, PositiveInt
from difflut_lab.seeding import generator

# addresses that initial values are standardised over, at most
_SAMPLE = 256


@register_node("neurallut")
class NeuralLUTNodes(GatheredNodes):
    """A neural network per node, sigmoid(MLP(x)), tabulated after training (Andronic et al., NeuraLUT, 2403.00849).

    The network has ``depth`` affine maps with rectifiers between them. Every ``skip`` of them are bridged by an affine
    map from the values before them, added to what they give. An entry of the truth table is 1 where the network's
    output is at least 0.

    Parameters
    ----------
    num_nodes, n, seed
        As of ``LUTNodes``.
    width : int
        Units of each hidden layer.
    depth : int
        Affine maps; 1 is a linear node.
    skip : int
        Affine maps per bridge, which must divide ``depth``; 0 for no bridges.
    regularizer : str or mapping, optional
        Penalty on all parameters.

    Attributes
    ----------
    weight : nn.Parameter
        ``(N, M)``, all of a node's network in one row: the matrices of the affine maps, their biases, and the matrices
        of the bridges, whose biases would add to those of the maps that they end with.

    Raises
    ------
    ConfigError
        If ``skip`` does not divide ``depth``.
    """

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        width: PositiveInt = 8,
        depth: PositiveInt = 2,
        skip: Annotated[int, Field(ge=0)] = 2,
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        super().__init__(num_nodes, n, regularizer=regularizer, seed=seed)
        if skip and depth % skip:
            raise ConfigError(f"skip={skip}: must divide depth={depth}, or be 0 for no bridges.")
        self.width = width
        self.depth = depth
        self.skip = skip
        sizes = [n, *[width] * (depth - 1), 1]
        starts = range(0, depth, skip) if skip else ()
        self._maps = list(zip(sizes[1:], sizes[:-1], strict=True))
        self._bridges = [(sizes[start + skip], sizes[start]) for start in starts]
        draws = generator(seed, "weight")
        maps = [_initial(num_nodes, *shape, i == 0, draws) for i, shape in enumerate(self._maps)]
        bridges = [_initial(num_nodes, *shape, i == 0, draws) for i, shape in enumerate(self._bridges)]
        biases = [matrix.new_zeros(matrix.shape[:2]) for matrix in maps]
        # what reads the inputs starts as 0 in the middle of the cube, so that it differs between addresses
        biases[0] -= maps[0].sum(2) / 2
        if skip:
            biases[skip - 1] -= bridges[0].sum(2) / 2
        self.weight = nn.Parameter(torch.cat([part.flatten(1) for part in (*maps, *biases, *bridges)], dim=1))
        self._standardize(torch.randperm(2**n, generator=draws)[:_SAMPLE])

    def logits(self, rows: Tensor) -> Tensor:
        maps, biases, bridges = self._parts()
        bridged = rows
        for index, (matrix, bias) in enumerate(zip(maps, biases, strict=True)):
            rows = torch.baddbmm(bias, matrix, rows)
            ends = self.skip and (index + 1) % self.skip == 0
            if ends:
                rows = torch.baddbmm(rows, bridges[index // self.skip], bridged)
            if index + 1 < self.depth:
                rows = torch.relu_(rows)
            if ends:
                bridged = rows
        return rows.squeeze(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}, depth={self.depth}, skip={self.skip}"

    @torch.no_grad()
    def _standardize(self, addresses: Tensor) -> None:
        """Scale and shift the last map, so that a node's logits have mean 0 and variance 1 over some addresses.

        Rectified units are never negative: without this, many nodes would start with the same bit at every address.
        """
        bits = (addresses >> torch.arange(self.n).unsqueeze(1) & 1).to(self.weight)
        std, mean = torch.std_mean(self.logits(bits.expand(self.num_nodes, -1, -1)), dim=1, correction=0)
        # nodes whose hidden units are all 0 keep their scale
        scale = torch.where(std > 0.1, 1 / std, 1.0).view(-1, 1, 1)
        maps, biases, bridges = self._parts()
        biases[-1].sub_(mean.view(-1, 1, 1))
        for part in (maps[-1], biases[-1], *bridges[-1:]):
            part.mul_(scale)

    def _parts(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Matrices ``(N, outputs, inputs)`` and biases ``(N, outputs, 1)`` of the maps, matrices of the bridges."""
        shapes = [*self._maps, *((outputs, 1) for outputs, _ in self._maps), *self._bridges]
        rows = self.weight.split([math.prod(shape) for shape in shapes], dim=1)
        parts = [row.unflatten(1, shape) for row, shape in zip(rows, shapes, strict=True)]
        return parts[: self.depth], parts[self.depth : 2 * self.depth], parts[2 * self.depth :]


def _initial(num_nodes: int, outputs: int, inputs: int, from_bits: bool, draws: Generator) -> Tensor:
    """A matrix ``(N, outputs, inputs)`` that gives sums of variance 1 (He et al., arXiv 1502.01852).

    Bits have the variance 1/4; rectified sums of variance 1 have the mean square 1/2.
    """
    gain = 4 if from_bits else 2
    return torch.empty(num_nodes, outputs, inputs).normal_(0, math.sqrt(gain / inputs), generator=draws)
