"""The check of regularisers.

Shape letters: N nodes, M values of a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from difflut_lab import schema
from difflut_lab.nodes import LUTNodes
from difflut_lab.nodes.regularizers import Regularizer
from difflut_lab.registry import REGISTRY
from difflut_lab.testing import modules
from difflut_lab.testing.subject import Subject, normal, shape_of

NUM_NODES = 8
# small, usual and large values: a penalty may begin at some size only
SIZES = (0.1, 1.0, 10.0)


def check_regularizer(part: str | type[Regularizer], *, n: int = 3, **options: Any) -> None:
    """Check a regulariser: a penalty that is a number, falls along its gradient, and suits all nodes that take it.

    Parameters
    ----------
    part : str or type
        The registered name, or a subclass of ``Regularizer``.
    n : int
        It is called with values ``(N, 2^n)``; one that does not need tables with other numbers of values, too.
    **options
        Options of the regulariser.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused.
    """
    subject = Subject.of("regularizer", part, {}, options)
    subject.check_unknown_option()
    regularizer = subject.build()
    subject.require(
        isinstance(regularizer, Regularizer), "must be a subclass of difflut_lab.nodes.regularizers.Regularizer."
    )
    subject.require(
        "weight" in subject.options, "has no option weight. Let it be a dataclass, as the base class is, which adds it."
    )
    widths = [2**n] if regularizer.needs_table else [2**n, 1, 2**n - 1]
    for width in widths:
        tried = [size * normal(NUM_NODES, width, seed=1) for size in SIZES]
        reached = [_check_penalty(subject, regularizer, values) for values in tried]
        subject.require(
            any(reached),
            f"its gradient is 0 for normal values of the standard deviations {', '.join(map(str, SIZES))}: it would "
            "change nothing. Compute with operations that have a gradient, without detach.",
        )
        _check_penalty(subject, regularizer, torch.zeros(NUM_NODES, width))
        _check_penalty(subject, regularizer, normal(NUM_NODES, width, seed=1).double())
        _check_mean(subject, regularizer, tried[1])
    for device in modules.devices():
        _check_penalty(subject, regularizer, normal(NUM_NODES, 2**n, seed=1).to(device))
    for name, bank in _banks(regularizer):
        _check_bank(subject, regularizer, name, bank)


def _penalty(subject: Subject, regularizer: Regularizer, values: Tensor) -> Tensor:
    return modules.run(subject, f"calling it with values {shape_of(values)}", regularizer, values)


def _check_penalty(subject: Subject, regularizer: Regularizer, values: Tensor) -> bool:
    """The penalty of values; returns whether it has a gradient other than zero."""
    values = values.clone().requires_grad_()
    penalty = _penalty(subject, regularizer, values)
    subject.require(
        penalty.dim() == 0 and bool(torch.isfinite(penalty)) and bool(penalty >= 0),
        f"of values {shape_of(values)} it must be one finite number that is at least 0, a tensor of shape (); it is "
        f"{penalty.flatten()[:3].tolist()} of shape {shape_of(penalty)}.",
    )
    subject.require(
        penalty.dtype == values.dtype and penalty.device == values.device,
        f"of values of {values.dtype} on {values.device} it is of {penalty.dtype} on {penalty.device}. Make tensors "
        "with the dtype and device of the values.",
    )
    subject.require(
        torch.equal(penalty, _penalty(subject, regularizer, values)),
        "two calls with the same values give different penalties. It may depend on the values only.",
    )
    subject.require(
        penalty.requires_grad,
        "it has no gradient for the values: it would change nothing. Compute with operations that have a gradient, "
        "without detach.",
    )
    with subject.doing("its backward"):
        (gradient,) = torch.autograd.grad(penalty, values, allow_unused=True)
    largest = float(values.detach().abs().max())
    subject.require(
        gradient is not None and bool(torch.isfinite(gradient).all()),
        f"its gradient for values of magnitudes up to {largest:.3g} is none, or not finite. Roots have none at 0.",
    )
    if not gradient.any():
        return False
    step = 1e-3 * largest / gradient.abs().max()
    lower = _penalty(subject, regularizer, values.detach() - step * gradient)
    subject.require(
        lower < penalty.detach() or largest == 0,
        f"a small step against its gradient does not lower it: from {float(penalty.detach()):.6g} it went to "
        f"{float(lower):.6g}. Its gradient must be that of the penalty.",
    )
    return True


def _check_mean(subject: Subject, regularizer: Regularizer, values: Tensor) -> None:
    once, twice = (_penalty(subject, regularizer, rows).detach() for rows in (values, torch.cat([values, values])))
    subject.require(
        torch.allclose(once, twice, rtol=1e-4),
        f"of twice as many nodes of the same values it is {float(twice / once):.3g} times as large. Take the mean over "
        "nodes, so that a weight means the same in layers of every size.",
    )


def _banks(regularizer: Regularizer) -> Iterator[tuple[str, LUTNodes]]:
    """Banks of all registered nodes that take the regulariser."""
    for name in REGISTRY.names("node"):
        declared = schema.options(REGISTRY.get("node", name), REGISTRY.provided("node"))
        if "regularizer" not in declared or any(option.default is option.empty for option in declared.values()):
            continue
        bank: LUTNodes = REGISTRY.get("node", name)(num_nodes=NUM_NODES, seed=42)
        if not regularizer.needs_table or type(bank).real_table is not LUTNodes.real_table:
            yield name, bank


def _check_bank(subject: Subject, regularizer: Regularizer, name: str, bank: LUTNodes) -> None:
    """In a bank it is multiplied by its weight and reaches the parameters."""
    bank.regularizer = regularizer
    reached = False
    for size in SIZES:
        with torch.no_grad():
            for seed, parameter in enumerate(bank.parameters()):
                parameter.copy_(size * normal(*parameter.shape, seed=seed))
        with subject.doing(f"the regularization() of {name} nodes"):
            penalty = bank.regularization()
            gradients = torch.autograd.grad(penalty, list(bank.parameters()), allow_unused=True)
            values = bank.real_table() if regularizer.needs_table else bank.regularized()
        subject.require(
            bool(torch.isfinite(penalty)) and all(bool(g.isfinite().all()) for g in gradients if g is not None),
            f"the regularization() of {name} nodes, or its gradient, is not finite.",
        )
        wanted = regularizer.weight * _penalty(subject, subject.build(weight=0.0), values).detach()
        subject.require(
            torch.allclose(penalty.detach(), wanted, rtol=1e-4),
            f"the regularization() of {name} nodes is {float(penalty.detach()):.4g}, not the weight "
            f"{regularizer.weight} times the penalty, {float(wanted):.4g}. Leave the weight to the bank: a regulariser "
            "does not multiply by it.",
        )
        reached |= any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    subject.require(
        reached or regularizer.weight == 0, f"its gradient reaches no parameter of {name} nodes, which take it."
    )
