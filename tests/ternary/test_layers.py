"""What ternary layers have in common: weights, augmentation, 8-bit inputs, seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from difflut_lab import REGISTRY
from difflut_lab.errors import ConfigError
from difflut_lab.layers import LayerConfig
from difflut_lab.ternary import TernaryConv2d, TernaryDepthwiseSeparable, TernaryLayer, TernaryLinear

QUANTIZERS: list[Any] = ["absmean", "twn", "ttq", "lsq", "stochastic", "none", {"name": "fixed", "threshold": 0.05}]


def layers(**options: Any) -> list[tuple[TernaryLayer, Tensor]]:
    """A linear layer and a convolution, with inputs."""
    return [
        (TernaryLinear(30, 8, **options), torch.randn(16, 30)),
        (TernaryConv2d(6, 8, 3, stride=2, padding=1, groups=2, **options), torch.randn(16, 6, 7, 5)),
    ]


def plain(layer: TernaryLayer, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer computes with a weight."""
    if isinstance(layer, TernaryConv2d):
        return functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)
    return functional.linear(x, weight, layer.bias)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_outputs_are_those_of_the_ternary_weight(quantizer: Any) -> None:
    for layer, x in layers(quantizer=quantizer):
        weight = layer.weight if layer.is_float else layer.quantized().values()
        torch.testing.assert_close(layer.eval()(x), plain(layer, x, weight))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_codes_are_floats_in_training_and_latent_weights_are_trained(quantizer: Any) -> None:
    for layer, x in layers(quantizer=quantizer):
        start = layer.weight.detach().clone()
        assert layer.effective_weight().dtype == torch.float32
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(x).square().mean().backward()
        assert layer.weight.grad is not None and (layer.weight.grad != 0).float().mean() > 0.5
        optimizer.step()
        assert ((layer.weight != start).float().mean() > 0.5) and layer.weight.is_floating_point()


def test_flips_reach_the_share_of_codes_that_was_asked_for() -> None:
    layer = TernaryLinear(400, 200, layer_config=LayerConfig(flip_probability=0.2))
    ternary = layer.quantized()
    flipped = layer.effective_weight() / ternary.scale
    torch.testing.assert_close(flipped.round(), flipped)
    changed = flipped.round() != ternary.codes
    # four standard deviations of a share of 80,000
    assert abs(float(changed.float().mean()) - 0.2) < 0.006
    for code in (-1, 0, 1):
        others = flipped[changed & (ternary.codes == code)]
        assert abs(float((others == others.min()).float().mean()) - 0.5) < 0.03
    assert not torch.equal(layer.effective_weight(), layer.effective_weight())
    assert torch.equal(layer.eval().effective_weight(), ternary.values())


def test_gradients_pass_flips_unchanged() -> None:
    layer = TernaryLinear(30, 8, layer_config=LayerConfig(flip_probability=0.9))
    upstream = torch.randn(8, 30)
    (gradient,) = torch.autograd.grad(layer.effective_weight(), layer.weight, upstream)
    torch.testing.assert_close(gradient, upstream)


def test_float_weights_do_not_flip() -> None:
    layer = TernaryLinear(30, 8, quantizer="none", layer_config=LayerConfig(flip_probability=1.0))
    assert torch.equal(layer.effective_weight(), layer.weight) and int(layer.draw_step) == 0


@pytest.mark.parametrize("mode", ["layerwise", "nodewise", "batch"])
def test_stabilised_gradients(mode: Any) -> None:
    """Per channel or feature over batch and positions, per sample over all that it has, or over everything."""
    config = LayerConfig(grad_stabilization=mode, grad_target_std=0.5, grad_subtract_mean=True)
    for layer, x in layers(layer_config=config, bias=True):
        y = layer(x)
        dims = {"layerwise": None, "nodewise": [0, *range(2, y.dim())], "batch": list(range(1, y.dim()))}[mode]
        upstream = (torch.randn_like(y) + 0.3) * torch.logspace(-3, 2, y.shape[1]).view(-1, *[1] * (y.dim() - 2))
        assert layer.bias is not None
        bias, weight = torch.autograd.grad(y, [layer.bias, layer.weight], upstream)
        centred = upstream - upstream.mean(dim=dims, keepdim=True)
        wanted = 0.5 * centred / upstream.std(dim=dims, keepdim=True, correction=0)
        torch.testing.assert_close(bias, wanted.sum(dim=[0, *range(2, y.dim())]), rtol=1e-3, atol=1e-3)
        calm = type(layer)(*sizes(layer), layer_config=LayerConfig())
        calm.load_state_dict(layer.state_dict())
        (reference,) = torch.autograd.grad(calm(x), calm.weight, wanted)
        torch.testing.assert_close(weight, reference, rtol=1e-3, atol=1e-3)


