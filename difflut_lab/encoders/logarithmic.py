"""Levels that become wider geometrically, as binary numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from difflut_lab.encoders.base import Scope
from difflut_lab.encoders.levels import LevelEncoder
from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_encoder

MAX_BITS = 8  # base^levels must be a number


@register_encoder("logarithmic")
class Logarithmic(LevelEncoder):
    """The number of the level of log(x - low), least significant bit first.

    Of L = 2^bits levels between the least value ``low`` and the greatest ``high``, level l > 0 is
    ``d * base^(l - L) < x - low <= d * base^(l - L + 1)`` with ``d = high - low``: with base 2 the last level is the
    upper half of the range, the one below it the next quarter. Level 0 is what remains, so that there is no logarithm
    of 0; values outside of the range have its first or last level. Distances from ``low`` make the levels those of
    the raw data, however it is normalised. Miyashita et al. 2016 (arXiv 1603.01025) quantise like this.

    Parameters
    ----------
    input_size : int
        F, the features of a sample.
    bits : int
        T, bits per feature.
    base : float
        By how much each level is wider than the one below it. The levels tell values apart down to base^(1 - L) of
        the range.
    scope : str
        ``"feature"``, ``"channel"`` or ``"global"``: what has a range of its own.
    input_shape : sequence of int, optional
        Shape of a sample, for ``"channel"``.

    Raises
    ------
    ConfigError
        If float32 does not hold base^L.
    """

    def __init__(
        self,
        input_size: int,
        *,
        bits: Annotated[int, Field(ge=1, le=MAX_BITS)] = 3,
        base: Annotated[float, Field(gt=1)] = 2.0,
        scope: Scope = "feature",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(input_size, bits, 2**bits, scope, input_shape)
        if not 1 <= bits <= MAX_BITS:
            raise ConfigError(f"bits={bits}: must be at least 1 and at most {MAX_BITS}.")
        if not base > 1:
            raise ConfigError(f"base={base}: must be greater than 1.")
        self.base = base
        greatest = torch.finfo(torch.float32).max
        if self.num_levels * math.log(base) > math.log(greatest):
            raise ConfigError(
                f"base={base}: with bits={bits} the levels reach down to base^{1 - self.num_levels} of the range, less "
                f"than numbers can; the greatest base that they can is {greatest ** (1 / self.num_levels):.2f}."
            )

    def levels(self, x: Tensor) -> Tensor:
        low, distance = self.low.view(-1, 1, 1, 1), (self.high - self.low).view(-1, 1, 1, 1)
        # compared with powers of the base, not by a logarithm, which every machine rounds in its own way
        rest = ((x - low) / distance).mul_(self.base**self.num_levels)
        level, above = torch.zeros_like(rest), torch.empty_like(rest)
        # bit by bit, the greatest first; masks are numbers: bool ones and torch.where take several times as long
        for bit in reversed(range(self.bits_per_feature)):
            power = self.base ** (1 << bit)
            torch.gt(rest, power, out=above)
            level.add_(above, alpha=1 << bit)
            rest.div_(above.mul_(power - 1).add_(1))
        return level.to(self._integers)

    def words(self, x: Tensor) -> Tensor:
        return self.levels(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base={self.base}"
