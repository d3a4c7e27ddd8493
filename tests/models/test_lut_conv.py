from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.layers import ConvLUT, LayerConfig, OrPool, RandomRouting, Shortcut, freeze, soft
from difflut_lab.models import LUTConv
from difflut_lab.training.compose import build_model, resolve
from difflut_lab.training.paths import config_directory, register_resolvers

GROUPS: dict[str, Any] = {
    "encoder": {"name": "thermometer", "bits": 2, "scope": "channel"},
    "layer": {"name": "conv_lut"},
    "node": {"name": "probabilistic", "n": 3},
    "head": {"name": "group_sum", "tau": 2.0},
}


def build(shape: tuple[int, ...] = (1, 8, 8), **options: Any) -> LUTConv:
    given: dict[str, Any] = {"channels": [6, 8], "widths": [30, 21], "input_shape": shape, "num_classes": 5}
    model = LUTConv(**(given | GROUPS | options))
    model.calibrate(features(50, shape))
    return model


def features(count: int = 9, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("shape", "planes"),
    [((1, 8, 8), (8, 2, 2)), ((1, 28, 28), (8, 7, 7)), ((3, 32, 32), (8, 8, 8)), ((2, 9, 5), (8, 2, 1))],
)
def test_blocks_then_layers_for_images_of_any_size(shape: tuple[int, ...], planes: tuple[int, ...]) -> None:
    model = build(shape)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["BitPlanes", "ConvLUT", "OrPool", "ConvLUT", "OrPool", "RandomRouting", "RandomRouting"]
    assert model.layers[4].output_shape == planes
    assert model.layers[5].input_size == planes[0] * planes[1] * planes[2]
    assert model(features(4, shape)).shape == (4, 5)
    assert [layer.layer_index for layer in model.layers if hasattr(layer, "layer_index")] == [0, 1, 2, 3]
    # the last width is rounded up to a multiple of the classes
    assert model.counts["tables"] == 6 + 8 + 30 + 25
    assert build(layer={"name": "conv_lut", "tree_depth": 2}).counts["tables"] == 4 * (6 + 8) + 30 + 25


def test_bits_of_a_channel_are_planes_beside_each_other() -> None:
    model = build((3, 4, 5), channels=[4])
    x = features(7, (3, 4, 5))
    planes = model.layers[0](model.encoder(x)).view(7, 3, 2, 4, 5)
    thresholds = model.encoder.thresholds
    assert thresholds.shape[0] == 3, "of a channel"
    for channel in range(3):
        for bit in range(2):
            assert torch.equal(planes[:, channel, bit], (x[:, channel] > thresholds[channel, bit]).float())


@pytest.mark.parametrize("node", ["dwn", "probabilistic"])
@pytest.mark.parametrize("shortcut", [False, True])
def test_eval_frozen_and_reloaded_agree_bit_for_bit(node: str, shortcut: bool) -> None:
    config = {"flip_probability": 0.1, "grad_stabilization": "nodewise"}
    options: dict[str, Any] = {
        "node": {"name": node, "n": 3},
        "shortcut": shortcut,
        "layer": {"name": "conv_lut", "tree_depth": 2},
        "layer_config": config,
    }
    model = build(**options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(features(32)).square().sum().backward()
        optimizer.step()
    x = features()
    bits = model.eval().encoder(x)
    for layer in model.layers:
        bits = layer(bits)
        assert torch.equal(bits, bits.round()) and ((bits == 0) | (bits == 1)).all()
    wanted = model(x)
    again = build(seed=5, **options)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), wanted)
    freeze(model)
    assert torch.equal(model.train()(x), wanted)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("node", ["dwn", "probabilistic"])
def test_gradients_reach_every_parameter_and_repeat(node: str) -> None:
    config = {"flip_probability": 0.1}
    options: dict[str, Any] = {"node": {"name": node, "n": 3}, "shortcut": True, "layer_config": config}
    first, second = build(**options), build(**options)
    for model in (first, second):
        model(features(40)).logsumexp(dim=1).sum().backward()
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert one.grad is not None and one.grad.isfinite().all() and one.grad.ne(0).any(), name
        assert other.grad is not None and torch.equal(one.grad, other.grad), name
    wirings = [build(seed=seed).get_buffer("layers.1.indices") for seed in (1, 2)]
    assert not torch.equal(*wirings)
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


