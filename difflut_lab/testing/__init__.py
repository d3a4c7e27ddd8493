"""Checks for parts of your own, the same that the built-in parts must pass.

Each is a plain function for a registered name or a class, and raises an ``AssertionError`` that says which contract is
broken and how to mend it::

    from difflut_lab.testing import check_layer

    def test_my_layer():
        check_layer("my_layer", span=8)
"""

from difflut_lab.testing.augmentations import check_augmentation
from difflut_lab.testing.encoders import check_encoder
from difflut_lab.testing.heads import check_head
from difflut_lab.testing.initializers import check_initializer
from difflut_lab.testing.layers import check_layer
from difflut_lab.testing.models import check_model
from difflut_lab.testing.nodes import check_node
from difflut_lab.testing.quantizers import check_quantizer
from difflut_lab.testing.regularizers import check_regularizer
from difflut_lab.testing.ternary import check_ternary_layer

__all__ = [
    "check_augmentation",
    "check_encoder",
    "check_head",
    "check_initializer",
    "check_layer",
    "check_model",
    "check_node",
    "check_quantizer",
    "check_regularizer",
    "check_ternary_layer",
]
