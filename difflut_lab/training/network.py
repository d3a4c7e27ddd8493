"""A model together with the normalisation of its input: raw features in, class scores out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from difflut_lab.models import Model


class Network(nn.Module):
    """Normalises raw features as the training data was, then applies the model.

    Parameters
    ----------
    model : Model
        The architecture.
    mean, std : sequence of float
        One value, or one per channel or feature (dimension 1 of the input); the model sees ``(x - mean) / std``.
    class_names : sequence of str
        Names of the classes, in the order of the scores.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, mean: Sequence[float], std: Sequence[float], class_names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.class_names = list(class_names)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def normalise(self, x: Tensor) -> Tensor:
        """``(x - mean) / std`` of raw features ``(B, *input_shape)``, float32."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x.to(torch.float32) - self.mean.view(shape)) / self.std.view(shape)

    def calibrate(self, x: Tensor) -> None:
        """Fit what the model fits on data, from raw features of the training split ``(S, *input_shape)``."""
        self.model.calibrate(self.normalise(x))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, C)`` of raw features ``(B, *input_shape)``."""
        scores: Tensor = self.model(self.normalise(x))
        return scores

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Class indices ``(B,)`` of raw features ``(B, *input_shape)``; equal scores go to the lowest class."""
        return self(x).argmax(dim=1)
