from __future__ import annotations

import math

import pytest
import torch

from difflut_lab.encoders import LearnableThermometer


def test_gradient_is_that_of_the_sigmoid() -> None:
    encoder = LearnableThermometer(2, bits=3, temperature=0.3)
    x = torch.randn(40, 2) * torch.tensor([1.0, 5.0])
    encoder.fit(x)
    with torch.no_grad():
        encoder.offset.normal_(std=0.05)
    upstream = torch.randn(40, 6)
    bits = encoder(x)
    assert torch.equal(bits, (x.unsqueeze(2) > encoder.thresholds).flatten(1).float())
    bits.backward(upstream)
    thresholds = encoder.thresholds.tolist()
    wanted = torch.zeros(2, 3, dtype=torch.float64)
    for b in range(40):
        for f in range(2):
            spread = float(x[:, f].double().std(correction=0))
            for t in range(3):
                u = (float(x[b, f]) - thresholds[f][t]) / (0.3 * spread)
                slope = 1 / (1 + math.exp(-u)) * (1 - 1 / (1 + math.exp(-u)))
                wanted[f, t] -= float(upstream[b, 3 * f + t]) * slope / 0.3
    assert encoder.offset.grad is not None
    torch.testing.assert_close(encoder.offset.grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["feature", "channel", "global"])
def test_thresholds_learn(scope: str) -> None:
    """Bits that shall say whether a value is above 0.9, from thresholds that start at the quartiles."""
    x = torch.rand(500, 4)
    encoder = LearnableThermometer(4, bits=3, scope=scope, input_shape=(2, 2))  # type: ignore[arg-type] # a str
    encoder.fit(x)
    before = encoder.thresholds.detach().clone()
    wanted = (x > 0.9).float()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        last = encoder(x).view(500, 4, 3)[:, :, 2]
        (last - wanted).square().mean().backward()
        optimizer.step()
    after = encoder.thresholds.detach()
    assert (before[:, 2] - 0.75).abs().max() < 0.06
    assert (after[:, 2] - 0.9).abs().max() < 0.03
    # of the other bits nothing is asked
    assert torch.equal(after[:, :2], before[:, :2])
    assert (encoder.eval()(x).view(500, 4, 3)[:, :, 2] == wanted).float().mean() > 0.97


def test_thresholds_stay_in_order() -> None:
    encoder = LearnableThermometer(3, bits=4)
    x = torch.randn(50, 3)
    encoder.fit(x)
    with torch.no_grad():
        encoder.offset.normal_(std=3.0)
    assert (encoder.thresholds.diff(dim=1) >= 0).all()
    assert (encoder(x).view(50, 3, 4).diff(dim=2) <= 0).all()


def test_constant_features_have_no_gradient() -> None:
    encoder = LearnableThermometer(2, bits=2)
    x = torch.stack([torch.full((20,), 0.3), torch.rand(20)], dim=1)
    encoder.fit(x)
    encoder(x).sum().backward()
    assert encoder.offset.grad is not None and encoder.offset.grad.isfinite().all()
    assert encoder.offset.grad[0].count_nonzero() == 0 and encoder.offset.grad[1].all()


def test_bits_are_hard_and_without_gradient_in_evaluation() -> None:
    encoder = LearnableThermometer(2, bits=2)
    x = torch.rand(20, 2)
    encoder.fit(x)
    bits = encoder(x)
    assert bits.requires_grad
    encoder.eval()
    assert not encoder(x).requires_grad
    assert torch.equal(encoder(x), bits)


def test_the_temperature_may_change_in_between() -> None:
    encoder = LearnableThermometer(1, bits=1)
    x = torch.rand(200, 1)
    encoder.fit(x)
    assert encoder.SCHEDULABLE == ("temperature",)
    gradients = []
    for encoder.temperature in (0.01, 10.0):
        encoder.zero_grad()
        encoder(x).sum().backward()
        assert encoder.offset.grad is not None
        gradients.append(float(encoder.offset.grad))
    # a wide sigmoid has the slope 1/4 everywhere
    assert gradients[1] == pytest.approx(-200 / 4 / 10, rel=1e-2)
    assert gradients[0] < 2 * gradients[1]


def test_fitting_anew_starts_anew() -> None:
    encoder = LearnableThermometer(2)
    x = torch.rand(30, 2)
    encoder.fit(x)
    before = encoder.thresholds.detach().clone()
    with torch.no_grad():
        encoder.offset.add_(1.0)
    encoder.fit(x)
    assert torch.equal(encoder.thresholds, before)
