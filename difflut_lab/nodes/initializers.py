"""Initial values of the parameters of a bank.

An initialiser is built from its options and called with the shape ``(N, M)`` of a parameter, M values for each of N
nodes, and a generator. Some make tables instead: logits ``(N, K)``, K = 2^n, which the nodes translate into whatever
their parameters are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_initializer
from difflut_lab.schema import Fraction, NonNegativeFloat, PositiveFloat


class Initializer:
    """The base class of initialisers.

    Attributes
    ----------
    gives_table : bool
        Whether it is called with the shape ``(N, K)`` of tables and makes their logits; such an initialiser makes no
        sense for nodes without a table.
    """

    gives_table: ClassVar[bool] = False

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Values of the shape ``(N, M)``, random numbers drawn from the generator only."""
        raise NotImplementedError(f"{type(self).__name__} must supply __call__(shape, generator)")


@register_initializer("zeros")
@dataclass(frozen=True, kw_only=True)
class Zeros(Initializer):
    """All 0: logits that are sure of nothing."""

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return torch.zeros(shape)


@register_initializer("ones")
@dataclass(frozen=True, kw_only=True)
class Ones(Initializer):
    """All 1."""

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return torch.ones(shape)


@register_initializer("normal")
@dataclass(frozen=True, kw_only=True)
class Normal(Initializer):
    """Independent draws from a normal distribution."""

    mean: float = 0.0
    # its centre

    std: NonNegativeFloat = 0.1
    # its standard deviation

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return torch.empty(shape).normal_(self.mean, self.std, generator=generator)


@register_initializer("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Initializer):
    """Independent draws from a uniform distribution."""

    low: float = -1.0
    # its lower end

    high: float = 1.0
    # its upper end

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(f"initializer uniform: low={self.low} must be below high={self.high}.")

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return torch.empty(shape).uniform_(self.low, self.high, generator=generator)


@register_initializer("xavier")
@dataclass(frozen=True, kw_only=True)
class Xavier(Initializer):
    """Uniform draws with the variance gain^2 * 2 / (M + 1) (Glorot and Bengio, AISTATS 2010).

    A node is a linear unit of its M values: M inputs, one output. The M inputs of a table are the products that
    interpolation weighs its entries by.
    """

    gain: PositiveFloat = 1.0
    # factor of the standard deviation

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        bound = self.gain * math.sqrt(6 / (shape[1] + 1))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@register_initializer("kaiming")
@dataclass(frozen=True, kw_only=True)
class Kaiming(Initializer):
    """Normal draws with the variance gain^2 / M (He et al., arXiv 1502.01852), M values of a node as in ``xavier``."""

    gain: PositiveFloat = 2**0.5
    # factor of the standard deviation

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return torch.empty(shape).normal_(0, self.gain / math.sqrt(shape[1]), generator=generator)


@register_initializer("residual")
@dataclass(frozen=True, kw_only=True)
class Residual(Initializer):
    """Every node starts as a copy of its first input: what makes deep stacks train (Petersen et al., arXiv 2411.04732).

    The learning rate times the number of steps, over the temperature, must be well above the clarity, or the tables
    stay what they were.
    """

    gives_table: ClassVar[bool] = True

    clarity: PositiveFloat = 1.0
    # logits are +clarity where the first input is 1, -clarity where it is 0

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        first_input = torch.arange(shape[1]) & 1
        return (self.clarity * (2.0 * first_input - 1.0)).to(torch.get_default_dtype()).repeat(shape[0], 1)


@register_initializer("variance_stabilized")
@dataclass(frozen=True, kw_only=True)
class VarianceStabilized(Initializer):
    """Random tables whose outputs keep a given part of the variance of random bits.

    Bits that are 0 or 1 alike often have the variance 1/4. They address each entry alike often, so a node's output
    has the variance of its table's entries. Half of a table's logits, drawn at random, are +c and half are -c: the
    entries sigmoid(c) and sigmoid(-c) have the mean 1/2 and the variance (sigmoid(c) - 1/2)^2 = tanh(c/2)^2 / 4. So
    c = 2 artanh(sqrt(kept)) keeps the given part of 1/4, exactly and in every node. All of it would need infinite
    logits; truth tables, and nodes that output bits in training, keep all. It says nothing of gradients: six layers of
    200 probabilistic nodes learned digits slower from here than from ``normal`` or ``residual`` (120 steps of Adam 0.1:
    41, 86 and 88 % hard).

    The initialiser of this name in DiffLUT (github.com/aplesner/difflut) has the same purpose and draws from a normal
    distribution, with the variance 4 / (n + 1); what is said here about variances was derived for this one.
    """

    gives_table: ClassVar[bool] = True

    kept: Fraction = 0.9
    # part of the bits' variance that outputs have

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        clarity = 2 * math.atanh(math.sqrt(self.kept))
        rank = torch.rand(shape, generator=generator).argsort(dim=1).argsort(dim=1)
        return torch.where(rank < shape[1] // 2, clarity, -clarity).to(torch.get_default_dtype())