def test_soft_is_the_relaxation_and_leaves_no_trace() -> None:
    model = build().eval()
    hard = model(features())
    with soft(model):
        assert not torch.equal(model(features()), hard)
    assert torch.equal(model(features()), hard)


def test_no_pooling_and_shortcuts() -> None:
    model = build(pool=1, channels=[6], shortcut=True)
    assert [type(layer) for layer in model.layers][1:3] == [Shortcut, RandomRouting]
    assert model.layers[2].input_size == (6 + 2) * 64
    x = model.layers[0](model.encoder(features()))
    assert torch.equal(model.layers[1](x)[:, 6 * 64 :], x)
    assert OrPool not in [type(layer) for layer in model.layers]


def test_per_layer_settings_of_convolutions_and_of_the_layers_behind() -> None:
    model = build(
        per_layer={
            0: {"layer": {"kernel_size": 5, "padding": 2, "tree_depth": 2}, "node": {"n": 2}},
            "1": {"layer_config": {"flip_probability": 0.25}, "node": {"name": "dwn"}},
            2: {"layer": {"name": "learnable_routing", "candidates": 4}},
        },
        dense={"name": "feature_wise_groups", "num_groups": 3},
    )
    first, second = (layer for layer in model.layers if isinstance(layer, ConvLUT))
    assert first.windows.size == 5 and len(first.branches) == 1 and first.n == 2
    assert second.windows.size == 3 and type(second.nodes).__name__ == "DWNNodes"
    assert second.layer_config == LayerConfig(flip_probability=0.25)
    assert [type(layer).__name__ for layer in model.layers[-2:]] == ["LearnableRouting", "FeatureWiseGroups"]
    assert model.layers[-1].num_groups == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shape": (30,)},
            "model.name=lut_conv: samples must be images (channels, height, width); these have shape (30",
        ),
        (
            {"channels": [4] * 4},
            "Convolution 3 of model.channels=[4, 4, 4, 4]: or_pool: a window of 2 x 2 does not fit",
        ),
        (
            {"layer": {"name": "conv_lut", "kernel_size": 9, "padding": 0}},
            "Convolution 0 of model.channels=[6, 8]: conv_lut: kernel_size=9: a window of 9 x 9 does not fit into",
        ),
        (
            {"layer": {"name": "conv_lut", "padding": 0}, "shortcut": True},
            "Convolution 0 of model.channels=[6, 8]: model.shortcut=true: the convolution makes planes of 6 x 6 out of",
        ),
        ({"layer": {"name": "random_routing"}}, "layer.name=random_routing: the convolutions of lut_conv need a layer"),
        (
            {"per_layer": {4: {"node": {"n": 2}}}},
            "model.per_layer.4: there is no such layer; model.channels=[6, 8] and ",
        ),
        ({"per_layer": {2: {"layer": {"kernel_size": 5}}}}, "Unknown key 'model.per_layer.2.layer.kernel_size'"),
        ({"per_layer": {0: {"lair": {}}}}, "Unknown key 'model.per_layer.0.lair'"),
    ],
)
def test_errors_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(**options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    register_resolvers()

    def from_overrides(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            return compose("train", ["model=lut_conv", *overrides])

    return from_overrides


def test_assembled_in_yaml(composed: Callable[..., DictConfig]) -> None:
    words = ["layer@model.dense=learnable_routing", "layer.tree_depth=2", "+model.per_layer.1.layer.groups=2"]
    config = resolve(composed(*words), words)
    assert config["encoder"]["scope"] == "channel" and config["model"]["dense"]["name"] == "learnable_routing"
    model = build_model(config, (1, 28, 28), 10)
    assert isinstance(model, LUTConv) and model.head.input_size == 500
    first, second = (layer for layer in model.layers if isinstance(layer, ConvLUT))
    assert (first.groups, second.groups, len(first.branches)) == (1, 2, 1)
    for words, message in (
        (["layer=random_routing"], "layer.name=random_routing: the convolutions of lut_conv need a layer"),
        (["model.pool=0"], "model.pool=0: must be at least 1"),
        (["model.channels=[]"], "model.channels=[]: must have at least 1 element"),
        (["layer.groups=0"], "layer.groups=0: must be at least 1"),
        (["+model.dense.foo=1"], "Unknown key 'model.dense.foo'"),
        (["+model.per_layer.9.node.n=2"], "model.per_layer.9: there is no such layer"),
    ):
        with pytest.raises(ConfigError) as error:
            resolve(composed(*words), words)
        assert str(error.value).startswith(message)
