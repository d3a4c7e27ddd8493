"""The check of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from difflut_lab.testing import modules
from difflut_lab.testing.subject import Subject, bits, shape_of

BATCH = 64


def check_head(part: str | type[nn.Module], *, input_size: int = 60, num_classes: int = 10, **options: Any) -> None:
    """Check a head: class scores of bits, with gradients for the bits, the same after a checkpoint.

    Parameters
    ----------
    part : str or type
        The registered name, or a class.
    input_size, num_classes : int
        N, the bits that it is given, and C.
    **options
        Options of the head.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused.
    """
    subject = Subject.of("head", part, {"input_size": input_size, "num_classes": num_classes}, options)
    other = {}
    if subject.asks_for("seed"):
        subject, other = subject.providing(seed=42), {"seed": 43}
    subject.check_unknown_option()
    head = subject.build()
    subject.require(isinstance(head, nn.Module), "must be a torch.nn.Module.")
    x = bits(BATCH, input_size)
    y = modules.train(subject, head, x)
    subject.require(
        tuple(y.shape) == (BATCH, num_classes),
        f"of bits ({BATCH}, {input_size}) its scores have shape {shape_of(y)}; they must be ({BATCH}, {num_classes}).",
    )
    subject.require(
        bool((y != y[:1]).any(dim=0).all()), "the score of a class is the same whatever the bits. Give each class bits."
    )
    modules.check_registered_tensors(subject, head)
    modules.check_schedulable(subject, head)
    evaluated = modules.check_evaluates(subject, head, x)
    subject.require(bool(torch.isfinite(evaluated).all()), "its scores in eval mode are not finite.")
    modules.check_repeats(subject, subject.build, x)
    modules.check_round_trip(subject, head.eval(), subject.build(**other).eval(), x, {"in eval mode": modules.call})
    modules.check_moves(subject, head, x)
