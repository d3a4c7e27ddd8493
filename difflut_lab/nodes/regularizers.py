"""Penalties on the parameters of a bank, added to the loss of the training.

A regulariser is built from its options and called with the values ``(N, M)`` of N nodes. Penalties are means over nodes
and values, so that a weight means the same in layers of every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difflut_lab.nodes.walsh import walsh_coefficients
from difflut_lab.registry import register_regularizer
from difflut_lab.schema import NonNegativeFloat


@dataclass(frozen=True, kw_only=True)
class Regularizer:
    """The base class of regularisers.

    Attributes
    ----------
    needs_table : bool
        Whether it is called with the nodes' tables ``(N, K)``, K = 2^n, instead of any parameters ``(N, M)``.
    weight : float
        What the penalty is multiplied by.
    """

    needs_table: ClassVar[bool] = False

    weight: NonNegativeFloat = 1e-4
    # what the penalty is multiplied by

    def __call__(self, values: Tensor) -> Tensor:
        """The penalty, 0-dimensional, of values ``(N, M)``, before its weight."""
        raise NotImplementedError(f"{type(self).__name__} must supply __call__(values)")


@register_regularizer("l1")
@dataclass(frozen=True, kw_only=True)
class L1(Regularizer):
    """The mean magnitude: drives values to 0, one by one."""

    def __call__(self, values: Tensor) -> Tensor:
        return values.abs().mean()


@register_regularizer("l2")
@dataclass(frozen=True, kw_only=True)
class L2(Regularizer):
    """The mean square: keeps values small."""

    def __call__(self, values: Tensor) -> Tensor:
        return values.square().mean()


@register_regularizer("spectral")
@dataclass(frozen=True, kw_only=True)
class Spectral(Regularizer):
    """The energy of the tables' Walsh coefficients, sum_S |S|^power c_S^2, averaged over nodes: favours simple tables.

    A coefficient counts by its degree |S|, the number of inputs that it joins: parities of many inputs are penalised
    most, constants not at all. With power 1 it is the mean over addresses of a quarter of the squared differences to
    all neighbours, the total influence of the inputs (O'Donnell, Analysis of Boolean Functions, 2014, section 2.3).
    With power 0 all coefficients count alike, and by Parseval's theorem the energy is the mean square of the table,
    the penalty of ``l2``.
    """

    needs_table: ClassVar[bool] = True

    power: NonNegativeFloat = 1.0
    # a coefficient of degree d counts d^power times

    def __call__(self, values: Tensor) -> Tensor:
        sets = torch.arange(values.shape[1], device=values.device)
        degree = sum((sets >> k & 1 for k in range(values.shape[1].bit_length() - 1)), torch.zeros_like(sets))
        return (walsh_coefficients(values).square() * degree.to(values.dtype) ** self.power).sum(dim=1).mean()
