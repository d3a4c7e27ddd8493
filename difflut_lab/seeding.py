"""Seeds for every purpose, derived from one, so that no two random things share a stream."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, such as ``derive_seed(42, "layer", 0, "wiring")``.

    It is a SHA-256 of the arguments, so that it is the same on every machine and release, and seeds of neighbouring
    runs or layers have nothing in common.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator for one purpose; the global random state is not touched."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
