"""LUT nodes: the parametrisation of small lookup tables and the gradients that train them, one kind per file."""

from difflut_lab.nodes.base import FanIn, LUTNodes, NodeView, TableNodes
from difflut_lab.nodes.dwn import DWNNodes
from difflut_lab.nodes.probabilistic import ProbabilisticNodes

__all__ = ["DWNNodes", "FanIn", "LUTNodes", "NodeView", "ProbabilisticNodes", "TableNodes"]
