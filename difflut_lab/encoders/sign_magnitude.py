"""The sign, and levels of the absolute value as binary numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from difflut_lab.encoders.base import Scope
from difflut_lab.encoders.levels import MAX_BITS, LevelEncoder
from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_encoder


@register_encoder("sign_magnitude")
class SignMagnitude(LevelEncoder):
    """The level of abs(x) in bits - 1 bits, least significant first, then the sign: 1 where x < 0.

    2^(bits - 1) equally wide levels from 0 to the greatest absolute value, so that x and -x differ in the sign only.
    For features whose zero means something: it is the zero after the data set's normalisation.

    Parameters
    ----------
    input_size : int
        F, the features of a sample.
    bits : int
        T, bits per feature, the sign's among them; at least 2.
    scope : str
        ``"feature"``, ``"channel"`` or ``"global"``: what has a range of its own.
    input_shape : sequence of int, optional
        Shape of a sample, for ``"channel"``.
    """

    def __init__(
        self,
        input_size: int,
        *,
        bits: Annotated[int, Field(ge=2, le=MAX_BITS)] = 3,
        scope: Scope = "feature",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        if bits < 2:
            raise ConfigError(f"bits={bits}: must be at least 2, one for the sign and one for the magnitude.")
        super().__init__(input_size, bits, 2 ** (bits - 1), scope, input_shape)

    def fit_rows(self, rows: Tensor) -> None:
        low, high = (end.to(self.low.dtype) for end in rows.aminmax(dim=1))
        self.low.zero_()
        self.high.copy_(high.maximum(-low))

    def words(self, x: Tensor) -> Tensor:
        # the type of the range first: the least of the integers of a type has no absolute value
        magnitude = self.levels(x.abs() if x.is_floating_point() else x.to(self.low.dtype).abs())
        return magnitude | ((x < 0).to(magnitude.dtype) << (self.bits_per_feature - 1))
