"""Heads: output bits to class scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difflut_lab import schema
from difflut_lab.heads.group_sum import GroupSum
from difflut_lab.heads.linear import Linear
from difflut_lab.registry import REGISTRY

__all__ = ["GroupSum", "Linear", "build_head"]


def build_head(spec: str | Mapping[str, Any], input_size: int, num_classes: int, seed: int) -> Any:
    """Build a head.

    Parameters
    ----------
    spec : str or mapping
        The name, or a mapping of ``name`` and options.
    input_size : int
        N, the outputs of the last layer.
    num_classes : int
        C.
    seed : int
        For heads that draw initial values; one whose constructor has no ``seed`` is not told.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    provided = {"input_size": input_size, "num_classes": num_classes}
    if "seed" in schema.options(REGISTRY.get("head", options["name"])):
        provided["seed"] = seed
    return REGISTRY.build("head", options, **provided)
