"""Tree convolutions against trees that are walked node by node, and against torch's own unfolding."""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflut_lab import REGISTRY
from difflut_lab.errors import ConfigError
from difflut_lab.layers import ConvLUT, LayerConfig, freeze, soft
from difflut_lab.nodes import LUTNodes
from difflut_lab.ops import Flips, flip_mask
from difflut_lab.seeding import derive_seed

SHAPE = (4, 6, 7)
CASES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 0, "tree_depth": 2},
    {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 2},
    {"kernel_size": 2, "padding": 1, "stride": 3, "tree_depth": 3, "n": 2},
    {"kernel_size": 1, "padding": 0, "groups": 2, "n": 2},
    {"kernel_size": 4, "padding": 3, "tree_depth": 2, "groups": 4, "n": 2},
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Product(LUTNodes):
    """Nodes that cannot route by themselves."""

    def __init__(self, num_nodes: int, n: int = 6, *, seed: int = 42) -> None:
        super().__init__(num_nodes, n, seed=seed)
        self.scale = nn.Parameter(torch.ones(num_nodes))

    def relaxed(self, routed: Tensor) -> Tensor:
        return routed.prod(dim=2) * self.scale


def build(
    shape: tuple[int, int, int] = SHAPE, trees: int = 8, node: Any = "dwn", n: int = 3, **options: Any
) -> ConvLUT:
    size = shape[0] * shape[1] * shape[2]
    return ConvLUT(size, trees, node, n, input_shape=shape, **options)


def features(batch: int, layer: ConvLUT, seed: int = 0) -> Tensor:
    return torch.rand(batch, layer.input_size, generator=torch.Generator().manual_seed(seed))


def bits(batch: int, layer: ConvLUT) -> Tensor:
    return features(batch, layer).round()


def walked(layer: ConvLUT, x: Tensor) -> Tensor:
    """Every tree at every position of every sample, one table lookup after the other."""
    (channels, height, width), (trees, rows, columns) = layer.input_shape, layer.output_shape
    windows, wiring = layer.windows, layer.wiring().tolist()
    tables = [bank.truth_table().tolist() for bank in (*layer.branches, layer.nodes)]
    images = x.reshape(-1, channels, height, width).tolist()
    y = torch.empty(len(x), trees, rows, columns)
    for sample, row, column in itertools.product(range(len(x)), range(rows), range(columns)):

        def read(place: int, sample: int = sample, row: int = row, column: int = column) -> bool:
            channel, tap = divmod(place, len(windows.taps))
            at_y = row * windows.stride + windows.taps[tap][0] - windows.padding
            at_x = column * windows.stride + windows.taps[tap][1] - windows.padding
            inside = 0 <= at_y < height and 0 <= at_x < width
            return inside and images[sample][channel][at_y][at_x] >= 0.5

        level = [[read(place) for place in places] for places in wiring]
        for table in tables:
            outputs = [table[j][sum(bit << k for k, bit in enumerate(slots))] for j, slots in enumerate(level)]
            level = [outputs[j : j + layer.n] for j in range(0, len(outputs), layer.n)]
        y[sample, :, row, column] = torch.tensor(outputs)
    return y.flatten(1)


def seen_by(layer: ConvLUT, x: Tensor) -> Tensor:
    """What each slot of the first level sees, ``(B, P, N, n)``, by torch's unfolding."""
    channels, size = layer.input_shape[0], layer.windows.size
    seen = F.unfold(x.reshape(-1, *layer.input_shape), size, padding=layer.windows.padding, stride=layer.windows.stride)
    taps = torch.tensor([dy * size + dx for dy, dx in layer.windows.taps])
    seen = seen.unflatten(1, (channels, size * size))[:, :, taps].flatten(1, 2).transpose(1, 2)
    return seen[:, :, layer.wiring().long()]


