"""The arithmetic that must be fast.

Soft and hard table lookup, learnable routing, bit flips and gradient tables, and products with packed ternary weights.
"""

from difflut_lab.ops.dispatch import chosen_kernels, use_kernels
from difflut_lab.ops.efd import efd_table
from difflut_lab.ops.flips import Flips, flip_mask
from difflut_lab.ops.interpolate import interpolate
from difflut_lab.ops.lookup import lookup
from difflut_lab.ops.route import route
from difflut_lab.ops.ternary_linear import explain
from difflut_lab.ops.wiring import Wiring

__all__ = [
    "Flips",
    "Wiring",
    "chosen_kernels",
    "efd_table",
    "explain",
    "flip_mask",
    "interpolate",
    "lookup",
    "route",
    "use_kernels",
]
