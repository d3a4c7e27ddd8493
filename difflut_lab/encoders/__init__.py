"""Encoders: features to bits, by thresholds fitted on the training data."""

from difflut_lab.encoders.base import Encoder, ThresholdEncoder
from difflut_lab.encoders.distributive_thermometer import DistributiveThermometer
from difflut_lab.encoders.thermometer import Thermometer

__all__ = ["DistributiveThermometer", "Encoder", "Thermometer", "ThresholdEncoder"]
