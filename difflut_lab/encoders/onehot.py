"""One bit per level, of which one is set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflut_lab.encoders.base import Scope
from difflut_lab.encoders.levels import LevelEncoder
from difflut_lab.registry import register_encoder
from difflut_lab.schema import PositiveInt


@register_encoder("onehot")
class OneHot(LevelEncoder):
    """Bit t is 1 where the level is t: as many equally wide levels, from the least to the greatest value, as bits.

    Parameters
    ----------
    input_size : int
        F, the features of a sample.
    bits : int
        T, bits per feature, and levels.
    scope : str
        ``"feature"``, ``"channel"`` or ``"global"``: what has a range of its own.
    input_shape : sequence of int, optional
        Shape of a sample, for ``"channel"``.
    """

    def __init__(
        self,
        input_size: int,
        *,
        bits: PositiveInt = 3,
        scope: Scope = "feature",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(input_size, bits, bits, scope, input_shape)

    def encode(self, x: Tensor, bits: Tensor) -> Tensor:
        numbers = torch.arange(self.num_levels, device=x.device)
        level = self.levels(x)
        return torch.eq(level, numbers.to(level.dtype)[:, None], out=bits)
