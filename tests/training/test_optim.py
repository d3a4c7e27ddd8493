"""What weight decay acts on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from difflut_lab.ternary import Quantizer, TernaryLayer
from difflut_lab.training.compose import build_model, resolve
from difflut_lab.training.optim import decays_weights, parameter_groups

SMALL = {
    "ternary_mlp": ["model.widths=[8,8]", "model.activation=learnable_ternary"],
    "ternary_resnet": ["model.widths=[8,12]", "model.blocks=[1,1]"],
    "ternary_vit": ["model.d_model=12", "model.depth=1"],
    "ternary_lstm": ["model.hidden_size=8"],
}


@pytest.mark.parametrize("quantizer", ["ttq", "lsq", "absmean"])
@pytest.mark.parametrize("model", SMALL)
def test_no_scale_norm_bias_or_threshold_decays(
    composed: Callable[..., DictConfig], model: str, quantizer: str
) -> None:
    words = [f"model={model}", *SMALL[model], f"quantizer={quantizer}", "quantizer.granularity=channel"]
    network = build_model(resolve(composed(*words), words), (1, 8, 8), 10)
    decaying, others = parameter_groups(network)
    assert "weight_decay" not in decaying and others["weight_decay"] == 0
    decays = {id(parameter) for parameter in decaying["params"]}
    stays = {id(parameter) for parameter in others["params"]}
    assert not decays & stays
    assert decays | stays == {id(parameter) for parameter in network.parameters()}
    for module in network.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        if isinstance(module, TernaryLayer):
            assert id(module.weight) in decays
            assert module.bias is None or id(module.bias) in stays
        elif isinstance(module, Quantizer | nn.LayerNorm | nn.modules.batchnorm._BatchNorm) or "Activation" in str(
            type(module)
        ):
            assert own <= stays


def test_a_step_of_decay_alone_moves_weights_alone(composed: Callable[..., DictConfig]) -> None:
    words = ["model=ternary_mlp", "model.widths=[8,8]", "quantizer=ttq"]
    network = build_model(resolve(composed(*words), words), (1, 8, 8), 10)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(network), lr=0.1, weight_decay=0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == {"layers.0.weight", "layers.3.weight", "fc.weight"}


def test_parameters_that_are_not_trained_are_in_no_group() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    network[0].weight.requires_grad_(True)
    groups: list[dict[str, Any]] = parameter_groups(network)
    assert [group["params"] for group in groups] == [[network[0].weight]]


@pytest.mark.parametrize(
    ("options", "decays"),
    [
        ({"_target_": "torch.optim.AdamW"}, True),  # by its default
        ({"_target_": "torch.optim.AdamW", "weight_decay": 0.0}, False),
        ({"_target_": "torch.optim.Adam"}, False),
        ({"_target_": "torch.optim.SGD", "weight_decay": 1e-4}, True),
        ({"_target_": "torch.optim.LBFGS"}, False),  # has no such option
    ],
)
def test_an_optimizers_own_default_counts(options: dict[str, Any], decays: bool) -> None:
    assert decays_weights(options) is decays
