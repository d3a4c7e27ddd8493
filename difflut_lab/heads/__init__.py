"""Heads: output bits to class scores."""

from difflut_lab.heads.group_sum import GroupSum

__all__ = ["GroupSum"]
