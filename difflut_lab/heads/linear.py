"""Class scores by a dense layer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_head
from difflut_lab.schema import PositiveFloat
from difflut_lab.seeding import generator


@register_head("linear")
class Linear(nn.Module):
    """A class's score is a weighted sum of all inputs plus a bias: (W x + b) / tau.

    Unlike counting bits, it takes multiplications (or a sum of chosen weights per class) in hardware.

    Parameters
    ----------
    input_size : int
        N, the outputs of the last layer.
    num_classes : int
        C.
    tau : float
        Temperature of the scores. Every step of an optimizer such as Adam moves all N weights of a class, so that
        scores move N times as far as a table's entries; a large one makes up for it.
    seed : int
        For the initial values of W and b, uniform in +-1/sqrt(N) as of ``torch.nn.Linear``.

    Attributes
    ----------
    weight : nn.Parameter
        W, ``(C, N)``.
    bias : nn.Parameter
        b, ``(C,)``.
    """

    SCHEDULABLE: ClassVar[tuple[str, ...]] = ("tau",)

    def __init__(self, input_size: int, num_classes: int, *, tau: PositiveFloat = 1.0, seed: int = 42) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("num_classes", num_classes)):
            if value < 1:
                raise ConfigError(f"linear: {name}={value}: must be at least 1.")
        if not tau > 0:
            raise ConfigError(f"head.tau={tau}: must be greater than 0.")
        self.input_size = input_size
        self.num_classes = num_classes
        self.tau = tau
        bound, draws = input_size**-0.5, generator(seed, "init")
        self.weight = nn.Parameter(torch.empty(num_classes, input_size).uniform_(-bound, bound, generator=draws))
        self.bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, C)`` of bits ``(B, N)``.

        Raises
        ------
        ValueError
            If the shape of x is another.
        """
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"Linear expects inputs of shape (batch, {self.input_size}), got {tuple(x.shape)}.")
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias) / self.tau

    def extra_repr(self) -> str:
        return f"input_size={self.input_size}, num_classes={self.num_classes}, tau={self.tau}"
