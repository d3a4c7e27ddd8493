"""Bit flips, measured: how many, how independent, with which gradient, and when."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab import REGISTRY
from difflut_lab.layers import BaseLUTLayer, LayerConfig
from difflut_lab.layers.random_routing import RandomRouting
from difflut_lab.nodes import TableNodes
from difflut_lab.ops import Flips, flip_mask

LAYERS = ["random_routing", "learnable_routing", "feature_wise_groups"]
NODES = REGISTRY.names("node")
TABLES = [node for node in NODES if issubclass(REGISTRY.get_node(node), TableNodes)]  # type: ignore[arg-type]  # classes
P = 0.1


def identity(layer: str, node: str, inputs: int = 50, outputs: int = 400, **config: Any) -> BaseLUTLayer:
    """A layer whose nodes hand on their first input, if they can their only one: its outputs are what they read."""
    built = REGISTRY.get_layer(layer)(
        inputs,
        outputs,
        node,
        fan_in(node, 1),
        node_kwargs={"initializer": {"name": "residual", "clarity": 50.0}},
        layer_config=LayerConfig(**config),
    )
    assert isinstance(built, BaseLUTLayer)
    return built


def fan_in(node: str, n: int) -> int:
    return 2 if node == "difflogic" else n


def flipped(built: BaseLUTLayer, x: Tensor) -> Tensor:
    """Which routed bits one training forward flips, ``(B, N)``."""
    training = built.training
    wanted = built.eval()(x)
    return built.train(training)(x).round() != wanted


def spread(p: float, count: int) -> float:
    """Five standard deviations of the mean of count draws."""
    return 5 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("node", TABLES)
@pytest.mark.parametrize("layer", LAYERS)
def test_fraction_and_independence_in_the_first_and_the_tenth_step(layer: str, node: str) -> None:
    built = identity(layer, node, flip_probability=P)
    x = torch.randint(0, 2, (256, 50)).float()
    masks = [flipped(built, x) for _ in range(10)]
    assert int(built.flip_step) == 10
    for mask in (masks[0], masks[9]):
        assert abs(mask.float().mean() - P) < spread(P, mask.numel())
        assert (mask.float().mean(0) - P).abs().max() < 1.2 * spread(P, 256)
        assert (mask.float().mean(1) - P).abs().max() < 1.2 * spread(P, 400)
    first, tenth = masks[0], masks[9]
    pairs = {
        "steps": (first, tenth),
        "neighbouring samples": (first[1:], first[:-1]),
        "samples eight apart": (first[8:], first[:-8]),
        "neighbouring nodes": (first[:, 1:], first[:, :-1]),
    }
    wiring = built.eval().wiring()[:, 0]
    same = [(a, b) for a in range(100) for b in range(a) if wiring[a] == wiring[b]]
    left, right = (list(side) for side in zip(*same, strict=True))
    pairs["nodes that read the same input"] = (first[:, left], first[:, right])
    for what, (one, other) in pairs.items():
        both = (one & other).float()
        assert abs(both.mean() - P**2) < spread(P**2, both.numel()), what


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_flips_in_eval_or_without_probability(layer: str) -> None:
    x = torch.randint(0, 2, (64, 50)).float()
    built = identity(layer, "dwn", flip_probability=0.5)
    assert flipped(built, x).any()
    step = int(built.flip_step)
    built.eval()
    assert torch.equal(built(x), built(x)) and not flipped(built, x).any()
    assert int(built.flip_step) == step
    built.train()
    built.layer_config = LayerConfig()
    assert not flipped(built, x).any()
    built.layer_config = LayerConfig(flip_probability=1)
    assert flipped(built, x).all()


def test_layers_flip_different_inputs() -> None:
    x = torch.randint(0, 2, (64, 50)).float()
    first, second = (identity("random_routing", "dwn", flip_probability=P) for _ in range(2))
    assert torch.equal(flipped(first, x), flipped(second, x))
    second.layer_index = 1
    one, other = flipped(first, x), flipped(second, x)
    assert abs((one & other).float().mean() - P**2) < spread(P**2, one.numel())
    other_seed = REGISTRY.get_layer("random_routing")(50, 400, "dwn", 1, layer_config=first.layer_config, seed=1)
    other_seed.load_state_dict(first.state_dict())
    assert not torch.equal(flipped(first, x), flipped(other_seed, x))


def test_ranks_flip_their_part_of_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(0, 2, (24, 50)).float()
    built = identity("random_routing", "dwn", flip_probability=P)
    state = {key: value.clone() for key, value in built.state_dict().items()}
    whole = flipped(built, x)
    parts = []
    for rank in range(2):
        built.load_state_dict(state)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(flipped(built, x[12 * rank : 12 * rank + 12]))
    assert torch.equal(torch.cat(parts), whole)


class Routed(RandomRouting):
    """The same layer without fusion: ``route`` is overridden, flips act on what it returns."""

    def route(self, x: Tensor) -> Tensor:
        return super().route(x)


class Unfused(RandomRouting):
    """The same layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.nodes(self._apply_bit_flip(self.route(x)))
        return self._apply_gradient_stabilization(y)


