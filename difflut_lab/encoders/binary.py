"""Levels as binary numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from difflut_lab.encoders.base import Scope
from difflut_lab.encoders.levels import LevelEncoder, WordBits
from difflut_lab.registry import register_encoder


@register_encoder("binary")
class Binary(LevelEncoder):
    """The level's number, least significant bit first: 2^bits equally wide levels from the least to the greatest value.

    As many levels as a thermometer with 2^bits - 1 bits, but neighbouring levels may differ in all bits.

    Parameters
    ----------
    input_size : int
        F, the features of a sample.
    bits : int
        T, bits per feature.
    scope : str
        ``"feature"``, ``"channel"`` or ``"global"``: what has a range of its own.
    input_shape : sequence of int, optional
        Shape of a sample, for ``"channel"``.
    """

    def __init__(
        self,
        input_size: int,
        *,
        bits: WordBits = 3,
        scope: Scope = "feature",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(input_size, bits, 2**bits, scope, input_shape)

    def words(self, x: Tensor) -> Tensor:
        return self.levels(x)
