"""Encoders: features to bits, by what was fitted to the training data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from difflut_lab import schema
from difflut_lab.encoders.base import Encoder, FittedEncoder, ThresholdEncoder
from difflut_lab.encoders.binary import Binary
from difflut_lab.encoders.distributive_thermometer import DistributiveThermometer
from difflut_lab.encoders.gaussian_thermometer import GaussianThermometer
from difflut_lab.encoders.gray import Gray
from difflut_lab.encoders.learnable_thermometer import LearnableThermometer
from difflut_lab.encoders.levels import LevelEncoder
from difflut_lab.encoders.logarithmic import Logarithmic
from difflut_lab.encoders.onehot import OneHot
from difflut_lab.encoders.sign_magnitude import SignMagnitude
from difflut_lab.encoders.thermometer import Thermometer
from difflut_lab.registry import REGISTRY

__all__ = [
    "Binary",
    "DistributiveThermometer",
    "Encoder",
    "FittedEncoder",
    "GaussianThermometer",
    "Gray",
    "LearnableThermometer",
    "LevelEncoder",
    "Logarithmic",
    "OneHot",
    "SignMagnitude",
    "Thermometer",
    "ThresholdEncoder",
    "build_encoder",
]


def build_encoder(spec: str | Mapping[str, Any], input_shape: Sequence[int]) -> Any:
    """Build an encoder for samples of a shape.

    Parameters
    ----------
    spec : str or mapping
        The name, or a mapping of ``name`` and options.
    input_shape : sequence of int
        Shape of a sample; an encoder whose constructor has no ``input_shape`` is told ``input_size`` only.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    provided: dict[str, Any] = {"input_size": math.prod(input_shape)}
    if "input_shape" in schema.options(REGISTRY.get("encoder", options["name"])):
        provided["input_shape"] = tuple(input_shape)
    return REGISTRY.build("encoder", options, **provided)
