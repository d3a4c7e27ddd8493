"""Initial values of the tables of a bank.

An initialiser is built from its options and called with the shape ``(N, K)`` of the weights and a generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_initializer
from difflut_lab.schema import NonNegativeFloat, PositiveFloat


class Initializer(Protocol):
    """What an initialiser is: a callable that makes the weights of a bank."""

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Weights of the shape ``(N, K)``, random numbers drawn from the generator only."""
        ...


@register_initializer("normal")
@dataclass(frozen=True, kw_only=True)
class Normal:
    """Independent draws from a normal distribution."""

    mean: float = 0.0
    # its centre

    std: NonNegativeFloat = 0.1
    # its standard deviation

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return torch.empty(shape).normal_(self.mean, self.std, generator=generator)


@register_initializer("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform:
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


@register_initializer("residual")
@dataclass(frozen=True, kw_only=True)
class Residual:
    """Every node starts as a copy of its first input: what makes deep stacks train.

    The learning rate times the number of steps, over the temperature, must be well above the clarity, or the tables
    stay what they were.
    """

    clarity: PositiveFloat = 1.0
    # weights are +clarity where the first input is 1, -clarity where it is 0

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        first_input = torch.arange(shape[1]) & 1
        return (self.clarity * (2.0 * first_input - 1.0)).to(torch.get_default_dtype()).repeat(shape[0], 1)
