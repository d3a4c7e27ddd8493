"""Packed networks give what their trained form gives in eval mode, in a sixteenth of its memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from difflut_lab import REGISTRY
from difflut_lab.errors import ConfigError
from difflut_lab.ops.ternary_linear import quantize_activations
from difflut_lab.ternary import (
    Quantizer,
    Ternary,
    TernaryConv2d,
    TernaryDepthwiseSeparable,
    TernaryLayer,
    TernaryLinear,
    TernaryResidualBlock,
)
from difflut_lab.ternary.packed.layers import PackedLayer
from difflut_lab.ternary.packing import FoldedBatchNorm, PackError, foldable, pack

QUANTIZERS = sorted(set(REGISTRY.names("quantizer")) - {"none"})
GRANULARITIES = ["tensor", "channel", "group"]
MODELS: dict[str, dict[str, Any]] = {
    "ternary_mlp": {"widths": [20, 12, 12]},
    "ternary_resnet": {"depth": 20, "widths": [4, 8, 8], "blocks": [1, 1, 1], "stem": "cifar"},
    "ternary_vit": {"patch_size": 4, "d_model": 12, "num_heads": 3, "depth": 2},
    "ternary_lstm": {"hidden_size": 12, "num_layers": 2},
}
IMAGE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def quantizer(name: str, granularity: str = "channel") -> dict[str, Any]:
    if name == "fixed":
        return {"name": name, "threshold": 0.1}
    return {"name": name, "granularity": granularity} | ({"group_size": 3} if granularity == "group" else {})


def trained(module: nn.Module) -> nn.Module:
    """What a training leaves: batch norms with statistics and factors of both signs, quantizers that have learned."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            if part.running_mean is not None and part.running_var is not None:
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
        elif isinstance(part, Quantizer):
            for parameter in part.parameters():
                parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
    return module


def build(name: str, **options: Any) -> nn.Module:
    return trained(REGISTRY.get_model(name)(**{"input_shape": IMAGE, "num_classes": 10, **MODELS[name], **options}))


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}


