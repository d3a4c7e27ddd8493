"""Quantizers: float weights to codes in {-1, 0, +1} and their scales."""

from difflut_lab.ternary.quantizers.absmean import AbsMean
from difflut_lab.ternary.quantizers.base import Quantizer, Ternary, build_quantizer
from difflut_lab.ternary.quantizers.fixed import Fixed
from difflut_lab.ternary.quantizers.lsq import LearnedStep
from difflut_lab.ternary.quantizers.none import NoQuantizer
from difflut_lab.ternary.quantizers.stochastic import Stochastic
from difflut_lab.ternary.quantizers.ttq import TrainedTernary
from difflut_lab.ternary.quantizers.twn import TernaryWeightNetworks

__all__ = [
    "AbsMean",
    "Fixed",
    "LearnedStep",
    "NoQuantizer",
    "Quantizer",
    "Stochastic",
    "Ternary",
    "TernaryWeightNetworks",
    "TrainedTernary",
    "build_quantizer",
]
