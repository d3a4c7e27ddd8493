"""Mixed precision: codes, scales and levels are those of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from difflut_lab.ops.ternary_linear import quantize_activations
from difflut_lab.registry import REGISTRY
from difflut_lab.ternary import TernaryConv2d, TernaryLayer, TernaryLinear
from difflut_lab.ternary.activation_quantization import fake_quantize

BF16 = torch.autocast("cpu", torch.bfloat16)
BUILT_IN = [
    name
    for name in REGISTRY.names("quantizer")
    if REGISTRY.get("quantizer", name).__module__.startswith("difflut_lab.")
]
# with the threshold that is its default it refuses weights that start as usual
OPTIONS: dict[str, dict[str, Any]] = {"fixed": {"threshold": 0.02}}
LAYERS = {
    "linear": (lambda **options: TernaryLinear(40, 30, **options), (8, 40)),
    "conv2d": (lambda **options: TernaryConv2d(6, 10, 3, **options), (8, 6, 5, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("quantizer", BUILT_IN)
@pytest.mark.parametrize("training", [False, True])
def test_weights_are_quantised_in_float32(layer: str, quantizer: str, training: bool) -> None:
    build, shape = LAYERS[layer]
    spec = {"name": quantizer, **OPTIONS.get(quantizer, {})}
    options = {"quantizer": spec, "layer_config": {"flip_probability": 0.1}}
    twins: list[TernaryLayer] = [build(**options).train(training) for _ in range(2)]
    with BF16:
        found = twins[0].effective_weight()
    expected = twins[1].effective_weight()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    x = torch.randn(shape)
    with BF16:
        y = twins[0](x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), twins[1](x), rtol=0.03, atol=0.05)
    y.float().square().sum().backward()
    for name, parameter in twins[0].named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


def test_levels_of_inputs_in_low_precision_are_those_of_their_values() -> None:
    x = torch.randn(64, 200).to(torch.bfloat16).requires_grad_()
    y = fake_quantize(x)
    levels, step = quantize_activations(x.detach().float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (levels * step).to(torch.bfloat16))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
