"""Ternary architectures: their shapes, what is ternary in them, and what their float twins are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from difflut_lab import REGISTRY
from difflut_lab.errors import ConfigError
from difflut_lab.layers import LayerConfig
from difflut_lab.models import TernaryResNet
from difflut_lab.ternary import TernaryLayer

SMALL: dict[str, dict[str, Any]] = {
    "ternary_resnet": {"depth": 20, "widths": [8, 8, 12], "blocks": [1, 1, 1], "stem": "cifar"},
    "ternary_vit": {"patch_size": 4, "d_model": 12, "num_heads": 3, "depth": 2},
    "ternary_mlp": {"widths": [12, 12, 12]},
    "ternary_lstm": {"hidden_size": 12},
}
IMAGE = (3, 8, 8)


def build(name: str, **options: Any) -> nn.Module:
    model_class = REGISTRY.get_model(name)
    provided: dict[str, Any] = {"input_shape": IMAGE, "num_classes": 10}
    return model_class(**{**provided, **SMALL[name], **options})


def ternary(model: nn.Module) -> dict[str, TernaryLayer]:
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLayer) and not layer.is_float
    }


# parameters of the float networks: He et al., arXiv 1512.03385, table 6, and torchvision's resnet18 and resnet50
@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({"depth": 20, "stem": "cifar"}, 0.27),
        ({"depth": 32, "stem": "cifar"}, 0.46),
        ({"depth": 44, "stem": "cifar"}, 0.66),
        ({"depth": 56, "stem": "cifar"}, 0.85),
        ({"depth": 18, "num_classes": 1000}, 11.69),
        ({"depth": 50, "num_classes": 1000}, 25.56),
    ],
    ids=str,
)
def test_resnets_have_the_published_sizes(options: dict[str, Any], millions: float) -> None:
    model = TernaryResNet(**options, quantizer="none")
    count = sum(parameter.numel() for parameter in model.parameters())
    # the published networks of CIFAR have shortcuts without parameters
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_default_resnet() -> None:
    model = TernaryResNet(num_classes=7)
    assert {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"} <= set(dict(model.named_children()))
    assert not hasattr(model, "layer4")
    assert [len(getattr(model, f"layer{index}")) for index in (1, 2, 3)] == [2, 2, 2]
    x = torch.randn(2, 3, 64, 64)
    model.eval()
    stem = model.pool(torch.relu(model.bn1(model.conv1(x))))
    assert stem.shape == (2, 64, 16, 16)
    for stage in (model.layer1, model.layer2, model.layer3):
        assert isinstance(stage, nn.Module)
        stem = stage(stem)
    assert stem.shape == (2, 256, 4, 4)
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("name", SMALL)
def test_first_and_last_layer_are_in_float_unless_told_otherwise(name: str) -> None:
    layers = {name: layer for name, layer in build(name).named_modules() if isinstance(layer, TernaryLayer)}
    first, *inner, last = layers.values()
    assert first.is_float and last.is_float and not any(layer.is_float for layer in inner)
    whole = build(name, quantize_first=True, quantize_last=True)
    assert set(ternary(whole)) == set(layers)


@pytest.mark.parametrize("name", SMALL)
def test_without_a_quantizer_it_is_the_float_network_of_the_same_shape_and_start(name: str) -> None:
    model, twin = build(name), build(name, quantizer="none")
    assert ternary(model) and not ternary(twin)
    state, other = model.state_dict(), twin.state_dict()
    assert set(other) <= set(state)
    assert all(torch.equal(state[key], other[key]) for key in other)


@pytest.mark.parametrize("name", SMALL)
def test_another_seed_is_another_start_and_the_global_random_state_stays(name: str) -> None:
    before = torch.get_rng_state()
    models = [build(name, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    weights = [next(iter(ternary(model).values())).weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", SMALL)
def test_no_two_layers_start_alike(name: str) -> None:
    weights = [layer.weight.detach().flatten()[:8] for layer in ternary(build(name)).values()]
    scaled = [weight / weight.abs().max() for weight in weights]
    assert not any(torch.allclose(scaled[i][:4], scaled[j][:4]) for i in range(len(scaled)) for j in range(i))


@pytest.mark.parametrize("name", SMALL)
def test_the_layer_config_acts_in_every_ternary_layer_in_training_only(name: str) -> None:
    model = build(name, layer_config=LayerConfig(flip_probability=0.3, grad_stabilization="batch"))
    assert all(layer.layer_config.flip_probability == 0.3 for layer in ternary(model).values())
    x = torch.randn(8, *IMAGE)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    # batch statistics are the same in both forwards: what differs are the flips
    assert not torch.allclose(model(x), model(x))


@pytest.mark.parametrize("name", ["ternary_resnet", "ternary_mlp"])
@pytest.mark.parametrize("activation", ["ternary", "learnable_ternary"])
def test_activations_can_be_ternary(name: str, activation: str) -> None:
    model = build(name, activation=activation)
    model(torch.randn(16, *IMAGE)).logsumexp(1).sum().backward()
    thresholds = [parameter for key, parameter in model.named_parameters() if "threshold" in key]
    assert bool(thresholds) == (activation == "learnable_ternary")
    assert all(threshold.grad is not None and threshold.grad.any() for threshold in thresholds)


def test_depthwise_separable_blocks() -> None:
    model = build("ternary_resnet", conv="depthwise_separable")
    model(torch.randn(4, *IMAGE)).sum().backward()
    names = ternary(model)
    assert any("depthwise" in name for name in names) and any("pointwise" in name for name in names)
    assert all(layer.weight.grad is not None for layer in names.values())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one entry per stage"):
        build("ternary_resnet", blocks=[1, 1])
    with pytest.raises(ConfigError, match=r"depth=19: must be one of None, 18, 50, 20"):
        TernaryResNet(depth=19)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"patch_size=3: must divide the images' size, 8 x 8"):
        build("ternary_vit", patch_size=3)
    for name in ("ternary_resnet", "ternary_vit"):
        with pytest.raises(ConfigError, match="samples must be images"):
            build(name, input_shape=(64,))
    with pytest.raises(ConfigError, match="must be images .* or sequences"):
        build("ternary_lstm", input_shape=(64,))


def test_an_lstm_reads_images_row_by_row() -> None:
    model = build("ternary_lstm").eval()
    x = torch.randn(2, *IMAGE)
    rows = x.permute(0, 2, 1, 3).reshape(2, 8, 24)
    assert torch.equal(model(x), model(rows))


def test_an_unknown_stem_is_refused() -> None:
    with pytest.raises(ConfigError, match="stem=imagnet: must be imagenet or cifar"):
        build("ternary_resnet", stem="imagnet")
