"""The check of initialisers of tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difflut_lab.seeding import generator
from difflut_lab.testing.subject import Subject, shape_of


def check_initializer(part: str | Callable[..., Any], *, num_nodes: int = 8, n: int = 3, **options: Any) -> None:
    """Check an initialiser: finite weights of the shape that is asked for, from the given generator only.

    Parameters
    ----------
    part : str or callable
        The registered name, or a class.
    num_nodes, n : int
        The weights that it is asked for are ``(num_nodes, 2^n)``.
    **options
        Options of the initialiser.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused.
    """
    subject = Subject.of("initializer", part, {}, options)
    subject.check_unknown_option()
    initialize = subject.build()
    shape = (num_nodes, 2**n)
    drawn = []
    for _ in range(2):
        with subject.doing("calling it with a shape and a generator"):
            drawn.append(initialize(shape, generator(42, "weight")))
    weights = drawn[0]
    subject.require(
        isinstance(weights, Tensor) and tuple(weights.shape) == shape,
        f"asked for weights of shape {shape} it gave {shape_of(weights)}.",
    )
    subject.require(
        weights.dtype == torch.get_default_dtype(), f"its weights are {weights.dtype}, not torch's default dtype."
    )
    subject.require(bool(torch.isfinite(weights).all()), "its weights are not all finite.")
    subject.require(
        torch.equal(*drawn), "asked twice with generators of one seed, it gave different weights. Draw from generator."
    )
