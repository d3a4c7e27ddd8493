"""What holds for every registered layer with every registered node."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difflut_lab import REGISTRY
from difflut_lab.errors import ConfigError
from difflut_lab.layers import BaseLUTLayer, LayerConfig, freeze, soft
from difflut_lab.nodes import DWNNodes

# parts of the package: other tests of the same process register parts of their own
LAYERS, NODES = (
    [name for name in REGISTRY.names(kind) if REGISTRY.get(kind, name).__module__.startswith("difflut_lab.")]
    for kind in ("layer", "node")
)
AUGMENTED = LayerConfig(flip_probability=0.1, grad_stabilization="nodewise")

every_layer = pytest.mark.parametrize(("layer", "node"), [(layer, node) for layer in LAYERS for node in NODES])


def fan_in(node: str, n: int) -> int:
    return 2 if node == "difflogic" else n


def build(
    layer: str, node: str = "dwn", inputs: int = 40, outputs: int = 30, n: int | None = None, **options: Any
) -> BaseLUTLayer:
    n = fan_in(node, 4) if n is None else n
    built = REGISTRY.get_layer(layer)(input_size=inputs, output_size=outputs, node_type=node, n=n, **options)
    assert isinstance(built, BaseLUTLayer)
    return built


def bits(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).float()


def train(layer: nn.Module, steps: int = 3, inputs: int = 40) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(steps):
        y = layer(torch.rand(16, inputs, requires_grad=True))
        optimizer.zero_grad()
        (y - torch.rand_like(y)).square().sum().backward()
        optimizer.step()


def looked_up(table: Tensor, wiring: Tensor, x: Tensor) -> Tensor:
    """Table lookup with the routing written out: slot k is bit k of the address, -1 reads 0."""
    output = torch.empty(len(x), len(table), dtype=torch.bool)
    for node, slots in enumerate(wiring.tolist()):
        address = torch.zeros(len(x), dtype=torch.int64)
        for slot, source in enumerate(slots):
            if source >= 0:
                address += (x[:, source] >= 0.5).long() << slot
        output[:, node] = table[node][address]
    return output.to(x.dtype)


@every_layer
def test_the_public_form(layer: str, node: str) -> None:
    before, n = torch.random.get_rng_state(), fan_in(node, 6)
    built = REGISTRY.get_layer(layer)(
        input_size=512,
        output_size=256,
        node_type=node,
        n=n,
        node_kwargs=None,
        layer_config=LayerConfig(flip_probability=0.05, grad_stabilization="layerwise"),
        seed=42,
    )
    assert torch.equal(before, torch.random.get_rng_state())
    x = torch.randn(32, 512, requires_grad=True)
    y = built(x)
    y.square().sum().backward()
    assert y.shape == (32, 256) and torch.isfinite(y).all()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    for parameter in built.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
        assert (parameter.grad.flatten(1).abs().sum(dim=1) > 0).all()
    assert (built.input_size, built.output_size, built.n) == (512, 256, n)
    assert built.nodes.num_nodes == 256 and built.layer_config.flip_probability == 0.05
    assert f"input_size=512, output_size=256, n={n}" in repr(built)


@every_layer
def test_eval_is_the_truth_table_bit_for_bit(layer: str, node: str) -> None:
    built = build(layer, node, layer_config=AUGMENTED)
    train(built)
    built.eval()
    x = bits(200, 40)
    wiring, table = built.wiring(), built.nodes.truth_table()
    assert wiring.dtype == torch.int32 and wiring.shape == (30, built.n)
    wanted = looked_up(table, wiring, x)
    assert torch.equal(built(x), wanted)
    assert torch.equal(built.nodes(built.route(x)), wanted)
    assert 0 < wanted.mean() < 1
    # storage is feature-major, so that the next layer reads it as it is
    assert built(x).t().is_contiguous()


@every_layer
def test_frozen_is_what_eval_was(layer: str, node: str) -> None:
    built = build(layer, node, layer_config=AUGMENTED)
    train(built)
    x = bits(100, 40)
    wanted = built.eval()(x)
    built.train().freeze()
    assert built.is_frozen and built.nodes.is_frozen
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter))
    for training in (True, False):
        assert torch.equal(built.train(training)(x), wanted)
    with soft(built):
        assert torch.equal(built(x), wanted)
    assert not any(parameter.requires_grad for parameter in built.parameters())

    fresh = build(layer, node, seed=5)
    fresh.freeze()
    fresh.load_state_dict(built.state_dict())
    assert torch.equal(fresh.eval()(x), wanted)
    assert {"frozen_wiring", "nodes.frozen_table"} <= set(built.state_dict())


@every_layer
def test_state_dict_round_trip(layer: str, node: str) -> None:
    built = build(layer, node, layer_config=AUGMENTED)
    train(built)
    other = build(layer, node, layer_config=AUGMENTED, seed=9)
    other.nodes.seed = built.nodes.seed
    other._flip_seed = built._flip_seed
    train(other, steps=1)
    file = io.BytesIO()
    torch.save(built.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.rand(50, 40, requires_grad=True)
    for training in (True, False):
        first, second = built.train(training)(x), other.train(training)(x)
        assert torch.equal(first, second)
    # a wiring that was loaded must not meet the inverse of the one before
    upstream = torch.randn(50, 30)
    assert torch.equal(
        torch.autograd.grad(built.train()(x), x, upstream)[0], torch.autograd.grad(other.train()(x), x, upstream)[0]
    )


@every_layer
def test_copies_and_pickles(layer: str, node: str) -> None:
    built = build(layer, node, layer_config=AUGMENTED)
    train(built)
    x = torch.rand(20, 40)
    for other in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        for training in (True, False):
            state = copy.deepcopy(built.state_dict())
            assert torch.equal(built.train(training)(x), other.train(training)(x))
            built.load_state_dict(state)
        assert other.layer_config == built.layer_config


@every_layer
def test_to_float64(layer: str, node: str) -> None:
    built = build(layer, node).to(torch.float64)
    assert built.wiring().dtype == torch.int32
    x = torch.rand(10, 40, dtype=torch.float64, requires_grad=True)
    y = built(x)
    y.sum().backward()
    assert y.dtype == torch.float64 and x.grad is not None
    assert built.eval()(x).dtype == torch.float64


@every_layer
def test_seeds(layer: str, node: str) -> None:
    first, again, other = build(layer, node), build(layer, node), build(layer, node, seed=43)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(first.eval().wiring(), again.eval().wiring())
    assert not torch.equal(first.nodes.get_parameter("weight"), other.nodes.get_parameter("weight"))
    assert not torch.equal(first.wiring(), other.eval().wiring())


@every_layer
def test_soft(layer: str, node: str) -> None:
    first, second = build(layer, node, layer_config=AUGMENTED), build(layer, node, inputs=30)
    model = nn.Sequential(first, second, nn.BatchNorm1d(30))
    train(model)
    first.eval()
    plain = copy.deepcopy(model)
    for part in plain:
        if isinstance(part, BaseLUTLayer):
            part.layer_config = LayerConfig()
    x = torch.rand(12, 40, requires_grad=True)
    steps = int(first.flip_step)
    with soft(model):
        relaxed = model[:2](x)
        relaxed.sum().backward()
        assert not any(part.training for part in model.modules())
    assert x.grad is not None
    assert int(first.flip_step) == steps
    assert not first.training and second.training and model[2].training
    assert not first.nodes.soft and not second.nodes.soft
    assert torch.equal(relaxed, plain.train()[:2](x))
    with pytest.raises(ValueError, match="expects inputs"), soft(model):
        model(torch.rand(12, 41))
    assert second.training and not second.nodes.soft


@every_layer
def test_errors(layer: str, node: str) -> None:
    built = build(layer, node)
    for shape in ((3, 41), (40,), (2, 3, 40)):
        with pytest.raises(ValueError, match=rf"shape \(batch, 40\), got \({', '.join(map(str, shape))},?\)"):
            built(torch.rand(shape))
    with pytest.raises(TypeError, match="colour"):
        build(layer, node, colour=1)
    with pytest.raises(ConfigError, match=r"n=20: .*(1,048,576 entries|must be 2)"):
        build(layer, node, n=20)
    with pytest.raises(ConfigError, match="output_size=0"):
        build(layer, node, outputs=0)
    with pytest.raises(ConfigError, match="Unknown node 'dwm'. Did you mean 'dwn'"):
        build(layer, "dwm")


@every_layer
def test_small_and_empty_batches(layer: str, node: str) -> None:
    built = build(layer, node, layer_config=AUGMENTED)
    for batch in (0, 1):
        x = torch.rand(batch, 40, requires_grad=True)
        y = built.train()(x)
        y.sum().backward()
        assert y.shape == (batch, 30) and torch.isfinite(y).all()
        assert built.eval()(x).shape == (batch, 30)


@every_layer
def test_autocast_computes_in_float32(layer: str, node: str) -> None:
    built = build(layer, node)
    x = torch.rand(10, 40)
    wanted = built(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(built(x), wanted)


@every_layer
def test_validation_in_inference_mode_does_not_spoil_training(layer: str, node: str) -> None:
    built = build(layer, node)
    with torch.inference_mode():
        built.eval()(bits(5, 40))
    x = torch.rand(5, 40, requires_grad=True)
    with soft(built):
        built(x).sum().backward()
    built.train()(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_node_type_may_be_a_class_and_config_a_mapping() -> None:
    built = build("random_routing", layer_config={"grad_stabilization": "batchwise"}, node_kwargs={"beta": 0.5})
    assert built.layer_config == LayerConfig(grad_stabilization="batch")
    assert isinstance(built.nodes, DWNNodes) and built.nodes.beta == 0.5
    by_class = REGISTRY.get_layer("random_routing")(40, 30, DWNNodes, 4)
    assert torch.equal(by_class.nodes.weight, built.nodes.weight)
    with pytest.raises(ConfigError, match="layer_config.flip_prob"):
        build("random_routing", layer_config={"flip_prob": 0.1})


def test_freeze_a_model() -> None:
    model = nn.Sequential(build("learnable_routing"), build("random_routing", inputs=30))
    x = bits(50, 40)
    wanted = model.eval()(x)
    freeze(model)
    assert torch.equal(model.train()(x), wanted)
    freeze(model)


def test_wiring_changed_in_place_is_noticed() -> None:
    built = build("random_routing", "probabilistic")
    x = torch.rand(6, 40, requires_grad=True)
    built(x).sum().backward()
    with torch.no_grad():
        built.get_buffer("indices").copy_(torch.randint(0, 40, (30, 4)))
    gradient = torch.autograd.grad(built(x).sum(), x)[0]
    read = torch.zeros(40, dtype=torch.bool)
    read[built.wiring().flatten().long()] = True
    assert torch.equal(gradient.abs().sum(0) > 0, read)
    fresh = build("random_routing", "probabilistic")
    fresh.load_state_dict(built.state_dict())
    assert torch.equal(torch.autograd.grad(fresh(x).sum(), x)[0], gradient)


def test_a_wiring_written_anew_with_what_it_was_keeps_its_inverse() -> None:
    built = build("random_routing")
    kept = built._wiring()
    indices = built.get_buffer("indices")
    with torch.no_grad():
        indices.copy_(indices.clone())
    assert built._wiring() is kept
    built.load_state_dict(copy.deepcopy(built.state_dict()))
    assert built._wiring() is kept
    indices[0, 0] = (indices[0, 0] + 1) % 40
    assert built._wiring() is not kept and torch.equal(built._wiring().indices, indices)


def test_a_wiring_of_another_network_does_not_load() -> None:
    state = build("random_routing").state_dict()
    state["indices"][3, 1] = 40
    model = nn.Sequential(build("random_routing"))
    with pytest.raises(RuntimeError, match="While loading the wiring of 0: .*from -1 to 39, found 0 to 40"):
        model.load_state_dict({f"0.{key}": value for key, value in state.items()})


@every_layer
def test_integer_and_boolean_inputs(layer: str, node: str) -> None:
    built = build(layer, node)
    x = torch.randint(0, 2, (30, 40))
    for training in (True, False):
        wanted = built.train(training)(x.float())
        for dtype in (torch.bool, torch.uint8, torch.int64):
            assert torch.equal(built(x.to(dtype)), wanted)


@every_layer
def test_gradients_are_accumulated_over_forwards(layer: str, node: str) -> None:
    built = build(layer, node, layer_config=AUGMENTED)
    x = torch.rand(10, 40, requires_grad=True)
    first, second = built(x), built(x)
    wanted = [
        torch.autograd.grad(y.sum(), built.nodes.get_parameter("weight"), retain_graph=True)[0] for y in (first, second)
    ]
    (first.sum() + second.sum()).backward()
    torch.testing.assert_close(built.nodes.get_parameter("weight").grad, wanted[0] + wanted[1])
