from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from difflut_lab import REGISTRY
from difflut_lab.layers import BaseLUTLayer
from difflut_lab.layers.learnable_routing import LearnableRouting
from difflut_lab.layers.random_routing import RandomRouting
from difflut_lab.training.compose import build_model, resolve
from difflut_lab.training.network import Network
from difflut_lab.training.wiring_picture import GAP, HISTOGRAM, LINE, MAP, MARGIN, NEVER, VIRIDIS, WiringPicture

SHAPE = (1, 8, 8)
LEFT, TOP = MARGIN + HISTOGRAM[0] + GAP, MARGIN + 4 * LINE  # of the first map of the first layer


@pytest.fixture
def build(composed):
    """Builds an untrained network for images of the digits, or of another shape."""

    def from_words(*words: str, shape: tuple[int, ...] = SHAPE) -> Network:
        config = resolve(composed("model.widths=[40,20]", *words), words)
        return Network(build_model(config, shape, 10), [0.0], [1.0], [str(digit) for digit in range(10)])

    return from_words


def cells(image: Image.Image, size: int = 8, index: int = 0) -> list[list[tuple[int, ...]]]:
    """The colours in the middle of the cells of a map in the first row."""
    left, side = LEFT + index * (MAP + GAP), MAP / size
    place = [round((cell + 0.5) * side) for cell in range(size)]
    pixels = [[image.getpixel((left + x, TOP + y)) for x in place] for y in place]
    return [[colour for colour in row if isinstance(colour, tuple)] for row in pixels]


def draw(network: Network | WiringPicture, shape: tuple[int, ...] = SHAPE) -> Image.Image:
    picture = network if isinstance(network, WiringPicture) else WiringPicture(network, shape)
    image = picture.draw()
    assert image is not None
    return image


def layers(network: Network) -> list[BaseLUTLayer]:
    return [module for module in network.modules() if isinstance(module, BaseLUTLayer)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["random_routing", "learnable_routing", "feature_wise_groups"])
def test_reads_count_the_wiring(name, frozen):
    options = {"num_groups": 11} if name == "feature_wise_groups" else {}  # groups shorter than a node: padding
    layer = REGISTRY.build("layer", name, input_size=50, output_size=30, n=6, seed=3, **options)
    counted = Counter(layer.wiring().flatten().tolist())
    if frozen:
        layer.freeze()
    assert layer.reads().tolist() == [counted[index] for index in range(50)]
    assert (counted[-1] > 0) == (name == "feature_wise_groups")


def test_a_pixel_that_is_read_stands_out(build):
    network = build("encoder.bits=3")
    first = layers(network)[0]
    assert isinstance(first, RandomRouting)
    picture = WiringPicture(network, SHAPE)
    row, column = 2, 5
    first.indices[:] = 3 * (8 * row + column) + 1  # one bit of that pixel
    after = cells(draw(picture), index=1)
    assert after[row][column] == VIRIDIS[-1]
    after[row][column] = NEVER
    assert after == [[NEVER] * 8] * 8
    before = cells(draw(picture), index=0)
    assert all(colour != VIRIDIS[-1] for line in before for colour in line), "the scale is that of both"


def test_learned_wiring_is_shown_as_it_was_and_as_it_is(build):
    network = build("layer=learnable_routing", "layer.candidates=8")
    picture = WiringPicture(network, SHAPE)
    untrained = draw(picture)
    with torch.no_grad():
        for layer in layers(network):
            assert isinstance(layer, LearnableRouting)
            layer.scores.copy_(layer.scores.flip(2))
    trained = draw(picture)
    assert trained.width == untrained.width + MAP + GAP
    shown, alone = cells(trained, index=1), cells(draw(network))  # on scales of their own
    pairs = {pair for rows in zip(shown, alone, strict=True) for pair in zip(*rows, strict=True)}
    assert 3 < len(pairs) == len({colour for colour, _ in pairs}) == len({colour for _, colour in pairs})


def test_groups_have_colours_of_their_own(build):
    network = build("layer=feature_wise_groups", "layer.num_groups=16", "encoder.bits=3")  # four pixels each
    groups = [colour for row in cells(draw(network), index=1) for colour in row]
    assert all(len(set(groups[start : start + 4])) == 1 for start in range(0, 64, 4))
    assert len(set(groups)) == 16


@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (3, 8, 8), (6, 4, 4), (7,), (300,)], ids=lambda shape: "x".join(map(str, shape))
)
@pytest.mark.parametrize("layer", ["learnable_routing", "feature_wise_groups"])
def test_data_of_any_shape_is_drawn(build, shape, layer):
    network = build(f"layer={layer}", "encoder.bits=2", shape=shape)
    image = draw(network, shape)
    assert image.width < 1500
    colours = image.getcolors(1 << 20)
    assert colours is not None and len(colours) > 5


class Planes(RandomRouting):
    """Its inputs are planes of 8 x 8."""

    input_shape = (2, 8, 8)

    def reads(self):
        counts = torch.zeros(2, 8, 8, dtype=torch.int64)
        counts[0, 1, 2], counts[1, 5, 6] = 7, 3
        return counts.flatten()


@pytest.mark.parametrize("bits", [1, 2])
def test_a_layer_of_planes_is_drawn_as_planes_summed_over_bits(build, bits):
    network = build(f"encoder.bits={bits}", shape=(2 // bits, 8, 8))
    network.model.layers[0] = Planes(128, 40)
    image = draw(network, (2 // bits, 8, 8))
    maps = [cells(image, index=index) for index in range(2 // bits)]
    assert maps[0][1][2] == VIRIDIS[-1]
    assert maps[-1][5][6] not in (VIRIDIS[-1], NEVER)
    assert sum(colour != NEVER for shown in maps for row in shown for colour in row) == 2


def test_convolutions_say_their_planes_and_groups(build):
    network = build("model=lut_conv", "model.channels=[4,6]", "+model.per_layer.1.layer.groups=2", "encoder.bits=3")
    picture = WiringPicture(network, SHAPE)
    titles = [picture._panel("of trees", layer, layer.reads()).title for layer in layers(network)[:2]]
    assert titles == [
        "Layer of trees: 4 channels out of 3 x 8 x 8",
        "Layer of trees: 6 channels out of 4 x 4 x 4, in 2 groups",
    ]
    draw(picture)


class Unsaid(BaseLUTLayer):
    def route(self, x):
        return x[:, : self.n].unsqueeze(1).expand(-1, self.output_size, -1)


class Odd(BaseLUTLayer):
    """Its wiring has a shape of its own, which its forward never asks for."""

    def wiring(self):
        return torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize("layer", [Unsaid, Odd])
def test_layers_that_do_not_say_what_they_read_are_passed_over(build, layer):
    network = build()
    whole = draw(network)
    network.model.layers[1] = layer(40, 20)
    assert 0 < draw(network).height < whole.height - MAP


def test_a_network_without_such_layers_has_no_picture(build):
    network = build()
    network.model.layers = torch.nn.Sequential()
    assert WiringPicture(network, SHAPE).draw() is None


def test_a_run_leaves_a_picture_behind_and_a_trial_run_does_not(train):
    directory: Path = train("layer=learnable_routing", "layer.candidates=8", name="run")
    with Image.open(directory / "wiring.png") as image:
        image.load()
        assert image.format == "PNG"
        assert 600 < image.width < 1500
        assert 600 < image.height < 1500
    assert not (train("fast_dev_run=true", name="trial") / "wiring.png").exists()