def sizes(layer: TernaryLayer) -> tuple[Any, ...]:
    """The arguments that a layer of ``layers`` was built with."""
    return (30, 8) if isinstance(layer, TernaryLinear) else (6, 8, 3, 2, 1, 2)


def test_inputs_in_8_bits_have_a_step_per_token_or_image() -> None:
    for layer, x in layers(activation_bits=8):
        x = x * torch.logspace(-2, 2, len(x)).view(-1, *[1] * (x.dim() - 1))
        step = x.flatten(1).abs().amax(1).view(-1, *[1] * (x.dim() - 1)) / 127
        wanted = plain(layer, (x / step).round() * step, layer.quantized().values())
        torch.testing.assert_close(layer.eval()(x), wanted)
        inputs = x.clone().requires_grad_()
        assert torch.autograd.grad(layer(inputs).sum(), inputs)[0].any()


def test_other_numbers_of_bits_and_wrong_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="activation_bits=4: must be 8"):
        TernaryLinear(3, 4, activation_bits=4)  # type: ignore[arg-type]  # the test is about it
    with pytest.raises(ConfigError, match="groups=3: must divide in_channels=4 and out_channels=6"):
        TernaryConv2d(4, 6, 3, groups=3)


def test_a_separable_convolution_has_two_parts() -> None:
    layer, x = TernaryDepthwiseSeparable(4, 6, 3, stride=2, padding=1).eval(), torch.randn(2, 4, 8, 8)
    assert layer.depthwise.weight.shape == (4, 1, 3, 3) and layer.pointwise.weight.shape == (6, 4, 1, 1)
    assert torch.equal(layer(x), layer.pointwise(layer.depthwise(x))) and layer(x).shape == (2, 6, 4, 4)


def test_seeds_decide_and_the_global_random_state_is_left_alone() -> None:
    sizes = {"linear": (9, 5), "conv2d": (4, 6, 3), "attention": (12, 3), "lstm": (5, 6), "residual_block": (4, 6, 2)}
    for name, arguments in sizes.items():
        state = torch.random.get_rng_state()
        config = LayerConfig(flip_probability=0.2)
        build: Any = REGISTRY.get("ternary", name)
        one, same, other = (build(*arguments, quantizer="stochastic", layer_config=config, seed=s) for s in (1, 1, 2))
        assert torch.equal(state, torch.random.get_rng_state())
        weights = [torch.cat([p.flatten() for p in module.parameters()]) for module in (one, same, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
        leaves = [module for module in one.modules() if isinstance(module, TernaryLayer)]
        starts = [float(leaf.weight.detach().flatten()[0]) for leaf in leaves]
        assert len(set(starts)) == len(leaves)
        state = torch.random.get_rng_state()
        for leaf in leaves:
            leaf.effective_weight()
        assert torch.equal(state, torch.random.get_rng_state())


def test_a_mistyped_layer_config_is_named() -> None:
    with pytest.raises(ConfigError, match="Unknown key 'layer_config.flip_probabilty'"):
        TernaryLinear(3, 4, layer_config={"flip_probabilty": 0.1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "same"}, "padding='same': must be an integer, at least 0, or two of them."),
        ({"stride": 0}, "stride=0: must be an integer, at least 1, or two of them."),
        ({"kernel_size": (3,)}, "kernel_size=(3,): must be an integer, at least 1, or two of them."),
    ],
)
def test_sizes_of_convolutions_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TernaryConv2d(3, 4, **{"kernel_size": 3, **options})
    assert str(error.value) == message
