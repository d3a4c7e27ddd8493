"""What encoders have in common.

Shape letters: S training samples, B batch, F features, T bits per feature, R rows (features, channels or 1: how many
sets of fitted values there are).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from difflut_lab.errors import ConfigError, DataError
from difflut_lab.schema import PositiveInt

Scope = Literal["feature", "channel", "global"]


class Encoder(nn.Module):
    """Base class of encoders: features ``(B, *shape)`` to bits ``(B, output_size)``.

    Attributes
    ----------
    input_size : int
        F, the features of a sample, flattened.
    bits_per_feature : int
        Bits made of each feature; bit t of feature f is output f * bits_per_feature + t.
    output_size : int
        F * bits_per_feature.
    """

    def __init__(self, input_size: int, bits_per_feature: int) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("bits", bits_per_feature)):
            if size < 1:
                raise ConfigError(f"{name}={size}: must be at least 1.")
        self.input_size = input_size
        self.bits_per_feature = bits_per_feature

    @property
    def output_size(self) -> int:
        """Bits of a sample."""
        return self.input_size * self.bits_per_feature

    def fit(self, x: Tensor) -> None:
        """Fit to the training data, ``(S, *shape)``."""
        raise NotImplementedError(f"{type(self).__name__} must supply fit(x)")

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) if x.dim() > 1 else x
        if flat.dim() != 2 or flat.shape[1] != self.input_size:
            raise ValueError(
                f"{type(self).__name__} expects {self.input_size} features per sample, got shape {tuple(x.shape)}."
            )
        return flat


class FittedEncoder(Encoder):
    """An encoder whose bits depend on values fitted to the training data, per feature, per channel or for all.

    A subclass registers buffers, filled with NaN, of R = ``rows`` rows, and supplies ``fit_rows``, which fills them,
    and ``encode``.

    Parameters
    ----------
    input_size : int
        F.
    bits : int
        T.
    scope : str
        ``"feature"``: fitted values of its own for every feature; ``"channel"``: for every channel, the first
        dimension of a sample (a feature, where a sample has one dimension); ``"global"``: the same for all.
    input_shape : sequence of int, optional
        Shape of a sample; ``"channel"`` needs it.

    Raises
    ------
    ConfigError
        If the scope is unknown, or it is ``"channel"`` and the shape unknown or of another size.
    """

    def __init__(
        self, input_size: int, bits: int, scope: Scope = "feature", input_shape: Sequence[int] | None = None
    ) -> None:
        super().__init__(input_size, bits)
        if scope not in ("feature", "channel", "global"):
            raise ConfigError(f"scope={scope}: must be one of feature, channel, global.")
        if input_shape is not None and math.prod(input_shape) != input_size:
            raise ConfigError(f"input_shape={tuple(input_shape)}: has not input_size={input_size} values.")
        self.scope = scope
        if scope == "channel":
            if not input_shape:
                raise ConfigError("scope=channel: needs input_shape, the shape of a sample, such as (3, 32, 32).")
            self.rows = input_shape[0]
        else:
            self.rows = input_size if scope == "feature" else 1
        self._fitted = False
        self.register_load_state_dict_post_hook(_note_loaded)

    def fit_rows(self, rows: Tensor) -> None:
        """Fill the buffers.

        Parameters
        ----------
        rows : Tensor
            The training data, finite: the values of each feature, channel or of all, ``(R, S * F / R)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply fit_rows(rows)")

    def encode(self, x: Tensor, bits: Tensor) -> Tensor:
        """Write the bits.

        Parameters
        ----------
        x : Tensor
            Features, feature-major, ``(R, F / R, 1, B)``, contiguous.
        bits : Tensor
            To be filled with zeros and ones, ``(R, F / R, T, B)``, contiguous, of a floating type.

        Returns
        -------
        Tensor
            ``bits``, or a tensor like it that carries gradients.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply encode(x, bits)")

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Fit to the training data.

        Parameters
        ----------
        x : Tensor
            ``(S, *shape)``.

        Raises
        ------
        DataError
            If there are no samples, or a value is NaN or infinite.
        """
        flat = self._flat(x)
        if len(flat) == 0:
            raise DataError(f"{type(self).__name__}: there is no training data to fit to.")
        if flat.is_floating_point() and not torch.isfinite(flat).all():
            feature = int((~torch.isfinite(flat)).any(dim=0).nonzero()[0])
            raise DataError(
                f"{type(self).__name__}: the training data has NaN or infinite values, the first in feature {feature}."
            )
        # a view, unless the scope is channel and there are several
        self.fit_rows(flat.reshape(len(flat), self.rows, -1).transpose(0, 1).reshape(self.rows, -1))
        self._fitted = True

    def forward(self, x: Tensor) -> Tensor:
        """Bits ``(B, F * T)`` of features ``(B, *shape)``, a transposed view, in x's floating dtype.

        NaN gives the bits of the least value.

        Raises
        ------
        RuntimeError
            If nothing was fitted or loaded.
        """
        if not self._fitted:
            raise RuntimeError(
                f"{type(self).__name__} has no thresholds yet: call fit(x) on the training data, or load a state_dict."
            )
        flat = self._flat(x.detach())
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        shape = (self.rows, self.input_size // self.rows)
        # the batch is contiguous from here on
        columns = flat.t().contiguous().view(*shape, 1, len(flat))
        bits = torch.empty(*shape, self.bits_per_feature, len(flat), dtype=dtype, device=x.device)
        return self.encode(columns, bits).view(self.output_size, len(flat)).t()

    def extra_repr(self) -> str:
        state = "" if self._fitted else ", not fitted"
        return f"input_size={self.input_size}, bits={self.bits_per_feature}, scope={self.scope}{state}"


class ThresholdEncoder(FittedEncoder):
    """An encoder that compares every feature with thresholds: a bit is 1 where x > threshold.

    A subclass supplies ``find_thresholds``.

    Parameters
    ----------
    input_size : int
        F.
    bits : int
        T, thresholds per feature.
    scope, input_shape
        As of ``FittedEncoder``.

    Attributes
    ----------
    thresholds : Tensor
        ``(R, T)``, ascending; a buffer, NaN until fitted or loaded.
    """

    thresholds: Tensor

    def __init__(
        self,
        input_size: int,
        bits: PositiveInt = 3,
        scope: Scope = "feature",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(input_size, bits, scope, input_shape)
        self.register_buffer("thresholds", torch.full((self.rows, bits), torch.nan))

    def find_thresholds(self, columns: Tensor) -> Tensor:
        """Thresholds of the values of each row.

        Parameters
        ----------
        columns : Tensor
            The values of each feature, channel or of all, ``(R, S * F / R)``.

        Returns
        -------
        Tensor
            ``(R, T)``, ascending.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply find_thresholds(columns)")

    def fit_rows(self, rows: Tensor) -> None:
        self.thresholds.copy_(self.find_thresholds(rows))

    def encode(self, x: Tensor, bits: Tensor) -> Tensor:
        return torch.gt(x, self.thresholds[:, None, :, None], out=bits)


def _note_loaded(encoder: FittedEncoder, incompatible_keys: Any) -> None:
    del incompatible_keys
    encoder._fitted = not any(bool(torch.isnan(buffer).any()) for buffer in encoder.buffers())
