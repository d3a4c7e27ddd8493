"""How a layer behaves while it is trained, apart from what it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from difflut_lab import schema
from difflut_lab.schema import PositiveFloat, Probability


def _known_by_another_name(mode: Any) -> Any:
    return "batch" if mode == "batchwise" else mode


Stabilization = Annotated[Literal["none", "layerwise", "nodewise", "batch"], BeforeValidator(_known_by_another_name)]


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Augmentation of one layer; acts in training mode only, and may be swapped on a trained layer.

    Raises
    ------
    ConfigError
        If a field is out of range; names the field, its value and what is allowed.
    """

    flip_probability: Probability = 0.0
    # every routed copy of an input becomes 1 - x with this probability

    grad_stabilization: Stabilization = "none"
    # standardise the gradient of the layer's output: over all of it (layerwise), per node over the batch (nodewise),
    # or per sample over the nodes (batch, also called batchwise)

    grad_target_std: PositiveFloat = 1.0
    # the standard deviation that stabilised gradients have

    grad_subtract_mean: bool = False
    # take the mean away as well

    grad_epsilon: PositiveFloat = 1e-8
    # added to the standard deviation; gradients that spread less than this are left alone

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in schema.validate(LayerConfig, given, "layer_config").items():
            object.__setattr__(self, name, value)