@pytest.mark.parametrize("other", [Routed, Unfused])
@pytest.mark.parametrize("node", NODES)
def test_public_flip_is_the_fused_flip(node: str, other: type[BaseLUTLayer]) -> None:
    config = LayerConfig(flip_probability=0.3, grad_stabilization="batch")
    n = fan_in(node, 3)
    layers = [cls(20, 15, node, n, layer_config=config, seed=3) for cls in (RandomRouting, other)]
    for _ in range(3):
        x = torch.rand(21, 20, requires_grad=True)
        upstream = torch.randn(21, 15)
        outputs = [layer(x) for layer in layers]
        torch.testing.assert_close(outputs[1], outputs[0])
        gradients = [
            torch.autograd.grad(y, [x, *layer.parameters()], upstream) for layer, y in zip(layers, outputs, strict=True)
        ]
        for wanted, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted)
    assert [int(layer.flip_step) for layer in layers] == [3, 3]


def test_public_flip_is_the_documented_stream_with_gradient_one() -> None:
    layer = RandomRouting(20, 15, "dwn", 3, layer_config=LayerConfig(flip_probability=0.25), seed=3)
    layer.layer_index = 4
    routed = torch.rand(13, 15, 3, requires_grad=True)
    for step in range(2):
        flips = Flips(probability=0.25, seed=layer._flip_seed, step=torch.tensor(step), layer=4)
        mask = flip_mask(flips, 15, 3, 13).permute(2, 0, 1)
        y = layer._apply_bit_flip(routed)
        assert torch.equal(y, torch.where(mask, 1 - routed, routed))
        assert torch.equal(torch.autograd.grad(y.sum(), routed)[0], torch.ones_like(routed))
    assert torch.equal(layer._apply_bit_flip(routed > 0.5).float(), layer_flips_again(layer, routed))
    one = layer._apply_bit_flip(torch.zeros(3000, 3))
    assert one.shape == (3000, 3) and abs(one.mean() - 0.25) < spread(0.25, 9000)
    layer.eval()
    assert layer._apply_bit_flip(routed) is routed


def layer_flips_again(layer: BaseLUTLayer, routed: Tensor) -> Tensor:
    layer.flip_step -= 1
    return layer._apply_bit_flip((routed > 0.5).float())


@pytest.mark.parametrize("node", NODES)
def test_constant_zeros_never_flip(node: str) -> None:
    class Padded(BaseLUTLayer):
        def wiring(self) -> Tensor:
            return torch.full((self.output_size, self.n), -1, dtype=torch.int32)

    n = fan_in(node, 3)
    layer = Padded(4, 50, node, n, layer_config=LayerConfig(flip_probability=0.9))
    x = torch.rand(20, 4, requires_grad=True)
    assert torch.equal(layer._apply_bit_flip(torch.zeros(20, 50, n)), torch.zeros(20, 50, n))
    y = layer(x)
    # torch's sigmoid may round the last elements of a tensor in another way than those before
    torch.testing.assert_close(y, y[:1].expand_as(y), rtol=1e-6, atol=0)
    assert torch.autograd.grad(y.sum(), x)[0].count_nonzero() == 0
    assert torch.equal(layer.eval()(x), layer.nodes.truth_table()[:, 0].float().expand(20, -1))


def test_backward_uses_the_flips_of_its_own_forward() -> None:
    layer = RandomRouting(20, 15, "probabilistic", 3, layer_config=LayerConfig(flip_probability=0.5))
    x = torch.rand(9, 20, requires_grad=True)
    upstream = torch.randn(9, 15)
    wanted = torch.autograd.grad(layer(x), x, upstream)[0]
    layer.flip_step.zero_()
    y = layer(x)
    layer(x)
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], wanted)