def unfolded(layer: ConvLUT, x: Tensor, step: int | None = None) -> Tensor:
    """The training forward node by node, pairs of sample and position as a batch; with the flips of a step."""
    y, pixels = (seen_by(layer, values).flatten(0, 1) for values in (x, torch.ones_like(x)))
    for level, bank in enumerate((*layer.branches, layer.nodes)):
        if step is not None:
            seed = derive_seed(layer._flip_seed, level) if level else layer._flip_seed
            flips = Flips(layer.layer_config.flip_probability, seed, torch.tensor(step))
            mask = flip_mask(flips, bank.num_nodes, layer.n, len(y))
            # flips are counted with the samples of a position next to each other
            mask = mask.unflatten(2, (-1, len(x))).permute(3, 2, 0, 1).flatten(0, 1)
            if level == 0:
                mask = mask & (pixels > 0)
            y = y + (torch.where(mask, 1 - y, y) - y).detach()
        y = bank(y)
        if level < len(layer.branches):
            y = y.unflatten(1, (-1, layer.n))
    return y.reshape(len(x), -1, layer.output_shape[0]).transpose(1, 2).flatten(1)


@every_case
@pytest.mark.parametrize("node", ["dwn", "probabilistic"])
def test_eval_and_frozen_are_the_trees_bit_for_bit(case: dict[str, Any], node: str) -> None:
    layer = build(node=node, **case)
    x = bits(5, layer)
    wanted = walked(layer, x)
    assert 0 < wanted.mean() < 1
    layer.eval()
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer(x.bool()), wanted)
    assert layer(x).t().is_contiguous() and layer(x).dtype == x.dtype
    layer.train()
    freeze(layer)
    for parameter in layer.parameters():
        parameter.data.normal_()
    assert torch.equal(layer(x), wanted)
    again = build(node=node, seed=1, **case)
    again.freeze()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), wanted)


@every_case
@pytest.mark.parametrize("node", ["dwn", "probabilistic", Product])
def test_training_forward_and_gradients(case: dict[str, Any], node: Any) -> None:
    layer = build(node=node, **case).to(torch.float64)
    x = features(4, layer).to(torch.float64).requires_grad_()
    parameters = list(layer.parameters())
    upstream = torch.randn(4, layer(x).shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (layer, lambda x: unfolded(layer, x)):
        y = forward(x)
        results.append((y, *torch.autograd.grad(y, [x, *parameters], upstream)))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)
        assert ours.isfinite().all() and ours.ne(0).any()
    with soft(layer):
        torch.testing.assert_close(layer(x), results[1][0])


