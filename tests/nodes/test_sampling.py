"""What nodes pass on in training: probabilities, bits, or random draws."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab import REGISTRY, schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers import soft
from difflut_lab.nodes.sampling import SampledNodes

NODES = ["difflogic", "probabilistic", "warp"]
NOISY = ["gumbel_soft", "gumbel_hard"]
every_noisy_node = pytest.mark.parametrize(("name", "sampling"), [(name, how) for name in NODES for how in NOISY])


def bank(name: str, sampling: str, num_nodes: int = 6, **options: Any) -> SampledNodes:
    initializer = {"name": "normal", "std": 1.0}
    nodes = REGISTRY.get_node(name)(num_nodes, 2, sampling=sampling, initializer=initializer, **options)
    assert isinstance(nodes, SampledNodes)
    return nodes


def gradients(nodes: SampledNodes, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(nodes(x), [x, nodes.weight], upstream)


@pytest.mark.parametrize("name", NODES)
def test_hard_rounds_with_the_gradient_of_soft(name: str) -> None:
    x, upstream = torch.rand(50, 6, 2, requires_grad=True), torch.randn(50, 6)
    smooth, rounded = bank(name, "soft"), bank(name, "hard")
    assert torch.equal(rounded(x), (smooth(x) >= 0.5).float())
    assert 0 < rounded(x).mean() < 1
    for got, wanted in zip(gradients(rounded, x, upstream), gradients(smooth, x, upstream), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@every_noisy_node
def test_nothing_is_sampled_in_eval(name: str, sampling: str) -> None:
    nodes, x = bank(name, sampling).eval(), torch.rand(20, 6, 2)
    plain = bank(name, "soft")
    assert torch.equal(nodes(x), plain.eval()(x))
    with soft(nodes), soft(plain):
        assert torch.equal(nodes(x), plain(x))
    assert int(nodes.sampling_step) == 0


@every_noisy_node
def test_noise_is_a_function_of_seed_and_step(name: str, sampling: str) -> None:
    x = torch.rand(40, 6, 2)
    nodes, again, other = bank(name, sampling), bank(name, sampling), bank(name, sampling)
    other.seed = 7
    before = torch.random.get_rng_state()
    first, second = nodes(x), nodes(x)
    assert torch.equal(before, torch.random.get_rng_state())
    assert int(nodes.sampling_step) == 2
    assert not torch.equal(first, second) and not torch.equal(first, other(x))
    assert torch.equal(first, again(x))
    resumed = bank(name, sampling)
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(resumed(x), second)
    assert torch.equal(copy.deepcopy(again)(x), second)


@pytest.mark.parametrize("name", NODES)
def test_nodes_without_noise_count_nothing(name: str) -> None:
    for sampling in ("soft", "hard"):
        assert "sampling_step" not in bank(name, sampling).state_dict()
    assert "sampling_step" in bank(name, "gumbel_soft").state_dict()


@pytest.mark.parametrize("name", ["probabilistic", "warp"])
def test_bits_are_drawn_with_their_probabilities(name: str) -> None:
    x = torch.rand(6, 2).expand(20_000, 6, 2)
    wanted = bank(name, "soft")(x)[0]
    hard, relaxed = (bank(name, sampling, sampling_tau=0.3)(x) for sampling in NOISY[::-1])
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    # the noisy sigmoid is above 1/2 for the same draws; its temperature does not matter for that
    assert torch.equal((relaxed >= 0.5).float(), hard)
    spread = 5 * (wanted * (1 - wanted) / len(x)).sqrt()
    assert ((hard.mean(0) - wanted).abs() < spread).all()
    # draws of neighbouring nodes and samples are independent
    centred = hard - wanted
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert product.mean().abs() < 5 * 0.25 / math.sqrt(product.numel())


@pytest.mark.parametrize("name", ["probabilistic", "warp"])
def test_gumbel_soft_adds_logistic_noise_to_the_logit(name: str) -> None:
    x = torch.rand(6, 2, dtype=torch.float64).expand(20_000, 6, 2)
    logit = torch.logit(bank(name, "soft").double()(x))
    noise = 0.5 * torch.logit(bank(name, "gumbel_soft", sampling_tau=0.5).double()(x)) - logit
    # of the standard logistic distribution: median 0, quartiles -log 3 and log 3, variance pi^2 / 3
    torch.testing.assert_close(
        noise.flatten().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)),
        torch.tensor([-math.log(3), 0.0, math.log(3)], dtype=torch.float64),
        rtol=0,
        atol=0.04,
    )
    assert abs(noise.var().item() - math.pi**2 / 3) < 0.1


def test_difflogic_draws_gates_by_their_shares() -> None:
    nodes = bank("difflogic", "gumbel_hard", num_nodes=20_000)
    with torch.no_grad():
        nodes.weight.copy_(nodes.weight[:1].expand_as(nodes.weight))
    share = nodes.weight[0].softmax(0)
    # one sample at each of the corners spells the gate that a node drew
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).unsqueeze(1).expand(4, 20_000, 2)
    gate = (nodes(corners).long() << torch.arange(4).unsqueeze(1)).sum(0)
    frequency = torch.bincount(gate, minlength=16) / 20_000
    assert ((frequency - share).abs() < 5 * (share * (1 - share) / 20_000).sqrt()).all()


def test_difflogic_mixes_noisy_gates() -> None:
    nodes = bank("difflogic", "gumbel_soft", num_nodes=20_000, sampling_tau=0.5)
    with torch.no_grad():
        nodes.weight.copy_(nodes.weight[:1].expand_as(nodes.weight))
    noisy = nodes(torch.ones(1, 20_000, 2))
    uniform = torch.rand(20_000, 16)
    mixture = ((nodes.weight - torch.log(-torch.log(uniform))) / 0.5).softmax(1)
    wanted = mixture[:, 8:].sum(1)  # gates 8 to 15 are 1 where both inputs are
    quantiles = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(noisy[0].quantile(quantiles), wanted.quantile(quantiles), rtol=0, atol=0.03)


@pytest.mark.parametrize("name", NODES)
def test_gumbel_hard_has_the_gradient_of_gumbel_soft(name: str) -> None:
    corner = torch.randint(0, 2, (50, 6, 2)).float().requires_grad_()
    upstream = torch.randn(50, 6)
    relaxed, rounded = (bank(name, sampling, sampling_tau=0.7) for sampling in NOISY)
    if name == "difflogic":
        # rounded before interpolation: the gradient of the inputs is that of the gate
        got = torch.autograd.grad(rounded(corner), rounded.weight, upstream)
        wanted = torch.autograd.grad(relaxed(corner), relaxed.weight, upstream)
    else:
        got, wanted = gradients(rounded, corner, upstream), gradients(relaxed, corner, upstream)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().sum() > 0


@every_noisy_node
def test_sure_outputs_stay_finite(name: str, sampling: str) -> None:
    nodes = bank(name, sampling)
    with torch.no_grad():
        nodes.weight.mul_(1e4)
    x = torch.randint(0, 2, (50, 6, 2)).float().requires_grad_()
    y = nodes(x)
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(nodes, x, torch.ones_like(y)))
    assert nodes(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NODES)
def test_choices_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match="sampling=gumble_hard: must be one of soft, hard, gumbel_soft, gumbel_hard"):
        bank(name, "gumble_hard")
    with pytest.raises(
        ConfigError, match=r"^node\.sampling=gumble_hard: must be one of soft, .*Did you mean 'gumbel_h"
    ):
        schema.validate_part("node", {"name": name, "sampling": "gumble_hard"}, "node")
    with pytest.raises(ConfigError, match=r"^node\.sampling_tau=0: must be greater than 0"):
        schema.validate_part("node", {"name": name, "sampling_tau": 0}, "node")


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in NODES for value in REGISTRY.get_node(name).SCHEDULABLE],  # type: ignore[attr-defined]  # nodes are classes
)
def test_every_schedulable_value_acts_at_once(name: str, value: str) -> None:
    x = torch.rand(20, 6, 2)
    nodes = bank(name, "gumbel_soft")
    twin = copy.deepcopy(nodes)
    assert isinstance(getattr(nodes, value), float)
    setattr(nodes, value, 3 * getattr(nodes, value))
    assert not torch.allclose(nodes(x), twin(x))


@pytest.mark.parametrize("name", ["probabilistic", "warp", "difflogic"])
def test_a_temperature_that_plays_no_part_cannot_be_scheduled(name: str) -> None:
    assert "sampling_tau" in bank(name, "gumbel_soft").SCHEDULABLE
    assert "sampling_tau" not in bank(name, "soft").SCHEDULABLE
