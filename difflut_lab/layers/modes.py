"""What a whole network of LUT layers evaluates: its relaxation, or truth tables that no longer change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from difflut_lab.layers.base import BaseLUTLayer
from difflut_lab.nodes import LUTNodes


def has_relaxation(model: nn.Module) -> bool:
    """Whether ``soft(model)`` evaluates anything else than eval mode does: whether there is a bank of LUT nodes."""
    return any(isinstance(module, LUTNodes) for module in model.modules())


@contextmanager
def soft(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode and every bank of LUT nodes evaluates its relaxation.

    Nothing is flipped, no gradient is stabilised, batch-norm statistics stay as they are. The training modes that the
    modules had are restored at the end, also after an exception. Frozen banks stay their truth tables.

    Parameters
    ----------
    model : nn.Module
        A model, a layer or a bank.
    """
    training = [(module, module.training) for module in model.modules()]
    softness = [(bank, bank.soft) for bank in model.modules() if isinstance(bank, LUTNodes)]
    model.eval()
    for bank, _ in softness:
        bank.soft = True
    try:
        yield
    finally:
        for bank, was_soft in softness:
            bank.soft = was_soft
        for module, was_training in training:
            module.training = was_training


def freeze(model: nn.Module) -> None:
    """Freeze every LUT layer, and every bank outside of one: from now on they are their stored truth tables."""
    for module in model.modules():
        if isinstance(module, BaseLUTLayer | LUTNodes) and not module.is_frozen:
            module.freeze()
