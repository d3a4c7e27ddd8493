"""Whole architectures, assembled from registered parts."""

from difflut_lab.models.base import Model
from difflut_lab.models.lut_conv import LUTConv
from difflut_lab.models.lut_mlp import LUTMLP

__all__ = ["LUTMLP", "LUTConv", "Model"]
