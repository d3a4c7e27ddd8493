"""difflut_lab: a config-driven experiment framework for networks of lookup tables and ternary networks."""

from difflut_lab.registry import (
    REGISTRY,
    register_augmentation,
    register_data,
    register_encoder,
    register_head,
    register_initializer,
    register_layer,
    register_model,
    register_node,
    register_quantizer,
    register_regularizer,
    register_schedule,
    register_ternary,
)

__version__ = "0.1.0"

__all__ = [
    "REGISTRY",
    "register_augmentation",
    "register_data",
    "register_encoder",
    "register_head",
    "register_initializer",
    "register_layer",
    "register_model",
    "register_node",
    "register_quantizer",
    "register_regularizer",
    "register_schedule",
    "register_ternary",
]
