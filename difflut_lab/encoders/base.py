"""What encoders have in common.

Shape letters: S training samples, B batch, F features, T thresholds (bits) per feature.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from difflut_lab.errors import ConfigError, DataError
from difflut_lab.schema import PositiveInt

Scope = Literal["feature", "global"]


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


class ThresholdEncoder(Encoder):
    """An encoder that compares every feature with thresholds: a bit is 1 where x > threshold.

    A subclass supplies ``find_thresholds``.

    Parameters
    ----------
    input_size : int
        F.
    bits : int
        T, thresholds per feature.
    scope : str
        ``"feature"``: thresholds of its own for every feature; ``"global"``: the same for all.

    Attributes
    ----------
    thresholds : Tensor
        ``(F, T)``, or ``(1, T)`` where they are the same for all; a buffer, NaN until fitted or loaded.
    """

    thresholds: Tensor

    def __init__(self, input_size: int, bits: PositiveInt = 3, scope: Scope = "feature") -> None:
        super().__init__(input_size, bits)
        if scope not in ("feature", "global"):
            raise ConfigError(f"scope={scope}: must be one of feature, global.")
        self.scope = scope
        rows = input_size if scope == "feature" else 1
        self.register_buffer("thresholds", torch.full((rows, bits), torch.nan))
        self._fitted = False
        self.register_load_state_dict_post_hook(_note_loaded)

    def find_thresholds(self, columns: Tensor) -> Tensor:
        """Thresholds of the values of each feature.

        Parameters
        ----------
        columns : Tensor
            Values, feature by feature, ``(F, S)``; all of them as one row ``(1, S * F)`` where the scope is global.

        Returns
        -------
        Tensor
            ``(F, T)``, ascending.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply find_thresholds(columns)")

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Fit the thresholds to the training data.

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
        columns = flat.t() if self.scope == "feature" else flat.reshape(1, -1)
        self.thresholds.copy_(self.find_thresholds(columns))
        self._fitted = True

    def forward(self, x: Tensor) -> Tensor:
        """Bits ``(B, F * T)`` of features ``(B, *shape)``, a transposed view, in x's floating dtype.

        Raises
        ------
        RuntimeError
            If the thresholds were neither fitted nor loaded.
        """
        if not self._fitted:
            raise RuntimeError(
                f"{type(self).__name__} has no thresholds yet: call fit(x) on the training data, or load a state_dict."
            )
        flat = self._flat(x.detach())
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        # the batch is contiguous from here on
        columns = flat.t().contiguous().unsqueeze(1)
        bits = torch.empty(self.input_size, self.bits_per_feature, len(flat), dtype=dtype, device=x.device)
        torch.gt(columns, self.thresholds.unsqueeze(2), out=bits)
        return bits.view(self.output_size, len(flat)).t()

    def extra_repr(self) -> str:
        state = "" if self._fitted else ", not fitted"
        return f"input_size={self.input_size}, bits={self.bits_per_feature}, scope={self.scope}{state}"


def _note_loaded(encoder: ThresholdEncoder, incompatible_keys: Any) -> None:
    del incompatible_keys
    encoder._fitted = not bool(torch.isnan(encoder.thresholds).any())