@every_case
@pytest.mark.parametrize("node", ["dwn", "probabilistic", "hybrid", Product])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_flip_and_the_padding_does_not(case: dict[str, Any], node: Any, dtype: torch.dtype) -> None:
    layer = build(node=node, layer_config={"flip_probability": 0.3}, **case).to(dtype)
    x = features(4, layer).to(dtype).requires_grad_()
    parameters = list(layer.parameters())
    upstream = torch.randn(4, layer(x).shape[1], dtype=dtype, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (layer, lambda x: unfolded(layer, x, step=1)):
        y = forward(x)
        results.append((y, *torch.autograd.grad(y, [x, *parameters], upstream)))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
        assert ours.isfinite().all() and ours.ne(0).any()


def test_bits_of_type_bool_flip_as_floats_do() -> None:
    layers = [build(node="probabilistic", layer_config={"flip_probability": 0.3}) for _ in range(2)]
    x = bits(4, layers[0])
    assert torch.equal(layers[0](x), layers[1](x.bool()))


@every_case
def test_the_gradient_is_the_same_in_every_repetition(case: dict[str, Any]) -> None:
    layer = build(node="probabilistic", **case)
    x = features(9, layer).requires_grad_()
    first, second = (torch.autograd.grad(layer(x).square().sum(), x)[0] for _ in range(2))
    assert torch.equal(first, second)


@every_case
def test_the_wiring(case: dict[str, Any]) -> None:
    layer = build(**case)
    wiring, places = layer.wiring(), SHAPE[0] * len(layer.windows.taps)
    depth, n, groups = case.get("tree_depth", 1), case.get("n", 3), case.get("groups", 1)
    assert wiring.dtype == torch.int32 and wiring.shape == (8 * n ** (depth - 1), n)
    assert [bank.num_nodes for bank in (*layer.branches, layer.nodes)] == [8 * n**k for k in reversed(range(depth))]
    assert all(len(set(node)) == n for node in wiring.tolist())
    counts = torch.bincount(wiring.flatten(), minlength=places)
    assert counts.max() - counts.min() <= 1
    group_of_channel = wiring // len(layer.windows.taps) // (SHAPE[0] // groups)
    assert torch.equal(group_of_channel, (torch.arange(len(wiring)) // (len(wiring) // groups))[:, None].expand(-1, n))
    assert torch.equal(wiring, build(**case).wiring()) and not torch.equal(wiring, build(seed=1, **case).wiring())


@every_case
def test_reads_counts_what_is_read_at_every_position(case: dict[str, Any]) -> None:
    layer = build(node=Product, **case).to(torch.float64)
    # the product's logarithm at ones has the gradient 1 for every input that is read
    x = torch.ones(1, layer.input_size, dtype=torch.float64, requires_grad=True)
    seen = layer._seen(x)[:, layer.wiring().flatten().long()]
    (wanted,) = torch.autograd.grad(seen.sum(), x)
    assert torch.equal(layer.reads(), wanted[0].long())


def test_places_that_see_only_padding_are_not_read() -> None:
    layer = build((5, 1, 1), kernel_size=3, padding=1)
    assert layer.windows.taps == [(1, 1)] and layer.wiring().max() < 5
    assert build((5, 1, 2), kernel_size=5, padding=2).windows.taps == [(2, 1), (2, 2), (2, 3)]


def test_a_shifted_image_gives_shifted_outputs() -> None:
    layer = build((2, 9, 9), kernel_size=3, padding=1, tree_depth=2).eval()
    x = torch.zeros(3, 2, 9, 9)
    x[:, :, 2:6, 2:6] = features(3, build((2, 4, 4))).round().view(3, 2, 4, 4)
    y = layer(x.flatten(1)).view(3, *layer.output_shape)
    shifted = layer(x.roll((1, 2), (2, 3)).flatten(1)).view(3, *layer.output_shape)
    assert torch.equal(shifted[:, :, 2:, 3:], y[:, :, 1:-1, 1:-2])


def test_flips_act_in_training_only() -> None:
    layer = build(tree_depth=2, layer_config={"flip_probability": 0.25})
    x = bits(6, layer)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second) and int(layer.flip_step) == 2
    assert torch.equal(build(tree_depth=2, layer_config={"flip_probability": 0.25})(x), first)
    assert torch.equal(layer.eval()(x), build(tree_depth=2).eval()(x))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_level_flips(depth: int) -> None:
    layer = build(tree_depth=depth, padding=0)
    with torch.no_grad():
        for bank in (*layer.branches, layer.nodes):
            # the parity of three inputs: all of them flipped, it flips
            bank.get_parameter("weight").copy_(torch.tensor([-1.0, 1, 1, -1, 1, -1, -1, 1]).expand(bank.num_nodes, 8))
    x = bits(6, layer)
    plain = layer(x)
    layer.layer_config = LayerConfig(flip_probability=1.0)
    assert torch.equal(layer(x), 1 - plain if depth % 2 else plain)


@pytest.mark.parametrize("node", ["dwn", "probabilistic", Product])
def test_every_routed_copy_flips_with_the_probability(node: Any) -> None:
    layer = build((1, 40, 50), 50, node, 1, kernel_size=1, padding=0, layer_config={"flip_probability": 0.1})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.tensor([-1e3, 1e3]) if parameter.dim() == 2 else torch.ones(50))
    x = bits(10, layer).requires_grad_()
    y = layer(x).view(10, 50, -1)
    flipped = (y - x.detach()[:, None]).abs() > 0.5
    assert abs(flipped.float().mean() - 0.1) < 0.002
    assert (flipped.float().mean(dim=(1, 2)) > 0.09).all() and (flipped.float().mean(dim=(0, 2)) > 0.09).all()
    # noise is not a transform: the gradient of a node that passes its input has one sign
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (gradient >= 0).all()


@pytest.mark.parametrize("mode", ["layerwise", "nodewise", "batch"])
@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_of_every_level_are_stabilised(mode: str, depth: int) -> None:
    layer = build(node="probabilistic", tree_depth=depth, layer_config={"grad_stabilization": mode})
    received: list[Tensor] = []
    for bank in (*layer.branches, layer.nodes):
        bank.register_full_backward_hook(lambda bank, inputs, outputs: received.append(outputs[0]))
    original = type(layer.nodes).fused

    def observed(bank: Any, *arguments: Any) -> Tensor:
        y = original(bank, *arguments)
        y.register_hook(received.append)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer.nodes), "fused", observed)
        y = layer(features(5, layer))
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2)) * 1e-3).sum().backward()
    assert len(received) == depth
    for gradient in received:
        by_sample = gradient.t().reshape(gradient.shape[1], -1, 5)
        dims = {"layerwise": (0, 1, 2), "nodewise": (1, 2), "batch": (0, 1)}[mode]
        torch.testing.assert_close(by_sample.std(dims, correction=0), torch.ones(by_sample.mean(dims).shape))


