"""Trits of activations, their thresholds and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.layers import LayerConfig
from difflut_lab.ternary import LearnableTernaryActivation, TernaryActivation, build_activation

X = torch.tensor([[-3.0, -1.0, -0.6, -0.5, -0.2, 0.0, 0.4, 0.5, 0.51, 1.0, 1.01]])


@pytest.mark.parametrize("learnable", [False, True])
def test_trits_and_gradient_at_the_initial_threshold(learnable: bool) -> None:
    activation = LearnableTernaryActivation(11) if learnable else TernaryActivation()
    # the learned threshold is 0.5 up to rounding
    x = torch.where(X.abs() == 0.5, X * 0.999, X).requires_grad_()
    y = activation(x)
    assert y.tolist() == [[-1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1]] and y.dtype == x.dtype
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(x, 2.0))
    inside = torch.where(X.abs() == 1, X * 0.999, X).abs() <= 1
    torch.testing.assert_close(gradient[X.abs() != 1], 2.0 * inside[X.abs() != 1])


@pytest.mark.parametrize(
    ("shape", "feature_dim"), [((64, 3), 1), ((8, 3, 5, 4), 1), ((8, 3, 3, 3), 1), ((8, 9, 3), -1), ((8, 3, 9), 1)]
)
def test_thresholds_belong_to_features_and_have_the_gradient_of_the_ramp(
    shape: tuple[int, ...], feature_dim: int
) -> None:
    activation = LearnableTernaryActivation(3, feature_dim=feature_dim).double()
    thresholds = torch.tensor([0.2, 0.7, 1.5], dtype=torch.float64)
    with torch.no_grad():
        activation.raw_threshold.copy_(thresholds.expm1().log())
    torch.testing.assert_close(activation.threshold, thresholds)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, upstream = activation(x), torch.randn(shape, dtype=torch.float64)
    for feature, threshold in enumerate(thresholds):
        one, other = y.select(feature_dim, feature), x.select(feature_dim, feature)
        assert torch.equal(one, other.sign() * (other.abs() > threshold))
    got = torch.autograd.grad(y, [x, activation.raw_threshold], upstream)
    view = [1] * len(shape)
    view[feature_dim] = 3
    ramp = (x / (2 * activation.threshold.view(view))).clamp(-1, 1)
    wanted = torch.autograd.grad(ramp, [x, activation.raw_threshold], upstream)
    torch.testing.assert_close(got, wanted)


def test_thresholds_are_learned() -> None:
    """Inputs of two sizes, of which only the larger shall count: a threshold between them finds the targets."""
    activation = LearnableTernaryActivation(1)
    x = torch.cat([torch.full((50, 1), 0.7), torch.full((50, 1), 1.2)]) * (torch.arange(100)[:, None] % 2 * 2 - 1)
    target = x.sign() * (x.abs() > 1)
    optimizer = torch.optim.Adam(activation.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (activation(x) - target).square().mean().backward()
        optimizer.step()
    assert torch.equal(activation(x), target) and 0.7 < float(activation.threshold.detach()) < 1.2


def test_thresholds_stay_positive() -> None:
    activation = LearnableTernaryActivation(2)
    with torch.no_grad():
        activation.raw_threshold.fill_(-50)
    assert (activation.threshold > 0).all()


def test_another_number_of_features_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expects 3 features in dimension 1, got inputs of shape \(2, 4\)"):
        LearnableTernaryActivation(3)(torch.randn(2, 4))


@pytest.mark.parametrize("learnable", [False, True])
def test_flips(learnable: bool) -> None:
    activation: Any = partial(LearnableTernaryActivation, 200) if learnable else TernaryActivation
    layer = activation(layer_config=LayerConfig(flip_probability=0.3), seed=1)
    x = torch.randn(500, 200)
    trits = layer.eval()(x)
    layer.train()
    flipped = layer(x)
    assert set(flipped.unique().tolist()) == {-1.0, 0.0, 1.0}
    changed = flipped != trits
    # four standard deviations of a share of 100,000
    assert abs(float(changed.float().mean()) - 0.3) < 0.006
    for trit in (-1, 0, 1):
        others = flipped[changed & (trits == trit)]
        assert abs(float((others == others.min()).float().mean()) - 0.5) < 0.025
    assert not torch.equal(layer(x), flipped)
    again = activation(layer_config=LayerConfig(flip_probability=0.3), seed=1)
    assert torch.equal(again(x), flipped)
    assert torch.equal(layer.eval()(x), trits)


def test_gradients_pass_flips_unchanged_and_are_stabilised() -> None:
    config = LayerConfig(flip_probability=0.5, grad_stabilization="layerwise", grad_target_std=0.1)
    layer = TernaryActivation(layer_config=config)
    x: Tensor = torch.empty(20, 30).uniform_(-1, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x), x, 1000 * torch.randn(20, 30))
    torch.testing.assert_close(gradient.std(correction=0), torch.tensor(0.1))


def test_by_name() -> None:
    assert isinstance(build_activation("relu", 3), nn.ReLU)
    assert type(build_activation("ternary", 3)) is TernaryActivation
    learnable = build_activation("learnable_ternary", 3)
    assert isinstance(learnable, LearnableTernaryActivation) and learnable.num_features == 3
    with pytest.raises(ConfigError, match="activation=sign: must be one of relu, ternary, learnable_ternary"):
        build_activation("sign", 3)  # type: ignore[arg-type]  # the test is about it