def ternary_layers(model: nn.Module) -> dict[str, TernaryLayer]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLayer)}
    return {name: layer for name, layer in layers.items() if not layer.is_float}


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Equal to 1e-5 of the largest value."""
    assert found.shape == wanted.shape and not found.requires_grad
    wanted = wanted.detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


LAYERS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": (TernaryLinear, (37, 11), {}, (5, 37)),
    "linear_of_sequences": (TernaryLinear, (16, 4), {"bias": False}, (2, 3, 16)),
    "linear_of_a_vector": (TernaryLinear, (7, 3), {}, (7,)),
    "linear_with_ternary_bias": (TernaryLinear, (20, 9), {"bias_quantizer": "twn"}, (4, 20)),
    "conv": (TernaryConv2d, (5, 7, 3), {}, (2, 5, 6, 7)),
    "conv_stride_padding": (TernaryConv2d, (4, 6, 3, 2, 1), {"bias": False}, (2, 4, 7, 6)),
    "conv_of_a_rectangle": (TernaryConv2d, (3, 4, (3, 2), (1, 2), (0, 1)), {}, (2, 3, 5, 6)),
    "conv_1x1": (TernaryConv2d, (18, 5, 1), {}, (2, 18, 3, 3)),
    "conv_groups": (TernaryConv2d, (8, 6, 3, 1, 1), {"groups": 2}, (2, 8, 5, 5)),
    "conv_depthwise": (TernaryConv2d, (6, 6, 3, 1, 1), {"groups": 6, "bias": False}, (2, 6, 5, 5)),
}


def layer_of(kind: str, **options: Any) -> tuple[TernaryLayer, Tensor]:
    layer_class, arguments, own, shape = LAYERS[kind]
    layer = layer_class(*arguments, **own, **options)
    trained(layer)
    return layer, torch.randn(shape)


def packed_layer(layer: TernaryLayer, **options: Any) -> PackedLayer:
    packed = pack(layer, **options)
    assert isinstance(packed, PackedLayer)
    return packed


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_packed_layer_gives_what_the_layer_gives(name: str, granularity: str, kind: str, bits: int | None) -> None:
    layer, x = layer_of(kind, quantizer=quantizer(name, granularity), activation_bits=bits)
    packed = packed_layer(layer)
    assert_near(packed(x), layer.eval()(x))
    there, here = layer.quantized(), packed.quantized()
    assert torch.equal(here.codes, there.codes)
    assert torch.equal(here.values(), there.values())


@pytest.mark.parametrize("kind", LAYERS)
def test_sums_over_8_bit_activations_are_exact(kind: str) -> None:
    layer, x = layer_of(kind, activation_bits=8)
    packed = packed_layer(layer)
    codes = layer.quantized().codes
    dims = (-1,) if isinstance(layer, TernaryLinear) else (-3, -2, -1)
    levels, _ = quantize_activations(x, dims)
    # these have step 1, and with scale 1 outputs are the sums
    packed.scale.fill_(1)
    packed.bias = None
    if isinstance(layer, TernaryConv2d):
        sums = functional.conv2d(
            levels.double(), codes.double(), None, layer.stride, layer.padding, groups=layer.groups
        )
    else:
        sums = functional.linear(levels.double(), codes.double())
    assert sums.any()
    assert torch.equal(packed(levels).double(), sums)


def test_two_scales_survive() -> None:
    layer = TernaryLinear(500, 4, quantizer="ttq")
    layer.quantizer.load_state_dict(
        {
            "log_positive": torch.tensor([[0.5], [1.0], [2.0], [3.0]]).log(),
            "log_negative": torch.tensor([[1.5], [1.0], [0.5], [1.0]]).log(),
        }
    )
    values = packed_layer(layer).quantized().values()
    wanted = [[-1.5, 0, 0.5], [-1, 0, 1], [-0.5, 0, 2], [-1, 0, 3]]
    assert [sorted(set(row)) for row in values.tolist()] == [pytest.approx(row) for row in wanted]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv_stride_padding", "conv_groups", "conv_depthwise"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_batch_norm_is_folded_and_leaves_the_codes(
    name: str, granularity: str, kind: str, affine: bool, bits: int | None
) -> None:
    layer, x = layer_of(kind, quantizer=quantizer(name, granularity), activation_bits=bits)
    outputs = len(layer.weight)
    norm = nn.BatchNorm2d(outputs, affine=affine) if x.dim() == 4 else nn.BatchNorm1d(outputs, affine=affine)
    if affine:
        trained(norm)
    model = nn.Sequential(layer, norm)
    packed = pack(model)
    assert_near(packed(x), model.eval()(x))
    assert norms(packed) == []
    assert torch.equal(packed_layers(packed)["0"].quantized().codes, layer.quantized().codes)


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


@pytest.mark.parametrize("conv", ["conv2d", "depthwise_separable"])
def test_batch_norms_of_residual_blocks_are_folded(conv: Any) -> None:
    block = trained(TernaryResidualBlock(4, 8, 2, conv=conv))
    x = torch.randn(2, 4, 8, 8)
    packed = pack(block)
    assert norms(packed) == []
    assert_near(packed(x), block.eval()(x))


class Own(nn.Module):
    """A user's own module: a batch norm that may be folded, and one that reads a sum."""

    FOLDABLE = (("body.convs", "norm1"),)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"convs": TernaryDepthwiseSeparable(4, 4, 3, 1, 1)})
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = TernaryConv2d(4, 4, 1)
        self.norm2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.body["convs"](x))
        return self.norm2(x + self.conv2(x))


def test_own_modules_say_which_batch_norms_may_be_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = trained(Own())
    x = torch.randn(2, 4, 5, 5)
    packed = pack(model)
    assert norms(packed) == ["norm2"]
    assert_near(packed(x), model.eval()(x))
    monkeypatch.setattr(Own, "FOLDABLE", (("conv1", "norm1"),))
    with pytest.raises(PackError, match=r"The model, a Own, has no 'conv1', which its FOLDABLE names"):
        pack(model)


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * self[0](x))


