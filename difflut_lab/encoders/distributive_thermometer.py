"""Thermometer code whose thresholds cut the training values into equally many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from difflut_lab.encoders.base import Scope, ThresholdEncoder
from difflut_lab.registry import register_encoder
from difflut_lab.schema import PositiveInt

# features copied at once, so that the copy stays small beside the data
_CHUNK = 64


@register_encoder("distributive_thermometer")
class DistributiveThermometer(ThresholdEncoder):
    """Thresholds at quantiles: of S sorted training values, those at index floor(S * i / (T + 1)), i = 1..T.

    Parameters
    ----------
    input_size : int
        F, the features of a sample.
    bits : int
        T, thresholds per feature.
    scope : str
        ``"feature"``, ``"channel"`` or ``"global"``: what has thresholds of its own.
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
        super().__init__(input_size, bits, scope, input_shape)

    def find_thresholds(self, columns: Tensor) -> Tensor:
        return quantiles(columns, self.bits_per_feature)


def quantiles(rows: Tensor, count: int) -> Tensor:
    """Values that cut each row into count + 1 parts of equally many.

    Parameters
    ----------
    rows : Tensor
        ``(R, S)``.
    count : int
        T.

    Returns
    -------
    Tensor
        Of S sorted values of a row, those at index floor(S * i / (T + 1)), i = 1..T: ``(R, T)``, float32, on the CPU.
    """
    samples = rows.shape[1]
    places = np.array([samples * i // (count + 1) for i in range(1, count + 1)])
    chunks = []
    for chunk in rows.split(_CHUNK):
        values = chunk.to(device="cpu", dtype=torch.float32).contiguous().numpy()
        # selection, not sorting: several times as fast on 54,000 samples
        chunks.append(np.partition(values, np.unique(places), axis=1)[:, places])
    return torch.from_numpy(np.concatenate(chunks))
