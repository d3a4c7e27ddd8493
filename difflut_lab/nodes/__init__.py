"""LUT nodes: the parametrisation of small lookup tables and the gradients that train them, one kind per file."""

from difflut_lab.nodes.base import FanIn, LUTNodes, NodeView, TableNodes
from difflut_lab.nodes.difflogic import DiffLogicNodes
from difflut_lab.nodes.dwn import DWNNodes
from difflut_lab.nodes.dwn_stable import DWNStableNodes
from difflut_lab.nodes.fourier import FourierNodes
from difflut_lab.nodes.hybrid import HybridNodes
from difflut_lab.nodes.linear_lut import LinearLUTNodes
from difflut_lab.nodes.neurallut import NeuralLUTNodes
from difflut_lab.nodes.polylut import PolyLUTNodes
from difflut_lab.nodes.probabilistic import ProbabilisticNodes
from difflut_lab.nodes.warp import WARPNodes

__all__ = [
    "DWNNodes",
    "DWNStableNodes",
    "DiffLogicNodes",
    "FanIn",
    "FourierNodes",
    "HybridNodes",
    "LUTNodes",
    "LinearLUTNodes",
    "NeuralLUTNodes",
    "NodeView",
    "PolyLUTNodes",
    "ProbabilisticNodes",
    "TableNodes",
    "WARPNodes",
]
