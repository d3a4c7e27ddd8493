"""Whole architectures, assembled from registered parts."""

from difflut_lab.models.base import Model
from difflut_lab.models.lut_conv import LUTConv
from difflut_lab.models.lut_mlp import LUTMLP
from difflut_lab.models.ternary_lstm import TernaryLSTMClassifier
from difflut_lab.models.ternary_mlp import TernaryMLP
from difflut_lab.models.ternary_resnet import TernaryResNet
from difflut_lab.models.ternary_vit import TernaryViT

__all__ = ["LUTMLP", "LUTConv", "Model", "TernaryLSTMClassifier", "TernaryMLP", "TernaryResNet", "TernaryViT"]
