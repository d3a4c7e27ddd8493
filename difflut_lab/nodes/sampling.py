"""Nodes that may draw their outputs at random in training, as bits with their probabilities."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.nodes.base import FanIn, TableNodes
from difflut_lab.schema import PartOf, PositiveFloat
from difflut_lab.seeding import derive_seed

Sampling = Literal["soft", "hard", "gumbel_soft", "gumbel_hard"]


class SampledNodes(TableNodes):
    """The base class of nodes with probabilities as outputs, and a choice of what they pass on in training.

    ``soft`` passes on the probability p. ``hard`` rounds it to a bit, with the gradient of p. ``gumbel_soft`` adds
    logistic noise g, the difference of two Gumbel draws, to the logit: sigmoid((logit(p) + g) / sampling_tau);
    ``gumbel_hard`` rounds that, with its gradient, so that the bit is 1 with probability p (Jang et al.,
    arXiv 1611.01144; Maddison et al., arXiv 1611.00712). In eval mode nothing is sampled.

    Parameters
    ----------
    num_nodes, n, initializer, regularizer, seed
        As of ``TableNodes``.
    sampling : str
        ``soft``, ``hard``, ``gumbel_soft`` or ``gumbel_hard``.
    sampling_tau : float
        Temperature of the noisy sigmoid of ``gumbel_soft`` and ``gumbel_hard``.

    Raises
    ------
    ConfigError
        If there is no such sampling.

    Attributes
    ----------
    sampling_step : Tensor
        Number of noisy forwards so far, int64, a buffer; only of nodes that add noise. The noise of a forward is drawn
        from a generator of its own, whose seed derives from this number.
    """

    SCHEDULABLE: tuple[str, ...] = ("sampling_tau",)

    sampling_step: Tensor

    def __init__(
        self,
        num_nodes: int,
        n: FanIn = 6,
        *,
        sampling: Sampling = "soft",
        sampling_tau: PositiveFloat = 1.0,
        initializer: Annotated[str | dict[str, Any], PartOf("initializer")] = "normal",
        regularizer: Annotated[str | dict[str, Any] | None, PartOf("regularizer")] = None,
        seed: int = 42,
    ) -> None:
        super().__init__(num_nodes, n, initializer=initializer, regularizer=regularizer, seed=seed)
        choices = typing.get_args(Sampling)
        if sampling not in choices:
            raise ConfigError(f"sampling={sampling}: must be one of {', '.join(choices)}.")
        self.sampling = sampling
        self.sampling_tau = sampling_tau
        if self.adds_noise:
            self.register_buffer("sampling_step", torch.zeros((), dtype=torch.int64))
        else:
            # without noise it plays no part
            self.SCHEDULABLE = tuple(name for name in self.SCHEDULABLE if name != "sampling_tau")

    @property
    def adds_noise(self) -> bool:
        """Whether outputs are random in training."""
        return self.sampling in ("gumbel_soft", "gumbel_hard")

    def sample(self, probability: Tensor, logit: Tensor | None = None) -> Tensor:
        """What a forward passes on of probabilities ``(B, N)``, whose logits may be given where they are known."""
        if not self.training or self.sampling == "soft":
            return probability
        if self.sampling == "hard":
            return straight_through(probability, probability >= 0.5 if logit is None else logit >= 0)
        if logit is None:
            wide = probability if probability.dtype == torch.float64 else probability.float()
            logit = torch.logit(wide, torch.finfo(wide.dtype).eps)
        # drawn with the batch contiguous, as the ops store their outputs
        noise = torch.logit(self.uniform(logit.t())).t()
        noisy = logit + noise
        relaxed = torch.sigmoid(noisy / self.sampling_tau).to(probability.dtype)
        return straight_through(relaxed, noisy >= 0) if self.sampling == "gumbel_hard" else relaxed

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform noise in (0, 1), the shape and type of a tensor; counts the step."""
        draws = torch.Generator(like.device).manual_seed(derive_seed(self.seed, "sampling", int(self.sampling_step)))
        self.sampling_step += 1
        noise = torch.rand(like.shape, generator=draws, dtype=like.dtype, device=like.device)
        smallest = torch.finfo(like.dtype).eps / 2
        return noise.clamp_(smallest, 1 - smallest)

    def extra_repr(self) -> str:
        how = f", sampling_tau={self.sampling_tau}" if self.adds_noise else ""
        return f"{super().extra_repr()}, sampling={self.sampling}{how}"


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The values of ``hard``, exactly, with the gradient of ``soft``; both of one shape."""
    value: Tensor = _StraightThrough.apply(soft, hard.to(soft.dtype))
    return value


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
