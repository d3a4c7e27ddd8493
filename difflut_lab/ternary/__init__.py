"""Ternary networks: layers whose weights are codes in {-1, 0, +1} times a scale, and the quantizers that make them."""

from difflut_lab.ternary.activation import LearnableTernaryActivation, TernaryActivation, build_activation
from difflut_lab.ternary.attention import TernaryAttention
from difflut_lab.ternary.base import Augmented, TernaryLayer
from difflut_lab.ternary.conv import TernaryConv2d, TernaryDepthwiseSeparable
from difflut_lab.ternary.functional import quantize
from difflut_lab.ternary.fuse import FusedTernaryConvBN, fold
from difflut_lab.ternary.linear import TernaryLinear
from difflut_lab.ternary.norm import TernaryBatchNorm
from difflut_lab.ternary.packed.file import load_packed, save_packed
from difflut_lab.ternary.packed.layers import PackedConv2d, PackedLinear, PackError
from difflut_lab.ternary.packing import pack
from difflut_lab.ternary.quantizers import Quantizer, Ternary, build_quantizer
from difflut_lab.ternary.recurrent import TernaryLSTM, TernaryLSTMCell
from difflut_lab.ternary.residual import TernaryBottleneck, TernaryResidualBlock

__all__ = [
    "Augmented",
    "FusedTernaryConvBN",
    "LearnableTernaryActivation",
    "PackError",
    "PackedConv2d",
    "PackedLinear",
    "Quantizer",
    "Ternary",
    "TernaryActivation",
    "TernaryAttention",
    "TernaryBatchNorm",
    "TernaryBottleneck",
    "TernaryConv2d",
    "TernaryDepthwiseSeparable",
    "TernaryLSTM",
    "TernaryLSTMCell",
    "TernaryLayer",
    "TernaryLinear",
    "TernaryResidualBlock",
    "build_activation",
    "build_quantizer",
    "fold",
    "load_packed",
    "pack",
    "quantize",
    "save_packed",
]
