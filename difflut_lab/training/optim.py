"""Which parameters a weight decay acts on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from difflut_lab import schema
from difflut_lab.ternary import Quantizer


def decays_weights(optimizer: Mapping[str, Any]) -> bool:
    """Whether a configured optimizer decays weights: as it says, or else by the default of its ``_target_``."""
    declared = schema.options(schema.locate(optimizer["_target_"], "optimizer._target_")).get("weight_decay")
    return bool(optimizer.get("weight_decay", declared.default if declared else 0))


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Two groups of parameters for an optimizer that decays weights: those that decay, and those that do not.

    Weights and tables decay. What has one dimension does not: biases, scales and offsets of normalisation, thresholds,
    temperatures; nor do the learned scales of quantizers, whose decay would shrink all of a layer's weights at once.

    Parameters
    ----------
    network : nn.Module
        Parameters that need no gradient are left out.

    Returns
    -------
    list of dict
        Groups as ``torch.optim`` takes them; the second has ``weight_decay`` 0. Empty ones are left out.
    """
    scales = {
        id(parameter)
        for module in network.modules()
        if isinstance(module, Quantizer)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.dim() > 1 and id(parameter) not in scales]
    decays = {id(parameter) for parameter in decaying}
    others = [parameter for parameter in trained if id(parameter) not in decays]
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
