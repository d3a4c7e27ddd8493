"""What encoders have in common that number a feature's value and write the number in bits.

Shape letters: R rows, F features, B batch, T bits per feature, as in ``base``; L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from difflut_lab.encoders.base import FittedEncoder, Scope
from difflut_lab.errors import ConfigError

MAX_BITS = 16  # float32 tells 2^24 levels apart, barely; no sensor that feeds a table has more than 2^16
WordBits = Annotated[int, Field(ge=1, le=MAX_BITS)]


class LevelEncoder(FittedEncoder):
    """An encoder that cuts the range of the training values into L levels and writes a level's number in T bits.

    The levels are equally wide: level l is ``low + w * l < x <= low + w * (l + 1)`` with ``w = (high - low) / L``, so
    that x's level is how many of the L - 1 inner bounds it is greater than. Values outside of the range have its first
    or last level, and so have ``low`` and ``high`` themselves.

    A subclass supplies ``words``, and may place the levels otherwise (``fit_rows``, ``levels``).

    Parameters
    ----------
    input_size : int
        F.
    bits : int
        T.
    num_levels : int
        L.
    scope, input_shape
        As of ``FittedEncoder``.

    Attributes
    ----------
    low, high : Tensor
        ``(R,)``, the range; buffers, NaN until fitted or loaded.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, input_size: int, bits: int, num_levels: int, scope: Scope, input_shape: Sequence[int] | None
    ) -> None:
        super().__init__(input_size, bits, scope, input_shape)
        if num_levels > 2**MAX_BITS:
            raise ConfigError(f"bits={bits}: {num_levels} levels are too many; at most 2^{MAX_BITS}.")
        self.num_levels = num_levels
        self.register_buffer("low", torch.full((self.rows,), torch.nan))
        self.register_buffer("high", torch.full((self.rows,), torch.nan))

    def fit_rows(self, rows: Tensor) -> None:
        self.low.copy_(rows.amin(dim=1))
        self.high.copy_(rows.amax(dim=1))

    def levels(self, x: Tensor) -> Tensor:
        """Numbers of the levels of features.

        Parameters
        ----------
        x : Tensor
            ``(R, F / R, 1, B)``.

        Returns
        -------
        Tensor
            Integers, 0 to L - 1, of x's shape: uint8 if they fit, else int32.
        """
        low, high = self.low.view(-1, 1, 1, 1), self.high.view(-1, 1, 1, 1)
        # the greatest number in place of infinity, so that a constant feature's value times it is 0, all above are high
        scale = (self.num_levels / (high - low)).clamp_(max=torch.finfo(low.dtype).max)
        # a difference, then a product: no compiler can fuse them, so that all machines round alike
        level = (x - low).mul_(scale).nan_to_num_(nan=0.0).ceil_().sub_(1).clamp_(0, self.num_levels - 1)
        return level.to(self._integers)

    def words(self, x: Tensor) -> Tensor:
        """Code words of features: integers whose bit t, least significant first, is output bit t.

        Parameters
        ----------
        x : Tensor
            ``(R, F / R, 1, B)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply words(x)")

    def encode(self, x: Tensor, bits: Tensor) -> Tensor:
        masks = 1 << torch.arange(self.bits_per_feature, device=x.device)
        return torch.ne(self.words(x) & masks.to(self._integers)[:, None], 0, out=bits)

    @property
    def _integers(self) -> torch.dtype:
        return torch.uint8 if self.bits_per_feature <= 8 and self.num_levels <= 256 else torch.int32
