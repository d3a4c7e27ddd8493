"""Which backend computes an op.

A backend of an op is a module beside its public function, with the functions ``forward`` and ``backward``.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def backend(op: str) -> ModuleType:
    """The module that computes an op, such as ``"interpolate"``."""
    return importlib.import_module(f"difflut_lab.ops.{op}.reference")
