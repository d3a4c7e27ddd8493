"""Layers of LUT nodes: a wiring, a bank of nodes, and augmentation while training."""

from difflut_lab.layers.base import BaseLUTLayer
from difflut_lab.layers.conv_lut import ConvLUT
from difflut_lab.layers.feature_wise_groups import FeatureWiseGroups
from difflut_lab.layers.layer_config import LayerConfig
from difflut_lab.layers.learnable_routing import LearnableRouting
from difflut_lab.layers.modes import freeze, has_relaxation, soft
from difflut_lab.layers.or_pool import OrPool
from difflut_lab.layers.random_routing import RandomRouting
from difflut_lab.layers.shortcut import Shortcut

__all__ = [
    "BaseLUTLayer",
    "ConvLUT",
    "FeatureWiseGroups",
    "LayerConfig",
    "LearnableRouting",
    "OrPool",
    "RandomRouting",
    "Shortcut",
    "freeze",
    "has_relaxation",
    "soft",
]
