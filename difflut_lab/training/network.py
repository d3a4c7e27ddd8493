"""A model together with the normalisation of its input: raw features in, class scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.models import Model
from difflut_lab.registry import REGISTRY, did_you_mean


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

    Attributes
    ----------
    scheduled : dict
        The values that ``set_scheduled`` has set, by key.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, mean: Sequence[float], std: Sequence[float], class_names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.class_names = list(class_names)
        self.scheduled: dict[str, float] = {}
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def normalise(self, x: Tensor) -> Tensor:
        """``(x - mean) / std`` of raw features ``(B, *input_shape)``, float32."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x.to(torch.float32) - self.mean.view(shape)) / self.std.view(shape)

    def calibrate(self, x: Tensor) -> None:
        """Fit what the model fits on data, from raw features of the training split ``(S, *input_shape)``."""
        self.model.calibrate(self.normalise(x))

    def parts_with(self, key: str) -> list[nn.Module]:
        """The parts that have a value which may change over the epochs.

        A registered part names such values in its class attribute ``SCHEDULABLE``.

        Parameters
        ----------
        key : str
            Kind of the parts and name of the value, such as ``"head.tau"``.

        Raises
        ------
        ConfigError
            If there are none; the message lists the keys that there are.
        """
        kinds = {REGISTRY.get(kind, name): kind for kind in REGISTRY.kinds() for name in REGISTRY.names(kind)}
        parts: dict[str, list[nn.Module]] = {}
        for module in self.modules():
            for name in getattr(module, "SCHEDULABLE", ()) if type(module) in kinds else ():
                parts.setdefault(f"{kinds[type(module)]}.{name}", []).append(module)
        if key not in parts:
            raise ConfigError(
                f"Unknown key 'schedules.{key}': no part of this network has such a value to schedule."
                f"{did_you_mean(key, parts, 'schedules.')} It has: {', '.join(sorted(parts)) or 'none'}."
            )
        return parts[key]

    def set_scheduled(self, values: Mapping[str, float]) -> None:
        """Set values that change over the epochs, such as ``{"head.tau": 3.0}``, in every part that has them.

        Raises
        ------
        ConfigError
            If no part has such a value.
        """
        for key, value in values.items():
            for part in self.parts_with(key):
                setattr(part, key.partition(".")[2], float(value))
            self.scheduled[key] = float(value)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, C)`` of raw features ``(B, *input_shape)``."""
        scores: Tensor = self.model(self.normalise(x))
        return scores

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Class indices ``(B,)`` of raw features ``(B, *input_shape)``; equal scores go to the lowest class."""
        return self(x).argmax(dim=1)
