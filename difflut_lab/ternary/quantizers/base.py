"""What a quantizer is: weights to codes in {-1, 0, +1} and their scales.

Shape letters: O output channels or features, I input channels or features; a weight is ``(O, I, ...)``.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.registry import REGISTRY
from difflut_lab.schema import PositiveInt, Probability

Granularity = Literal["tensor", "channel", "group"]
# of the values that quantisation divides by: a weight of zeros has scale 0 and codes 0
TINY = 1e-12


def smallest(dtype: torch.dtype) -> float:
    """What values of a type are divided by at least: ``TINY``, or in float16, which has no such number, the least."""
    return max(TINY, torch.finfo(dtype).tiny)


class Ternary(NamedTuple):
    """A quantised weight: ``scale * codes + skew * |codes|``."""

    codes: Tensor
    # -1, 0 or +1, of the weight's shape and dtype; its gradient reaches the latent weight

    scale: Tensor
    # broadcasts against codes

    skew: Tensor
    # broadcasts against codes; 0 except where + and - have scales of their own

    def values(self) -> Tensor:
        """The weight, of the codes' shape."""
        return self.scale * self.codes + self.skew * self.codes.abs()


class Quantizer(nn.Module):
    """Base class of quantizers: ``quantizer(weight)`` gives codes, scale and skew, and is differentiable.

    A subclass supplies ``quantize``, and ``prepare`` where it learns something. Its options are the annotated keyword
    parameters of its ``__init__``.

    Parameters
    ----------
    granularity : str
        Which weights share a scale: all of them (``tensor``), those of an output channel (``channel``), or of an
        output channel those of ``group_size`` consecutive input channels (``group``).
    group_size : int
        Input channels per group; the last group of a channel may be smaller. Of ``granularity=group`` only.
    blend : float
        In training, the share of the ternary weight in the weight that is used; the rest is the latent weight. It may
        be scheduled, from 0 to 1 over the first epochs. In eval mode the weight is ternary whatever it is.

    Raises
    ------
    ConfigError
        If there is no such granularity.
    """

    SCHEDULABLE: tuple[str, ...] = ("blend",)

    # whether the weight stays as it is
    is_float: ClassVar[bool] = False

    # whether codes are drawn at random in training
    draws: ClassVar[bool] = False

    def __init__(
        self, *, granularity: Granularity = "channel", group_size: PositiveInt = 64, blend: Probability = 1.0
    ) -> None:
        super().__init__()
        choices = typing.get_args(Granularity)
        if granularity not in choices:
            raise ConfigError(f"granularity={granularity}: must be one of {', '.join(choices)}.")
        self.granularity = granularity
        self.group_size = group_size
        self.blend = blend

    def prepare(self, weight: Tensor) -> None:
        """Create what is learned beside the weight; called once, by the layer that owns the weight, at its start.

        Parameters
        ----------
        weight : Tensor
            Initial latent weight ``(O, I, ...)``.
        """

    def quantize(self, weight: Tensor, generator: torch.Generator | None) -> Ternary:
        """Codes, scale and skew of a latent weight ``(O, I, ...)``.

        Parameters
        ----------
        weight : Tensor
            Latent weight.
        generator : Generator, optional
            Source of the draws of a quantizer that ``draws``; none in eval mode.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply quantize(weight, generator)")

    def forward(self, weight: Tensor, generator: torch.Generator | None = None) -> Ternary:
        """Codes, scale and skew of a latent weight ``(O, I, ...)``; a generator only for random codes in training."""
        return self.quantize(weight, generator)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the weights that share a scale, broadcastable against ``values (O, I, ...)``."""
        return self.sum(values) / self.sum(torch.ones_like(values))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the weights that share a scale, broadcastable against ``values (O, I, ...)``."""
        return self._reduce(values, torch.sum)

    def amax(self, values: Tensor) -> Tensor:
        """The maximum over the weights that share a scale, broadcastable against ``values (O, I, ...)``."""
        return self._reduce(values, torch.amax)

    def compact(self, values: Tensor) -> Tensor:
        """One value per scale, ``(1, 1, ...)``, ``(O, 1, ...)`` or ``(O, groups, 1, ...)``, of what ``mean`` gives."""
        return values[:, :: self.group_size] if self._grouped(values) else values

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """The reverse of ``compact``: broadcastable against the weight."""
        if not self._grouped(weight):
            return values
        return values.repeat_interleave(self.group_size, dim=1)[:, : weight.shape[1]]

    def _grouped(self, values: Tensor) -> bool:
        return self.granularity == "group" and values.dim() > 1

    def _reduce(self, values: Tensor, reduction: Callable[..., Tensor]) -> Tensor:
        ones = [1] * (values.dim() - 1)
        # a bias has one value per channel, which cannot have a scale of its own
        if self.granularity == "tensor" or values.dim() == 1:
            return reduction(values.flatten(), 0).view(1, *ones)
        if self.granularity == "channel":
            return reduction(values.flatten(1), 1).view(-1, *ones)
        rows = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
        groups = [reduction(part.flatten(1), 1) for part in rows.split(self.group_size, dim=1)]
        return self.spread(torch.stack(groups, dim=1).view(len(values), -1, *ones[1:]), values)

    def extra_repr(self) -> str:
        size = f", group_size={self.group_size}" if self.granularity == "group" else ""
        return f"granularity={self.granularity}{size}"


def build_quantizer(spec: str | Mapping[str, Any] | Quantizer) -> Quantizer:
    """A quantizer from its registered name, a mapping of ``name`` and options, or a copy of a given one.

    Raises
    ------
    ConfigError
        If there is none of that name, or it refuses its options.
    """
    if isinstance(spec, Quantizer):
        return copy.deepcopy(spec)
    quantizer: Quantizer = REGISTRY.build("quantizer", spec)
    return quantizer


def straight_through(weight: Tensor, codes: Tensor, slope: Tensor | float) -> Tensor:
    """The codes, with the gradient ``slope`` with respect to the weight; ``slope`` broadcasts against both."""
    value: Tensor = _StraightThrough.apply(weight, codes, slope)
    return value


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, codes: Tensor, slope: Tensor | float) -> Tensor:
        ctx.slope = slope
        # a zero has no sign: of a product with a sign it may have one
        return codes.to(weight.dtype) + 0.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.slope, None, None
