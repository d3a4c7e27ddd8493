"""Codes, scales and gradients of every quantizer, against the published formulas in float64, group by group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.seeding import generator
from difflut_lab.ternary import TernaryLinear, build_quantizer, quantize

CASES = [
    (name, granularity)
    for name in ("absmean", "twn", "ttq", "lsq", "stochastic")
    for granularity in ("tensor", "channel", "group")
] + [("fixed", None)]


def groups(shape: tuple[int, ...], granularity: str | None, size: int) -> Iterator[np.ndarray]:
    """A mask per scale."""
    outputs, inputs = shape[:2]
    rows = range(outputs) if granularity in ("channel", "group") else [slice(None)]
    blocks = [slice(i, i + size) for i in range(0, inputs, size)] if granularity == "group" else [slice(None)]
    for row in rows:
        for block in blocks:
            mask = np.zeros(shape, dtype=bool)
            mask[row, block] = True
            yield mask


def reference(name: str, v: np.ndarray, g: np.ndarray, learned: list[float]) -> tuple[np.ndarray, ...]:
    """Codes, values, gradient of the latent weights and of what is learned, for weights that share a scale."""
    m = np.abs(v).mean()
    if name in ("absmean", "stochastic"):
        codes = np.clip(np.round(v / m), -1, 1)
        return codes, m * codes, g, np.array([])
    if name == "twn":
        codes = np.sign(v) * (np.abs(v) > 0.7 * m)
        return codes, np.abs(v[codes != 0]).mean() * codes, g, np.array([])
    if name == "fixed":
        codes = np.sign(v) * (np.abs(v) > 0.3)
        return codes, codes, g, np.array([])
    if name == "ttq":
        positive, negative = np.exp(learned)
        codes = np.sign(v) * (np.abs(v) > 0.05 * np.abs(v).max())
        values = np.where(codes > 0, positive, np.where(codes < 0, -negative, 0))
        latent = g * np.where(codes > 0, positive, np.where(codes < 0, negative, 1))
        return codes, values, latent, np.array([positive * g[codes > 0].sum(), -negative * g[codes < 0].sum()])
    (step,) = learned
    codes = np.clip(np.round(v / step), -1, 1)
    inside = np.abs(v) < step
    slope = np.where(inside, np.round(v / step) - v / step, np.sign(v))
    return codes, step * codes, g * inside, np.array([(g * slope).sum() / np.sqrt(v.size)])


@pytest.mark.parametrize("shape", [(4, 7), (3, 7, 2, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_formulas(name: str, granularity: str | None, shape: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"granularity": granularity, "group_size": 3} if granularity else {"threshold": 0.3}
    quantizer = build_quantizer({"name": name, **options}).double()
    weight = torch.randn(shape, dtype=torch.float64)
    quantizer.prepare(weight)
    learned = list(quantizer.parameters())
    with torch.no_grad():
        for parameter in learned:
            # other values than the initial ones, which follow from the weight
            parameter.copy_(0.7 + 0.6 * torch.rand_like(parameter))
    latent, upstream = weight.clone().requires_grad_(), torch.randn(shape, dtype=torch.float64)
    ternary = quantizer(latent)
    gradients = torch.autograd.grad(ternary.values(), [latent, *learned], upstream)
    codes, values = ternary.codes.detach().numpy(), ternary.values().detach().numpy()
    w, g = weight.numpy(), upstream.numpy()
    flat = [parameter.detach().flatten().tolist() for parameter in learned]
    for index, mask in enumerate(groups(shape, granularity, 3)):
        wanted = reference(name, w[mask], g[mask], [values[index] for values in flat])
        got = [codes[mask], values[mask], gradients[0].numpy()[mask]]
        got.append(np.array([float(gradient.flatten()[index]) for gradient in gradients[1:]]))
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_what_is_learned_starts_from_the_weight(granularity: str) -> None:
    weight = torch.randn(4, 7, dtype=torch.float64)
    options = {"granularity": granularity, "group_size": 3}
    ttq, lsq = (build_quantizer({"name": name, **options}) for name in ("ttq", "lsq"))
    for quantizer in (ttq, lsq):
        quantizer.prepare(weight)
    positive, negative = (parameter.detach().exp().flatten() for parameter in ttq.parameters())
    (step,) = (parameter.detach().flatten() for parameter in lsq.parameters())
    for index, mask in enumerate(groups((4, 7), granularity, 3)):
        v = weight.numpy()[mask]
        kept = np.abs(v) > 0.05 * np.abs(v).max()
        for start, part in ((positive, v[kept & (v > 0)]), (negative, v[kept & (v < 0)])):
            np.testing.assert_allclose(start[index], np.abs(part if part.size else v).mean())
        np.testing.assert_allclose(step[index], 2 * np.abs(v).mean())


def test_stochastic_codes_are_drawn_with_the_probability_that_keeps_the_mean() -> None:
    weight = torch.tensor([[-1.5, -0.6, -0.1, 0.0, 0.2, 0.5, 0.9, 2.0]])
    quantizer = build_quantizer("stochastic")
    draws, times = generator(0, "draws"), 20000
    codes = torch.stack([quantizer(weight, draws).codes[0] for _ in range(times)])
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    wanted = (weight[0] / weight.abs().mean()).clamp(-1, 1)
    assert torch.equal(codes.sign().sum(0).sign(), wanted.sign())
    # four standard deviations of a share
    assert ((codes.mean(0) - wanted).abs() <= 4 * (wanted.abs() * (1 - wanted.abs()) / times).sqrt()).all()


def test_fixed_refuses_weights_that_would_all_be_0() -> None:
    with pytest.raises(ConfigError, match=r"threshold=0.33: every code is 0, because the largest weight is 0\.0[5-9]"):
        TernaryLinear(1000, 4, quantizer="fixed")
    layer = TernaryLinear(1000, 4, quantizer={"name": "fixed", "threshold": 0.02})
    assert 0.5 < layer.quantized().codes.abs().mean() < 0.9


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7])
def test_ttq_refuses_thresholds_at_which_its_scales_would_be_one(threshold: float) -> None:
    with pytest.raises(ConfigError, match=rf"threshold={threshold}: must be greater than 0 and less than 0\.5"):
        TernaryLinear(20, 4, quantizer={"name": "ttq", "threshold": threshold})


def test_a_share_of_latent_weight_in_training_only() -> None:
    layer = TernaryLinear(20, 4)
    latent, ternary = layer.weight.detach(), layer.quantized().values()
    for blend in (0.0, 0.25, 1.0):
        layer.quantizer.blend = blend
        torch.testing.assert_close(layer.train().effective_weight(), blend * ternary + (1 - blend) * latent)
        assert torch.equal(layer.eval().effective_weight(), ternary)


def test_ttq_keeps_the_smaller_scale_in_sight_of_the_larger_one() -> None:
    layer = TernaryLinear(20, 4, quantizer="ttq")
    quantizer: Any = layer.quantizer
    with torch.no_grad():
        quantizer.log_positive.fill_(-20.0)
        quantizer.log_negative[:2] = -30.0
    # values that are ternary already get the same codes
    ternary = layer.quantized()
    assert torch.equal(quantizer(ternary.values()).codes, ternary.codes)
    assert (ternary.scale > ternary.skew.abs()).all()
    with torch.no_grad():
        quantizer.log_negative.fill_(-2.0)
    gradients = torch.autograd.grad(layer(torch.randn(8, 20)).square().sum(), list(layer.parameters()))
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("method", ["deterministic", "stochastic", "ttq"])
def test_function(method: str) -> None:
    weight = torch.randn(6, 9, requires_grad=True)
    values = quantize(weight, method)
    assert values.shape == weight.shape and len(values.unique()) == 3
    (gradient,) = torch.autograd.grad(values, weight, torch.ones_like(weight))
    assert (gradient != 0).all()


def test_function_draws_from_the_given_generator_and_defaults_to_the_global_one() -> None:
    weight = torch.randn(50, 50)
    drawn: list[Tensor] = [quantize(weight, "stochastic", generator=generator(seed, "q")) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(3)
    first = quantize(weight, "stochastic")
    torch.manual_seed(3)
    assert torch.equal(quantize(weight, "stochastic"), first)


def test_zeros_have_codes_of_0() -> None:
    for name in ("absmean", "twn", "ttq", "lsq", "stochastic"):
        assert not quantize(torch.zeros(3, 4), name).any()


@pytest.mark.parametrize("name", ["absmean", "twn", "ttq", "lsq", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_channel_of_zeros_stays_zero_in_every_type(name: str, dtype: torch.dtype) -> None:
    weight = torch.tensor([[0, 0, 0, 0], [0.1, 0.2, -0.3, 0.4]], dtype=dtype, requires_grad=True)
    values = quantize(weight, name, granularity="channel")
    assert values.dtype == dtype
    assert not values[0].any()
    values.sum().backward()
    assert weight.grad is not None
    assert torch.isfinite(values).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_on_a_gpu_differ_from_call_to_call_and_follow_the_global_seed() -> None:
    weight = torch.randn(64, 64, device="cuda")
    torch.manual_seed(0)
    first, second = quantize(weight, "stochastic"), quantize(weight, "stochastic")
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, quantize(weight, "stochastic"))