def shared() -> nn.Module:
    conv = TernaryConv2d(4, 4, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.ReLU(), conv, nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(TernaryConv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(TernaryConv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(TernaryConv2d(4, 4, 1, quantizer="none"), nn.BatchNorm2d(4), TernaryConv2d(4, 4, 1)),
        nn.Sequential(TernaryConv2d(4, 4, 1), nn.GroupNorm(2, 4)),
        nn.Sequential(nn.Flatten(2), TernaryLinear(25, 5), nn.BatchNorm1d(4)),
        Doubled(TernaryConv2d(4, 4, 1), nn.BatchNorm2d(4)),
        shared(),
    ],
    ids=[
        "not next",
        "no statistics",
        "float layer",
        "another norm",
        "channels before features",
        "own forward",
        "shared layer",
    ],
)
def test_other_norms_stay(model: nn.Module) -> None:
    for part in model.modules():
        if (
            isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)
            and part.running_mean is not None
            and part.running_var is not None
        ):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    packed = pack(model)
    assert norms(packed) == norms(model)
    x = torch.randn(3, 4, 5, 5)
    assert_near(packed(x), model.eval()(x))


def test_a_layer_that_stands_in_two_places_is_packed_once() -> None:
    packed = pack(shared())
    assert isinstance(packed, nn.Sequential)
    assert packed[0] is packed[2] is packed[4]


def test_a_folded_linear_layer_refuses_what_the_batch_norm_took_otherwise() -> None:
    model = nn.Sequential(TernaryLinear(6, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"needs inputs \(B, I\), not \(2, 4, 6\)"):
        pack(model)(torch.randn(2, 4, 6))


@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_packed_model_gives_what_the_model_gives(model: str, name: str, granularity: str) -> None:
    network = build(model, quantizer=quantizer(name, granularity))
    x = torch.randn(8, *IMAGE)
    packed = pack(network)
    assert_near(packed(x), network.eval()(x))
    assert set(packed_layers(packed)) == set(ternary_layers(network))


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((model, {"quantize_first": True, "quantize_last": True}) for model in MODELS),
    ("ternary_mlp", {"activation": "learnable_ternary"}),
    ("ternary_resnet", {"activation": "ternary"}),
    ("ternary_resnet", {"conv": "depthwise_separable"}),
    ("ternary_resnet", {"depth": 50, "widths": [4, 4, 8, 8], "blocks": [1, 1, 1, 1]}),
]


@pytest.mark.parametrize(("model", "options"), VARIANTS, ids=str)
def test_variants_of_models(model: str, options: dict[str, Any]) -> None:
    network = build(model, quantizer="ttq", **options)
    x = torch.randn(8, *IMAGE)
    assert_near(pack(network)(x), network.eval()(x))


