"""Gradient stabilisation, measured on the gradient that reaches the nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab import REGISTRY
from difflut_lab.layers import BaseLUTLayer, LayerConfig
from difflut_lab.layers.stabilization import stabilized

LAYERS = ["random_routing", "learnable_routing", "feature_wise_groups"]
MODES = {"layerwise": (0, 1), "nodewise": (0,), "batch": (1,)}


def recorded(layer: BaseLUTLayer) -> list[Tensor]:
    """Outputs of the bank, kept with their gradients."""
    outputs: list[Tensor] = []
    fused = layer.nodes.fused

    def record(*args: Any) -> Tensor:
        outputs.append(fused(*args))
        outputs[-1].retain_grad()
        return outputs[-1]

    layer.nodes.fused = record  # type: ignore[assignment,method-assign]  # the test looks inside
    return outputs


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_spread_and_mean_in_every_step(layer: str, mode: str, subtract: bool) -> None:
    config = LayerConfig(grad_stabilization=mode, grad_target_std=0.5, grad_subtract_mean=subtract)  # type: ignore[arg-type]  # from a table
    built = REGISTRY.get_layer(layer)(30, 24, "probabilistic", 4, layer_config=config)
    outputs = recorded(built)
    optimizer = torch.optim.SGD(built.parameters(), lr=0.01)
    for _ in range(10):
        # every node and every sample has a scale and an offset of its own
        upstream = (torch.randn(32, 24) + 0.3) * torch.rand(32, 1) * torch.logspace(-4, 2, 24)
        optimizer.zero_grad()
        built(torch.rand(32, 30)).backward(upstream)
        optimizer.step()
        gradient = outputs[-1].grad
        assert gradient is not None
        std, mean = torch.std_mean(gradient, dim=MODES[mode], correction=0)
        torch.testing.assert_close(std, torch.full_like(std, 0.5), rtol=1e-3, atol=0)
        if subtract:
            assert mean.abs().max() < 1e-5
        else:
            before_std, before_mean = torch.std_mean(upstream, dim=MODES[mode], correction=0)
            torch.testing.assert_close(mean, 0.5 * before_mean / before_std, rtol=1e-3, atol=1e-6)
    assert len(outputs) == 10


@pytest.mark.parametrize("layer", LAYERS)
def test_none_leaves_gradients_alone(layer: str) -> None:
    built = REGISTRY.get_layer(layer)(30, 24, "dwn", 4)
    outputs = recorded(built)
    upstream = torch.randn(32, 24)
    built(torch.rand(32, 30)).backward(upstream)
    assert outputs[0].grad is not None and torch.equal(outputs[0].grad, upstream)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_in_eval(layer: str, mode: str) -> None:
    config = LayerConfig(grad_stabilization=mode)  # type: ignore[arg-type]  # from a table
    built = REGISTRY.get_layer(layer)(30, 24, "dwn", 4, layer_config=config)
    outputs = recorded(built)
    upstream = torch.randn(32, 24)
    built.eval()
    built.nodes.soft = True
    built(torch.rand(32, 30)).backward(upstream)
    assert outputs[0].grad is not None and torch.equal(outputs[0].grad, upstream)


def test_config_may_be_swapped_on_a_trained_layer() -> None:
    built = REGISTRY.get_layer("random_routing")(30, 24, "dwn", 4)
    outputs = recorded(built)
    for mode in ("none", "batchwise", "none"):
        built.layer_config = LayerConfig(grad_stabilization=mode)  # type: ignore[arg-type]  # from a table
        upstream = torch.randn(32, 24)
        built(torch.rand(32, 30)).backward(upstream)
        assert outputs[-1].grad is not None
        assert torch.equal(outputs[-1].grad, upstream) == (mode == "none")


def wanted(g: Tensor, config: LayerConfig) -> Tensor:
    """The formula, group by group."""
    groups: dict[str, list[Any]] = {
        "layerwise": [(slice(None), slice(None))],
        "nodewise": [(slice(None), j) for j in range(g.shape[1])],
        "batch": [(i, slice(None)) for i in range(g.shape[0])],
    }
    result = g.clone()
    for where in groups[config.grad_stabilization]:
        group = g[where]
        mean, std = group.mean(), (group - group.mean()).square().mean().sqrt()
        if group.numel() == 1 or std <= config.grad_epsilon + 1e-6 * mean.abs():
            continue
        kept = mean if config.grad_subtract_mean else 0.0
        result[where] = (group - kept) * config.grad_target_std / (std + config.grad_epsilon)
    return result


@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (7, 1), (1, 1)])
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_formula(mode: str, subtract: bool, shape: tuple[int, int]) -> None:
    config = LayerConfig(
        grad_stabilization=mode,  # type: ignore[arg-type]  # from a table
        grad_target_std=3.0,
        grad_subtract_mean=subtract,
        grad_epsilon=0.1,
    )
    g = torch.randn(shape, dtype=torch.float64)
    if shape == (7, 5):
        g[:, 1] = 2.5  # a node without spread
        g[3] = 1e-3 * g[3]  # a sample with less than epsilon
    torch.testing.assert_close(stabilized(g, config), wanted(g, config))
    torch.testing.assert_close(stabilized(g.t().contiguous().t(), config), wanted(g, config))


def test_rounding_is_not_blown_up() -> None:
    g = torch.full((64, 8), 0.1)
    g[::2] += 1e-8
    for mode in MODES:
        config = LayerConfig(grad_stabilization=mode, grad_epsilon=1e-12)  # type: ignore[arg-type]  # from a table
        assert torch.equal(stabilized(g, config), g)
    assert stabilized(torch.zeros(4, 4), LayerConfig(grad_stabilization="batch")).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_has_float32_statistics(dtype: torch.dtype) -> None:
    # the sum and the squares overflow float16
    g = (300 * torch.randn(64, 512) + 100).to(dtype)
    config = LayerConfig(grad_stabilization="layerwise")
    result = stabilized(g, config)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), stabilized(g.float(), config), rtol=1e-2, atol=1e-2)
