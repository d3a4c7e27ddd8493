"""Nodes that choose among the logic gates of two inputs."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional

from difflut_lab.errors import ConfigError
from difflut_lab.nodes.sampling import SampledNodes, Sampling, straight_through
from difflut_lab.ops import Flips, Wiring, interpolate
from difflut_lab.registry import register_node
from difflut_lab.schema import PartOf, PositiveFloat

NUM_GATES = 16


def _check_inputs(n: int) -> int:
    if n != 2:
        raise ValueError("must be 2, the only choice: the gates of difflogic have two inputs")
    return n


def gates(like: Tensor) -> Tensor:
    """The truth tables of all gates, ``(16, 4)``, in the type and on the device of a tensor.

    Gate f has bit a of f as its entry a, address LSB first: AND is 8, the first input 10, the second 12, XOR 6, OR 14.
    """
    gate, address = torch.arange(NUM_GATES, device=like.device), torch.arange(4, device=like.device)
    return (gate.unsqueeze(1) >> address & 1).to(like.dtype)


def mixed(shares: Tensor) -> Tensor:
    """Tables ``(N, 4)`` of mixtures of gates with the shares ``(N, 16)``, in full precision under autocast too."""
    with torch.autocast(shares.device.type, enabled=False):
        return shares @ gates(shares)


@register_node("difflogic")
class DiffLogicNodes(SampledNodes):
    """A mixture of the 16 gates of two inputs, weighed by a softmax (Petersen et al., arXiv 2210.08277).

    Gates are mixed before their inputs are read: softmax(w) times the gates' truth tables is a table, which is
    interpolated. In evaluation a node is the gate with the greatest weight, the first of equal ones, which is not
    always the mixture rounded.

    Parameters
    ----------
    num_nodes, seed
        As of ``LUTNodes``.
    n : int
        2.
    sampling, sampling_tau
        As of ``SampledNodes``, but the noise is of the Gumbel distribution, on the weights w, one draw per node and
        forward: ``gumbel_soft`` mixes by softmax((w + noise) / sampling_tau), ``gumbel_hard`` takes the gate with the
        greatest w + noise.
    initializer : str or mapping
        Initial values of w. From tables it takes the gate that has the table's signs, with such a weight that the
        mixture has the probabilities of the logits' mean magnitude.
    regularizer : str or mapping, optional
        Penalty on w; on the mixture, scaled to [-1, 1], where it needs tables.

    Attributes
    ----------
    weight : nn.Parameter
        w, ``(N, 16)``.

    Raises
    ------
    ConfigError
        If n is not 2.
    """

    def __init__(
        self,
        num_nodes: int,
        n: Annotated[int, AfterValidator(_check_inputs)] = 2,
        *,
        sampling: Sampling = "soft",
        sampling_tau: PositiveFloat = 1.0,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "normal",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        try:
            _check_inputs(n)
        except ValueError as error:
            raise ConfigError(f"n={n}: {error}.") from None
        super().__init__(
            num_nodes,
            n,
            sampling=sampling,
            sampling_tau=sampling_tau,
            initializer=initializer,
            regularizer=regularizer,
            seed=seed,
        )

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_nodes, NUM_GATES

    def from_logits(self, logits: Tensor) -> Tensor:
        gate = ((logits >= 0).long() << torch.arange(4)).sum(dim=1)
        clarity = logits.abs().mean(dim=1)
        # of the other 15 gates 7 have a 1 where this one has: its share p solves p + (1 - p) 7 / 15 = sigmoid(clarity),
        # and w = log(15 p / (1 - p)), written so that it does not overflow
        weight = torch.log(15 * torch.sigmoid(clarity) - 7) - functional.logsigmoid(-clarity)
        return torch.zeros(self.weight_shape).scatter_(1, gate.unsqueeze(1), weight.unsqueeze(1))

    def real_table(self) -> Tensor:
        return 2 * mixed(self.weight.softmax(dim=1)) - 1

    @torch.no_grad()
    def tabulate(self) -> Tensor:
        return gates(self.weight)[self.weight.argmax(dim=1)] > 0

    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        if not (self.training and self.adds_noise):
            return self.sample(interpolate(x, mixed(self.weight.softmax(dim=1)), wiring, flips))
        noisy = self.weight - torch.log(-torch.log(self.uniform(self.weight)))
        mixture = torch.softmax(noisy / self.sampling_tau, dim=1)
        if self.sampling == "gumbel_hard":
            mixture = straight_through(mixture, functional.one_hot(noisy.argmax(dim=1), NUM_GATES))
        return interpolate(x, mixed(mixture), wiring, flips)
