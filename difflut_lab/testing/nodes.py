"""The check of kinds of nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from difflut_lab.layers import soft
from difflut_lab.nodes import LUTNodes
from difflut_lab.ops import Flips, Wiring, flip_mask
from difflut_lab.testing import modules
from difflut_lab.testing.subject import Subject, bits, shape_of, uniform
from difflut_lab.testing.tables import every_address, look_up

BATCH = 64
# how far an output may lie from 0 or 1 to be as good as a bit: whatever the relaxation, its table must then agree
SURE = 0.01


def check_node(part: str | type[LUTNodes], *, num_nodes: int = 8, **options: Any) -> None:
    """Check a kind of nodes: a bank that trains, saves, repeats, and is its truth table in eval mode.

    Parameters
    ----------
    part : str or type
        The registered name, or a subclass of ``LUTNodes``.
    num_nodes : int
        N of the banks that are built.
    **options
        Options of the nodes, n (inputs per node) among them.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused.
    """
    subject = Subject.of("node", part, {"num_nodes": num_nodes, "seed": 42}, options)
    subject.check_unknown_option()
    bank = subject.build()
    subject.require(isinstance(bank, LUTNodes), "must be a subclass of difflut_lab.nodes.LUTNodes.")
    n = bank.n
    for name, parameter in bank.named_parameters():
        subject.require(
            parameter.dim() > 0 and parameter.shape[0] == num_nodes,
            f"the parameter '{name}' has shape {shape_of(parameter)}; every parameter leads with the number of nodes, "
            f"here {num_nodes}. What all nodes share and is not trained is a buffer.",
        )
    x = uniform(BATCH, num_nodes, n)
    y = modules.train(subject, bank, x)
    _check_outputs(subject, y, "in training mode", x)
    modules.check_registered_tensors(subject, bank)
    modules.check_schedulable(subject, bank)
    _check_regularization(subject, bank)
    check_truth_table(subject, bank)
    _check_relaxation(subject, bank)
    _check_views(subject, bank)
    _check_fused(subject, bank)
    modules.check_evaluates(subject, bank, x)
    modules.check_repeats(subject, subject.build, x)
    again = {"in training mode": modules.call}
    settled = {"in eval mode": modules.call, "evaluated softly": relaxed}
    bank.train()
    fresh = subject.build(seed=43)
    modules.check_round_trip(subject, bank.eval(), fresh.eval(), x, settled, " with another seed")
    modules.check_round_trip(subject, bank.train(), subject.build(), x, again)
    _check_frozen(subject, bank, x)
    modules.check_moves(subject, subject.build(), x)


def check_truth_table(subject: Subject, bank: LUTNodes) -> None:
    """In eval mode the bank must be its truth table, for every address and for values between bits."""
    with subject.doing("truth_table()"):
        table = bank.eval().truth_table()
    shape = (bank.num_nodes, 2**bank.n)
    subject.require(
        isinstance(table, Tensor) and table.dtype == torch.bool and tuple(table.shape) == shape,
        f"truth_table() must be bool of shape {shape}, one row per node, one entry per address; "
        f"it is {getattr(table, 'dtype', '')} of shape {shape_of(table)}.",
    )
    for routed, which in (
        (every_address(bank.num_nodes, bank.n), "bits"),
        (uniform(BATCH, bank.num_nodes, bank.n), "values between 0 and 1, which count as bits where they are >= 1/2"),
    ):
        y = modules.run(subject, "a forward in eval mode", bank, routed).detach()
        _check_outputs(subject, y, "in eval mode", routed)
        wanted = torch.from_numpy(look_up(table, routed))
        differing = (y != wanted).nonzero()
        if len(differing):
            sample, node = differing[0].tolist()
            subject.fail(
                f"in eval mode node {node} gives {float(y[sample, node]):.4g} for the inputs "
                f"{routed[sample, node].tolist()}, its truth table {int(wanted[sample, node])} ({which}; input k is "
                "bit k of the address, least significant first). Leave forward to LUTNodes, which looks up "
                "truth_table() in eval mode; supply relaxed(routed), and tabulate() where needed."
            )


def relaxed(module: Any, x: Tensor) -> Tensor:
    """A forward of the relaxation, in eval mode."""
    with soft(module):
        output: Tensor = module(x)
    return output


def _check_outputs(subject: Subject, y: Tensor, where: str, routed: Tensor) -> None:
    subject.require(
        tuple(y.shape) == tuple(routed.shape[:2]),
        f"{where} its outputs have shape {shape_of(y)}; of inputs (B, N, n) = {shape_of(routed)} they must be (B, N).",
    )
    lowest, highest = float(y.min()), float(y.max())
    subject.require(
        lowest >= -1e-5 and highest <= 1 + 1e-5,
        f"{where} its outputs reach from {lowest:.4g} to {highest:.4g}; the next layer takes values in [0, 1]. "
        "Finish with a sigmoid or a clamp.",
    )


def _check_relaxation(subject: Subject, bank: LUTNodes) -> None:
    """Where the relaxation is as good as a bit, the truth table must say the same."""
    routed = every_address(bank.num_nodes, bank.n)
    for factor in (1, 20):
        twin = _copy(subject, bank)
        with torch.no_grad():
            for parameter in twin.parameters():
                # steep functions are nearly bits
                parameter.mul_(factor)
        y = modules.run(subject, "a forward within difflut_lab.layers.soft", twin, routed, relaxed).detach()
        _check_outputs(subject, y, "evaluated softly", routed)
        table = torch.from_numpy(look_up(twin.eval().truth_table(), routed))
        wrong = ((y > 1 - SURE) & ~table) | ((y < SURE) & table)
        if wrong.any():
            sample, node = wrong.nonzero()[0].tolist()
            inputs = [int(value) for value in routed[sample, node]]
            subject.fail(
                f"its truth table disagrees with what was trained: for the inputs {inputs} the relaxation of node "
                f"{node} gives {float(y[sample, node]):.4g}, its truth table {int(table[sample, node])}. tabulate() "
                "must follow relaxed(); input k is bit k of the address, least significant first."
            )


def _check_regularization(subject: Subject, bank: LUTNodes) -> None:
    with subject.doing("regularization()"):
        penalty = bank.regularization()
    subject.require(
        penalty.dim() == 0 and bool(torch.isfinite(penalty)),
        f"regularization() must be one finite number, a tensor of shape (); it has shape {shape_of(penalty)}.",
    )
    if bank.regularizer is not None:
        with subject.doing("the backward of regularization()"):
            gradients = torch.autograd.grad(penalty, list(bank.parameters()), allow_unused=True)
        subject.require(
            any(gradient is not None and bool(gradient.any()) for gradient in gradients),
            "regularization() has no gradient for any parameter. Hand the regulariser what is trained: regularized().",
        )


def _check_views(subject: Subject, bank: LUTNodes) -> None:
    x = uniform(4, bank.num_nodes, bank.n)
    modes: list[tuple[str, Callable[[Any, Tensor], Tensor]]] = [
        ("evaluated softly", relaxed),
        ("in eval mode", modules.call),
    ]
    for where, forward in modes:
        whole = modules.run(subject, f"a forward {where}", bank.eval(), x, forward)
        with subject.doing(f"bank[j](x), one node {where}, which has one row of each parameter,"):
            bank.soft = forward is relaxed
            single = torch.cat([bank[node](x[:, node]) for node in range(len(bank))], dim=1)
            bank.soft = False
        subject.require(
            single.shape == whole.shape and torch.allclose(single, whole, atol=1e-5),
            f"bank[j](x) gives other outputs than node j of the bank {where}. A view of one node calls relaxed(routed) "
            "with parameters whose leading dimension is 1: take the number of nodes from shapes, not from "
            "self.num_nodes.",
        )


def _check_fused(subject: Subject, bank: LUTNodes) -> None:
    """The fused form, where the bank has one of its own, must be the routed form."""
    if not bank.train().can_fuse:
        return
    inputs = 3 * bank.n
    indices = (bits(bank.num_nodes, bank.n) * inputs / 2).int() + torch.arange(bank.n, dtype=torch.int32)
    wiring = Wiring(indices, inputs)
    flips = Flips(probability=0.25, seed=1, step=torch.tensor(0))
    mask = flip_mask(flips, bank.num_nodes, bank.n, BATCH).permute(2, 0, 1)
    results = []
    for fused in (True, False):
        twin = _copy(subject, bank).train()
        x = uniform(BATCH, inputs).requires_grad_()
        with subject.doing("fused(x, wiring, flips)" if fused else "a training forward"):
            if fused:
                y = twin.fused(x, wiring, flips)
            else:
                # the gradient passes a flip unchanged
                routed = x[:, indices.long()]
                y = twin(routed + (torch.where(mask, 1 - routed, routed) - routed).detach())
            gradients = torch.autograd.grad(y, [x, *twin.parameters()], uniform(BATCH, bank.num_nodes, seed=1))
        results.append([y, *gradients])
    names = ["outputs", "the gradient of the inputs"]
    names += [f"the gradient of '{name}'" for name, _ in bank.named_parameters()]
    for name, got, wanted in zip(names, *results, strict=True):
        subject.require(
            torch.allclose(got, wanted, rtol=1e-3, atol=1e-5),
            f"{name} of fused(x, wiring, flips) and of forward(routed, flipped) differ. Hand wiring and flips on to "
            "the op in relaxed_fused(x, wiring, flips).",
        )


def _check_frozen(subject: Subject, bank: LUTNodes, x: Tensor) -> None:
    wanted = modules.run(subject, "a forward in eval mode", bank.eval(), x)
    with subject.doing("freeze()"):
        bank.freeze()
    for training in (True, False):
        y = modules.run(subject, "a forward of a frozen bank", bank.train(training), x)
        subject.require(
            torch.equal(y, wanted),
            "frozen, it gives other outputs than in eval mode before. Leave freeze and forward to LUTNodes.",
        )


def _copy(subject: Subject, bank: LUTNodes) -> LUTNodes:
    twin: LUTNodes = subject.build()
    modules.load(subject, twin, bank)
    return twin