def test_what_the_kernel_sees_is_not_kept_for_the_backward() -> None:
    layer = build((4, 11, 13), node="probabilistic")
    x = features(7, layer)
    size = 4 * 9 * 11 * 13 * 7
    y = layer(x)
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Tensor and found.numel() == size]
    (gradient,) = torch.autograd.grad(y.sum(), layer.nodes.get_parameter("weight"))
    (wanted,) = torch.autograd.grad(unfolded(layer, x).sum(), layer.nodes.get_parameter("weight"))
    torch.testing.assert_close(gradient, wanted)


def test_state_dict_copies_and_seeds() -> None:
    layer = build(tree_depth=2, node="probabilistic")
    assert "branches.0.weight" in layer.state_dict()
    other = build(tree_depth=2, node="probabilistic", seed=7)
    assert not torch.equal(layer.get_parameter("branches.0.weight"), other.get_parameter("branches.0.weight"))
    assert torch.equal(
        layer.get_parameter("branches.0.weight"),
        build(tree_depth=2, node="probabilistic").get_parameter("branches.0.weight"),
    )
    assert not torch.equal(layer.get_parameter("branches.0.weight")[:8], layer.nodes.get_parameter("weight"))
    other.load_state_dict(layer.state_dict())
    x = features(4, layer)
    for copied in (other, copy.deepcopy(layer)):
        assert torch.equal(copied(x), layer(x))


def test_views_of_nodes_build_the_same_tree() -> None:
    layer = build((1, 3, 3), 2, "probabilistic", 2, padding=0, tree_depth=2)
    x = features(6, layer)
    leaves = [leaf(x[:, places.long()]) for leaf, places in zip(layer._banks()[0], layer.wiring(), strict=True)]
    roots = [layer.nodes[j](torch.cat(leaves[2 * j : 2 * j + 2], dim=1)) for j in range(2)]
    torch.testing.assert_close(layer(x), torch.cat(roots, dim=1))


def test_one_pixel_planes_by_default() -> None:
    layer = REGISTRY.get_layer("conv_lut")(20, 6, "dwn", 4)
    assert layer.output_shape == (6, 1, 1) and layer(torch.rand(3, 20)).shape == (3, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kernel_size": 9, "padding": 1},
            "conv_lut: kernel_size=9: a window of 9 x 9 does not fit into a plane of 6 x 7",
        ),
        ({"groups": 3}, "conv_lut: groups=3 must divide the 4 input and 8 output channels."),
        ({"n": 6, "kernel_size": 1, "padding": 0}, "conv_lut: each node reads n=6 distinct inputs, but its receptive "),
        ({"kernel_size": 0}, "layer.kernel_size=0: must be at least 1."),
        ({"stride": 0}, "layer.stride=0: must be at least 1."),
        ({"padding": -1}, "layer.padding=-1: must be at least 0."),
        ({"tree_depth": 9}, "layer.tree_depth=9: must be at least 1 and at most 8."),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(**options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_shape_of_another_size() -> None:
    with pytest.raises(ConfigError, match=r"conv_lut: input_shape=\(2, 3, 3\) does not have input_size=20 values"):
        ConvLUT(20, 4, "dwn", 2, input_shape=(2, 3, 3))
    with pytest.raises(ValueError, match=r"expects inputs of shape \(batch, 168\), got \(2, 4, 6, 7\)"):
        build()(torch.rand(2, 4, 6, 7))
