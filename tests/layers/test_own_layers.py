"""Layers written by users: the forms that the public interface allows."""

from __future__ import annotations

import copy
import pickle
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difflut_lab import REGISTRY, register_layer, schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers import BaseLUTLayer, LayerConfig, RandomRouting
from difflut_lab.layers.stabilization import stabilized
from difflut_lab.nodes import LUTNodes

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_layers.py"
NODES = ["dwn", "probabilistic"]


class ByNode(BaseLUTLayer):
    """Routing with a buffer of its own, node by node."""

    idx: Tensor

    def __init__(self, *args: Any, foo: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("idx", (torch.arange(self.output_size)[:, None] + foo * torch.arange(self.n)) % 20)

    def forward(self, x: Tensor) -> Tensor:
        routed = self._apply_bit_flip(x[:, self.idx])
        output = torch.cat([self.nodes[j](routed[:, j]) for j in range(self.output_size)], dim=1)
        return self._apply_gradient_stabilization(output)


class Forgetful(BaseLUTLayer):
    """Neither flips nor stabilises."""

    def forward(self, x: Tensor) -> Tensor:
        return self.nodes(x[:, : self.n].unsqueeze(1).expand(-1, self.output_size, -1))


class ForgetfulToo(Forgetful):
    pass


class Wrapped(RandomRouting):
    """Does something of its own and leaves the rest to its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


def gradient_at_nodes(layer: BaseLUTLayer, x: Tensor, upstream: Tensor) -> Tensor:
    """What reaches the outputs of the bank when the layer's output gets the upstream gradient."""
    weight = layer.nodes.get_parameter("weight")
    seen: list[Tensor] = []

    def record(bank: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(seen.append)

    with layer.nodes.register_forward_hook(record):
        layer(x).backward(upstream)
    assert weight.grad is not None
    return torch.cat(seen[::-1], dim=1) if len(seen) > 1 else seen[0]


@pytest.mark.parametrize("node", NODES)
def test_node_by_node_equals_the_same_wiring(node: str) -> None:
    class ByWiring(ByNode):
        def wiring(self) -> Tensor:
            return self.idx.int()

        forward = BaseLUTLayer.forward

    config = LayerConfig(flip_probability=0.2, grad_stabilization="nodewise")
    slow, fast = (cls(20, 12, node, 3, layer_config=config) for cls in (ByNode, ByWiring))
    for _ in range(2):
        x = torch.rand(16, 20, requires_grad=True)
        upstream = torch.randn(16, 12)
        outputs = [layer(x) for layer in (slow, fast)]
        torch.testing.assert_close(outputs[0], outputs[1])
        gradients = [
            torch.autograd.grad(y, [x, *layer.parameters()], upstream)
            for layer, y in zip((slow, fast), outputs, strict=True)
        ]
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    bits = torch.randint(0, 2, (30, 20)).float()
    assert torch.equal(slow.eval()(bits), fast.eval()(bits))


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("node", NODES)
def test_node_by_node_trains_and_moves(node: str) -> None:
    layer = REGISTRY.get_layer("test_by_node")(20, 8, node, 3, foo=2)
    assert torch.equal(layer.idx[0], torch.tensor([0, 2, 4]))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    x = torch.randint(0, 2, (64, 20)).float()
    target = x[:, layer.idx[:, 1]]
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    layer.double()
    assert layer(x.double()).dtype == torch.float64
    assert layer.to("meta").idx.is_meta and layer.nodes.get_parameter("weight").is_meta
    assert schema.validate_part("layer", {"name": "test_by_node"}, "layer")["foo"] == 5
    with pytest.raises(ConfigError, match=r"'layer.fooo'.* Did you mean 'layer.foo'"):
        schema.validate_part("layer", {"name": "test_by_node", "fooo": 5}, "layer")


@pytest.mark.parametrize("copied", [False, True])
def test_forgotten_stabilization_is_made_good_in_every_step(copied: bool) -> None:
    config = LayerConfig(grad_stabilization="layerwise")
    layer: BaseLUTLayer = Forgetful(20, 8, "probabilistic", 3, layer_config=config)
    if copied:
        layer = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    for _ in range(10):
        upstream = 100 * torch.randn(16, 8)
        gradient = gradient_at_nodes(layer, torch.rand(16, 20), upstream)
        torch.testing.assert_close(gradient, stabilized(upstream, config))
    layer.layer_config = LayerConfig()
    assert torch.equal(gradient_at_nodes(layer, torch.rand(16, 20), upstream), upstream)
    layer.layer_config = config
    layer.eval()
    layer.nodes.soft = True
    assert torch.equal(gradient_at_nodes(layer, torch.rand(16, 20), upstream), upstream)


@pytest.mark.parametrize("cls", [ByNode, Wrapped])
def test_stabilization_is_not_done_twice(cls: type[BaseLUTLayer]) -> None:
    config = LayerConfig(grad_stabilization="batch", grad_target_std=3.0, grad_subtract_mean=True)
    layer = cls(20, 12, "probabilistic", 3, layer_config=config)
    x = torch.rand(16, 20)
    upstream = torch.randn(16, 12) + 1
    y = layer(x)
    weight = layer.nodes.get_parameter("weight")
    got = torch.autograd.grad(y, weight, upstream)[0]
    layer.layer_config = LayerConfig()
    wanted = torch.autograd.grad(layer(x), weight, stabilized(upstream, config))[0]
    # twice would change nothing in the gradient, so count the calls too
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    layer.layer_config = config
    node, count = layer(x).grad_fn, 0
    while node is not None:
        count += "Stabilize" in node.name()
        node = next((follower for follower, _ in node.next_functions if follower is not None), None)
    assert count == 1


def test_one_warning_where_nothing_flips() -> None:
    config = LayerConfig(flip_probability=0.1)
    layers = [ForgetfulToo(20, 8, "dwn", 3, layer_config=config) for _ in range(2)]
    x = torch.rand(4, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ForgetfulToo(20, 8, "dwn", 3)(x)
        layers[0].eval()(x)
        ByNode(20, 8, "dwn", 3, layer_config=config)(x)
        Wrapped(20, 8, "dwn", 3, layer_config=config)(x)
        RandomRouting(20, 8, "dwn", 3, layer_config=config)(x)
    layers[0].train()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for layer in layers * 2:
            layer(x)
    (warning,) = seen
    assert "ForgetfulToo overrides forward" in str(warning.message)
    assert "flip_probability=0.1 has no effect" in str(warning.message)


def test_steps_count_once_per_training_forward() -> None:
    config = LayerConfig(flip_probability=0.1)
    for cls in (ByNode, Wrapped):
        layer = cls(20, 8, "dwn", 3, layer_config=config)
        for _ in range(3):
            layer(torch.rand(4, 20))
        layer.eval()(torch.rand(4, 20))
        assert int(layer.flip_step) == 3


def test_a_layer_without_wiring_says_so() -> None:
    class Empty(BaseLUTLayer):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must supply wiring\(\) or override route\(x\)"):
        Empty(20, 8)(torch.rand(4, 20))


@pytest.mark.parametrize(
    ("wiring", "message"),
    [
        (torch.zeros(8, 4, dtype=torch.int32), r"must have shape \(8, 3\), got \(8, 4\)"),
        (torch.full((8, 3), 20, dtype=torch.int32), "from -1 to 19"),
        (torch.zeros(8, 3), "int32"),
    ],
)
def test_wrong_wirings(wiring: Tensor, message: str) -> None:
    class Wrong(BaseLUTLayer):
        def wiring(self) -> Tensor:
            return wiring

    with pytest.raises(ValueError, match=message):
        Wrong(20, 8, "dwn", 3)(torch.rand(4, 20))


def test_a_wiring_made_anew_in_every_call() -> None:
    class Anew(BaseLUTLayer):
        shift = 0

        def wiring(self) -> Tensor:
            return (torch.arange(24, dtype=torch.int32).view(8, 3) + self.shift) % 20

    layer = Anew(20, 8, "probabilistic", 3)
    x = torch.rand(4, 20, requires_grad=True)
    assert layer._wiring() is layer._wiring()
    kept = torch.autograd.grad(layer(x).sum(), x)[0]
    layer.shift = 1
    moved = torch.autograd.grad(layer(x.roll(1, 1)).sum(), x)[0]
    torch.testing.assert_close(moved, kept)
    layer.freeze()
    layer.shift = 2
    assert torch.equal(layer._wiring().indices, (torch.arange(24, dtype=torch.int32).view(8, 3) + 1) % 20)


def test_a_bank_that_cannot_fuse() -> None:
    class Product(LUTNodes):
        def __init__(self, num_nodes: int, n: int = 6, *, seed: int = 42) -> None:
            super().__init__(num_nodes, n, seed=seed)
            self.scale = nn.Parameter(torch.ones(num_nodes))

        def relaxed(self, routed: Tensor) -> Tensor:
            return routed.prod(dim=2) * self.scale

    config = LayerConfig(flip_probability=0.5, grad_stabilization="batch")
    layer = RandomRouting(20, 8, Product, 3, layer_config=config)
    x = torch.randint(0, 2, (40, 20)).float()
    wanted = x[:, layer.wiring()].prod(dim=2)
    assert not torch.equal(layer(x), wanted)
    layer(x.requires_grad_()).sum().backward()
    assert torch.equal(layer.eval()(x), wanted)


@pytest.fixture
def _registered() -> Iterator[None]:
    register_layer("test_by_node")(ByNode)
    yield
    REGISTRY._parts["layer"].pop("test_by_node")


@pytest.fixture
def _example() -> Iterator[None]:
    sys.modules.pop("my_layers", None)
    runpy.run_path(str(EXAMPLE), run_name="my_layers")
    yield
    for name in ("my_layer", "my_custom_layer"):
        REGISTRY._parts["layer"].pop(name)


@pytest.mark.usefixtures("_example")
def test_the_example() -> None:
    layer = REGISTRY.get_layer("my_layer")(100, 30, "dwn", 4, span=10)
    wiring = layer.wiring()
    assert (wiring.max(dim=1).values - wiring.min(dim=1).values < 10).all()
    assert wiring.min() >= 0 and wiring[0].max() < 10 and wiring[-1].min() >= 90
    assert layer(torch.rand(5, 100)).shape == (5, 30)
    assert REGISTRY.get_layer("my_layer")(8, 30, "dwn", 4)(torch.rand(5, 8)).shape == (5, 30)
    with pytest.raises(ConfigError, match=r"layer\.span=0: must be at least 1"):
        schema.validate_part("layer", {"name": "my_layer", "span": 0}, "layer")
    custom = REGISTRY.get_layer("my_custom_layer")(100, 30, "dwn", 4, foo=7)
    assert custom(torch.rand(5, 100)).shape == (5, 30)
    assert custom.idx[3].tolist() == [3, 10, 17, 24]
