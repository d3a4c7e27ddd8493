"""Whole architectures, assembled from registered parts."""

from difflut_lab.models.base import Model
from difflut_lab.models.lut_conv import LUTConv
from difflut_lab.models.lut_mlp import LUTMLP
from difflut_lab.models.ternary_mlp import TernaryMLP
from difflut_lab.models.ternary_resnet import TernaryResNet

__all__ = ["LUTMLP", "LUTConv", "Model", "TernaryMLP", "TernaryResNet"]
