"""Layers of LUT nodes: a wiring, a bank of nodes, and augmentation while training."""

from difflut_lab.layers.base import BaseLUTLayer
from difflut_lab.layers.feature_wise_groups import FeatureWiseGroups
from difflut_lab.layers.layer_config import LayerConfig
from difflut_lab.layers.learnable_routing import LearnableRouting
from difflut_lab.layers.modes import freeze, soft
from difflut_lab.layers.random_routing import RandomRouting

__all__ = [
    "BaseLUTLayer",
    "FeatureWiseGroups",
    "LayerConfig",
    "LearnableRouting",
    "RandomRouting",
    "freeze",
    "soft",
]
