"""A convolution and its batch norm as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from difflut_lab.layers import LayerConfig
from difflut_lab.ternary import FusedTernaryConvBN, TernaryBatchNorm, TernaryConv2d, TernaryLinear, fold

QUANTIZERS: list[Any] = ["absmean", "twn", "ttq", "lsq", "stochastic", "none", {"name": "fixed", "threshold": 0.05}]
QUANTIZERS += [{"name": "absmean", "granularity": "tensor"}]
QUANTIZERS += [{"name": name, "granularity": "group", "group_size": 3} for name in ("absmean", "ttq")]


def trained(**options: Any) -> FusedTernaryConvBN:
    """A pair after some training, with scales of either sign."""
    layer = FusedTernaryConvBN(8, 6, 3, stride=2, padding=1, **options)
    assert isinstance(layer.bn, nn.BatchNorm2d)
    with torch.no_grad():
        layer.bn.weight.copy_(torch.tensor([1.5, -1.0, 0.3, -0.2, 2.0, 0.0]))
        layer.bn.bias.copy_(torch.randn(6))
    optimizer = torch.optim.SGD(layer.conv.parameters(), lr=0.05)
    for _ in range(5):
        layer(torch.randn(8, 8, 6, 5) + 1).square().sum().backward()
        optimizer.step()
    return layer


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_output_is_that_of_eval_mode(quantizer: Any, groups: int, bias: bool, activation_bits: Any) -> None:
    layer = trained(quantizer=quantizer, groups=groups, bias=bias, activation_bits=activation_bits).eval()
    x = torch.randn(4, 8, 6, 5)
    wanted = layer(x).detach()
    assert layer.fuse() is layer
    assert (layer(x) - wanted).abs().max() < 1e-5
    # it stays what it is, whatever mode is asked for
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_codes_are_frozen_and_nothing_else_is_left() -> None:
    layer = trained(quantizer="ttq", layer_config=LayerConfig(flip_probability=0.5)).eval()
    assert isinstance(layer.conv, TernaryConv2d)
    codes = layer.conv.quantized().codes
    layer.fuse()
    held: Any = layer.conv
    assert held.codes.dtype == torch.int8 and torch.equal(held.codes, codes.to(torch.int8))
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"conv.codes", "conv.scale", "conv.skew", "conv.bias"}


def test_a_checkpoint_loads_into_a_fused_layer() -> None:
    layer, fresh = trained().eval().fuse(), FusedTernaryConvBN(8, 6, 3, stride=2, padding=1).eval().fuse()
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(4, 8, 6, 5)
    assert torch.equal(layer(x), fresh(x))
    assert layer.double()(x.double()).dtype == torch.float64


def test_only_once_and_not_in_training() -> None:
    layer = trained()
    with pytest.raises(RuntimeError, match="in training mode: call eval"):
        layer.fuse()
    layer.eval().fuse()
    with pytest.raises(RuntimeError, match="fused, or packed, already"):
        layer.fuse()


def test_a_linear_layer_and_ternary_scales_of_the_norm_fold_as_well() -> None:
    layer, norm = TernaryLinear(7, 4, quantizer="ttq"), TernaryBatchNorm(4, quantizer="absmean")
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.7, 0.1, 2.0]))
    for _ in range(3):
        norm(layer(torch.randn(16, 7)))
    layer.eval(), norm.eval()
    ternary = layer.quantized()
    scale, skew, bias = fold(ternary, layer.bias, norm)
    x = torch.randn(5, 7)
    y = functional.linear(x, scale * ternary.codes + skew * ternary.codes.abs(), bias)
    torch.testing.assert_close(y, norm(layer(x)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6, track_running_stats=False), nn.GroupNorm(2, 6)])
def test_norms_that_depend_on_the_sample_are_refused(norm: nn.Module) -> None:
    layer = TernaryConv2d(4, 6, 1)
    with pytest.raises(ValueError, match=f"A {type(norm).__name__} without running statistics cannot be folded"):
        fold(layer.quantized(), None, norm)


def test_a_norm_without_scales() -> None:
    layer, norm = TernaryConv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False)
    x = torch.randn(4, 4, 3, 3)
    norm(layer(x))
    layer.eval(), norm.eval()
    ternary = layer.quantized()
    scale, _, bias = fold(ternary, None, norm)
    torch.testing.assert_close(functional.conv2d(x, scale * ternary.codes, bias), norm(layer(x)))