@pytest.mark.parametrize("model", MODELS)
def test_models_with_8_bit_activations(model: str) -> None:
    # a value between two levels may be rounded either way: each layer is compared on its own, with the same inputs
    network = build(model, activation_bits=8).eval()
    packed = pack(network)
    layers, norm_of = ternary_layers(network), foldable(network)
    met = set()

    def compare(name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        wanted = layers[name](inputs[0])
        norm = norm_of.get(layers[name])
        assert_near(output, wanted if norm is None else norm(wanted))
        met.add(name)

    for name, layer in packed_layers(packed).items():
        layer.register_forward_hook(partial(compare, name))
    packed(torch.randn(8, *IMAGE))
    assert met == set(layers)


@pytest.mark.parametrize("model", MODELS)
def test_float_weights_are_gone(model: str) -> None:
    network = build(model, quantizer="lsq", quantize_first=True, quantize_last=True)
    packed = pack(network)
    layers = packed_layers(packed)
    for name, layer in ternary_layers(network).items():
        for tensors in (layers[name].state_dict(), dict(layers[name].named_buffers())):
            assert all(tensor.numel() < layer.weight.numel() for tensor in tensors.values())
    assert not list(nn.ModuleList(layers.values()).parameters())
    assert not any(isinstance(module, TernaryLayer | Quantizer) for module in packed.modules())


@pytest.mark.parametrize(("storage", "bits"), [("2bit", 2), ("base3", 1.6)])
def test_size(storage: Any, bits: float) -> None:
    layer = TernaryConv2d(64, 128, 3)
    packed = pack(layer, storage=storage)
    wanted = bits / 32 * layer.weight.nbytes + 2 * 128 * 4
    assert sum(tensor.nbytes for tensor in packed.state_dict().values()) == pytest.approx(wanted, rel=0.01)
    assert sum(tensor.nbytes for tensor in packed.buffers()) < layer.weight.nbytes / 15


def test_packing_leaves_the_model_and_its_modes_alone() -> None:
    network = build("ternary_mlp", quantizer="stochastic", layer_config={"flip_probability": 0.3}).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    packed = pack(network)
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    x = torch.randn(4, *IMAGE)
    # codes of eval mode, without draws and flips
    assert_near(packed(x), network.eval()(x))
    assert not any(module.training for module in packed.modules())
    assert not any(parameter.requires_grad for parameter in packed.parameters())


def test_packed_layers_have_no_training_mode() -> None:
    packed = pack(build("ternary_mlp"))
    packed.train()
    assert not any(layer.training for layer in packed_layers(packed).values())


def test_what_is_packed_cannot_be_packed() -> None:
    packed = pack(build("ternary_mlp"))
    with pytest.raises(PackError, match=r"Layer 'layers.3' is packed already"):
        pack(packed)
    with pytest.raises(PackError, match=r"The model is packed already"):
        pack(pack(TernaryLinear(4, 4)))


def test_there_must_be_something_to_pack() -> None:
    with pytest.raises(PackError, match=r"This TernaryMLP holds no ternary layers"):
        pack(build("ternary_mlp", quantizer="none"))
    with pytest.raises(ConfigError, match=r"storage=3bit: must be one of 2bit, base3"):
        pack(TernaryLinear(4, 4), storage="3bit")  # type: ignore[arg-type]


def test_a_layer_of_zeros_is_named() -> None:
    network = build("ternary_mlp")
    layer = network.get_submodule("layers.3")
    assert isinstance(layer, TernaryLinear)
    nn.init.zeros_(layer.weight)
    with pytest.raises(PackError, match=r"Layer 'layers.3': every code is 0"):
        pack(network)


class Squared(TernaryLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def test_a_layer_with_another_forward_is_refused() -> None:
    with pytest.raises(PackError, match=r"Layer '1' is a Squared, which has no packed form"):
        pack(nn.Sequential(TernaryLinear(4, 4), Squared(4, 4)))


class PerWeight(Quantizer):
    """A quantizer whose weights have a scale each."""

    def quantize(self, weight: Tensor, generator: torch.Generator | None) -> Ternary:
        return Ternary(torch.sign(weight), weight.abs(), torch.zeros_like(weight))


def test_scales_of_an_own_quantizer() -> None:
    layer, x = TernaryConv2d(5, 3, 1, quantizer=PerWeight()), torch.randn(2, 5, 4, 4)
    assert_near(pack(layer)(x), layer.eval()(x))
    with pytest.raises(PackError, match=r"The model: weights of one output and input channel have several scales"):
        pack(TernaryConv2d(5, 3, 2, quantizer=PerWeight()))


@pytest.mark.parametrize("storage", ["2bit", "base3"])
def test_either_storage_loads_into_either(storage: Any) -> None:
    layer = TernaryConv2d(5, 7, 3)
    state = pack(layer, storage=storage).state_dict()
    assert state["codes"].dtype == {"2bit": torch.int32, "base3": torch.uint8}[storage]
    for other in ("2bit", "base3"):
        loaded = packed_layer(TernaryConv2d(5, 7, 3, seed=7), storage=other)
        loaded.load_state_dict(state)
        assert torch.equal(loaded.quantized().codes, layer.quantized().codes)


def test_the_first_batch_norm_of_a_resnet_is_folded_where_its_convolution_is_ternary() -> None:
    options = {"depth": 20, "widths": [4, 8, 8], "blocks": [1, 1, 1]}
    network = build("ternary_resnet", **options, quantize_first=True)
    x = torch.randn(8, *IMAGE)
    network.train()(x)
    packed = pack(network)
    assert isinstance(packed.bn1, FoldedBatchNorm)
    assert_near(packed(x), network.eval()(x))
    assert isinstance(pack(build("ternary_resnet", **options)).bn1, nn.BatchNorm2d)
