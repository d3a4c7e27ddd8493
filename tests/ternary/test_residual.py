"""Residual blocks: shapes, shortcuts, and torchvision's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from difflut_lab.errors import ConfigError
from difflut_lab.layers import LayerConfig
from difflut_lab.ternary import (
    LearnableTernaryActivation,
    TernaryBottleneck,
    TernaryConv2d,
    TernaryDepthwiseSeparable,
    TernaryResidualBlock,
)


@pytest.mark.parametrize("quantizer", ["none", "absmean"])
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 1), (16, 2)])
@pytest.mark.parametrize("kind", [TernaryResidualBlock, TernaryBottleneck])
def test_is_that_of_torchvision(kind: Any, channels: int, stride: int, quantizer: str) -> None:
    block = kind(8, channels, stride, quantizer=quantizer)
    shortcut = None
    if stride > 1 or channels != 8:
        shortcut = nn.Sequential(nn.Conv2d(8, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
    assert (block.downsample is None) == (shortcut is None)
    reference: nn.Module
    if kind is TernaryBottleneck:
        reference = Bottleneck(8, channels // 4, stride, shortcut)
    else:
        reference = BasicBlock(8, channels, stride, shortcut)
    x = torch.randn(4, 8, 7, 9)
    # statistics other than the initial ones
    for _ in range(3):
        block(x)
    block.eval()
    state = {name: value for name, value in block.state_dict().items() if not name.endswith("draw_step")}
    for name, module in block.named_modules():
        if isinstance(module, TernaryConv2d):
            state[f"{name}.weight"] = module.effective_weight()
    reference.load_state_dict(state)
    torch.testing.assert_close(block(x), reference.eval()(x), atol=1e-5, rtol=1e-4)


def test_a_given_shortcut_is_used() -> None:
    shortcut = nn.Sequential(nn.AvgPool2d(2), TernaryConv2d(4, 6, 1, bias=False))
    block = TernaryResidualBlock(4, 6, 2, shortcut)
    assert block.downsample is shortcut and block(torch.randn(2, 4, 6, 6)).shape == (2, 6, 3, 3)
    # its configuration is its own, until another one is given to the block
    assert TernaryResidualBlock(4, 4, 1, TernaryConv2d(4, 4, 1, layer_config={"flip_probability": 0.5})).downsample
    block.layer_config = LayerConfig(flip_probability=0.1)
    assert isinstance(shortcut[1], TernaryConv2d) and shortcut[1].layer_config.flip_probability == 0.1


@pytest.mark.parametrize("kind", [TernaryResidualBlock, TernaryBottleneck])
def test_choices(kind: Any) -> None:
    block = kind(8, conv="depthwise_separable", activation="learnable_ternary")
    assert isinstance(block.conv2, TernaryDepthwiseSeparable) and isinstance(block.act1, LearnableTernaryActivation)
    y = block(torch.randn(2, 8, 5, 5))
    assert set(y.unique().tolist()) <= {-1.0, 0.0, 1.0} and block.downsample is None
    with pytest.raises(ConfigError, match="conv=dense: must be conv2d or depthwise_separable"):
        kind(8, conv="dense")
    with pytest.raises(ConfigError, match="activation=sign: must be one of"):
        kind(8, activation="sign")


def test_channels_of_a_bottleneck_include_its_expansion() -> None:
    block = TernaryBottleneck(8, 16)
    assert block.conv2.weight.shape == (4, 4, 3, 3)
    with pytest.raises(ConfigError, match="out_channels=10: must be a multiple of 4"):
        TernaryBottleneck(8, 10)


def test_convolutions_have_no_bias() -> None:
    for block in (TernaryResidualBlock(4, 8, 2), TernaryBottleneck(4, 8, 2)):
        assert all(conv.bias is None for conv in block.modules() if isinstance(conv, TernaryConv2d))
