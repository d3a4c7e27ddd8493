"""A picture of a network's wiring: which inputs each layer reads, and how often.

Shape letters: F inputs of a layer, T bits per feature, C channels, H height, W width.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from difflut_lab.encoders.base import Encoder
from difflut_lab.layers import BaseLUTLayer, ConvLUT
from difflut_lab.layers.feature_wise_groups import FeatureWiseGroups
from difflut_lab.registry import REGISTRY
from difflut_lab.training.network import Network

MARGIN, GAP, LINE = 24, 28, 20
MAP = 252  # side of a map, pixels
HISTOGRAM = (320, MAP)
MAX_BINS, MAX_TICKS = 40, 8
MAX_CHANNELS = 4  # more are summed
COLUMNS = 3  # maps in a row
MIN_WIDTH = 640
INK, FAINT, BAR = (34, 34, 34), (150, 150, 150), (38, 84, 124)
NEVER = (225, 225, 225)  # an input that is not read
# few reads to many: viridis, by Smith and van der Walt, at equal distances
VIRIDIS = [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
           (170, 220, 50), (253, 231, 37)]  # fmt: skip


@dataclass(kw_only=True)
class Panel:
    """What is drawn of one layer."""

    title: str
    # the layer's place, name and size

    text: str
    # how often its inputs are read, in words

    maps: list[tuple[str, Image.Image]] = field(default_factory=list)
    # a caption and a picture of the inputs each

    highest: int = 0
    # reads that the brightest colour of the maps stands for

    before: Tensor | None = None
    # reads per input before the training, where they were others

    after: Tensor | None = None
    # reads per input, (F,)


class WiringPicture:
    """Remembers the wiring of a network that is about to be trained, and draws it once it is.

    Parameters
    ----------
    network : Network
        The network.
    input_shape : sequence of int
        Shape of a sample: ``(C, H, W)`` is drawn as an image.
    """

    def __init__(self, network: Network, input_shape: Sequence[int]) -> None:
        self._layers = [module for module in network.modules() if isinstance(module, BaseLUTLayer)]
        self._encoder = next((module for module in network.modules() if isinstance(module, Encoder)), None)
        self._input_shape = tuple(input_shape)
        self._before = [_reads(layer) for layer in self._layers]

    def draw(self) -> Image.Image | None:
        """One panel per LUT layer with its wiring as it is now; None for a network without such layers."""
        if not self._layers:
            return None
        names = {REGISTRY.get("layer", name): name for name in REGISTRY.names("layer")}
        panels = [
            self._panel(f"{index}  {names.get(type(layer), type(layer).__name__)}", layer, before)
            for index, (layer, before) in enumerate(zip(self._layers, self._before, strict=True))
        ]
        return _draw(panels)

    def _panel(self, title: str, layer: BaseLUTLayer, before: Tensor | None) -> Panel:
        shape = _planes(layer)
        title = (
            f"Layer {title}: {layer.output_size:,} nodes, {layer.n} of {layer.input_size:,} inputs each"
            if shape is None
            else f"Layer {title}: {layer.output_size:,} channels out of {' x '.join(str(size) for size in shape)}"
        )
        if isinstance(layer, ConvLUT) and layer.groups > 1:
            title += f", in {layer.groups} groups"
        after = _reads(layer)
        if after is None or before is None:
            return Panel(title=title, text="No wiring() says which inputs its nodes read.")
        is_learned = not torch.equal(before, after)
        shown = {"at the start": before, "at the end": after} if is_learned else {"": after}
        counts = {when: self._arranged(reads, layer) for when, reads in shown.items()}
        highest = max(int(image.max()) for _, images in counts.values() for image in images)
        panel = Panel(
            title=title, text=_in_words(after), highest=highest, before=before if is_learned else None, after=after
        )
        for when, (unit, images) in counts.items():
            for channel, image in enumerate(images):
                which = f"reads per {unit}" + (f", channel {channel}" if len(images) > 1 else "")
                panel.maps.append((f"{which} {when}".rstrip(), _map(_coloured(image, highest))))
        if isinstance(layer, FeatureWiseGroups):
            panel.maps.append((f"{layer.num_groups:,} groups, in colours", self._groups(layer, after)))
        return panel

    def _features(self, values: Tensor, layer: BaseLUTLayer) -> Tensor | None:
        """Values of a layer's inputs ``(F,)`` as ``(F / T, T)``, if these are the encoder's bits."""
        encoder = self._encoder
        if encoder is None or layer is not self._layers[0] or len(values) != encoder.output_size:
            return None
        return values.view(encoder.input_size, -1)

    def _arranged(self, reads: Tensor, layer: BaseLUTLayer) -> tuple[str, list[Tensor]]:
        """What a cell of the maps is, and the maps: of raw features where that is what the layer reads."""
        shape = _planes(layer)
        if shape is not None:
            images = reads.view(shape)
            if layer is self._layers[0] and len(images) % self._input_shape[0] == 0:
                # the bits of a channel are planes that follow each other
                images = images.view(self._input_shape[0], -1, *shape[1:]).sum(dim=1)
            return _by_channel(images)
        features = self._features(reads, layer)
        if features is None:
            return "input", [_grid(reads)]
        totals = features.sum(dim=1)
        if len(self._input_shape) != 3:
            return "feature", [_grid(totals)]
        return _by_channel(totals.view(self._input_shape))

    def _groups(self, layer: FeatureWiseGroups, reads: Tensor) -> Image.Image:
        """Each input in its group's colour, a feature in the mean of its bits' colours."""
        colours = torch.tensor([_group_colour(group) for group in range(layer.num_groups)], dtype=torch.float32)
        colours = torch.where(reads[:, None] > 0, colours[layer.groups()], torch.tensor(NEVER, dtype=torch.float32))
        planes = []
        for plane in colours.t():
            features = self._features(plane, layer)
            if features is None:
                planes.append(_grid(plane, fill=255))
            elif len(self._input_shape) == 3:
                planes.append(features.mean(dim=1).view(self._input_shape).mean(dim=0))
            else:
                planes.append(_grid(features.mean(dim=1), fill=255))
        return _map(torch.stack(planes, dim=2))


def _by_channel(images: Tensor) -> tuple[str, list[Tensor]]:
    """A map per channel of ``(C, H, W)``, or one of the sums over many channels."""
    if len(images) > MAX_CHANNELS:
        return "pixel, all channels", [images.sum(dim=0)]
    return "pixel", list(images)


def _planes(layer: BaseLUTLayer) -> tuple[int, ...] | None:
    """The shape (channels, height, width) of what a layer reads, where its inputs are planes."""
    shape = getattr(layer, "input_shape", None)
    return tuple(shape) if shape is not None and len(shape) == 3 and math.prod(shape) == layer.input_size else None


def _reads(layer: BaseLUTLayer) -> Tensor | None:
    try:
        reads = layer.reads()
    except ValueError:
        return None  # a forward of a layer's own need not ask for its wiring, which may then have any shape
    return None if reads is None else reads.cpu()


def _in_words(reads: Tensor) -> str:
    never = int((reads == 0).sum())
    lowest, highest = int(reads.min()), int(reads.max())
    if lowest == highest:
        return f"Every input is read {lowest} times."
    words = f"An input is read {lowest:,} to {highest:,} times, {float(reads.float().mean()):.2f} on average"
    return f"{words}; {never:,} of {len(reads):,} are never read." if never else f"{words}."


def _grid(values: Tensor, fill: float = -1) -> Tensor:
    """Values ``(F,)`` row by row in a rectangle that is about a square; ``fill`` for cells that stand for none."""
    columns = math.ceil(math.sqrt(len(values)))
    rows = math.ceil(len(values) / columns)
    return torch.cat([values, values.new_full((rows * columns - len(values),), fill)]).view(rows, columns)


def _group_colour(group: int) -> tuple[float, float, float]:
    # steps of the golden ratio keep neighbours' hues apart
    red, green, blue = colorsys.hsv_to_rgb(
        group * 0.618034 % 1, 0.55 + 0.35 * (group % 2), 0.9 - 0.25 * (group % 3) / 2
    )
    return 255 * red, 255 * green, 255 * blue


def _coloured(counts: Tensor, highest: int) -> Tensor:
    """Counts ``(H, W)`` as colours ``(H, W, 3)``: grey where 0, white where there is no input."""
    anchors = torch.tensor(VIRIDIS, dtype=torch.float32)
    place = (counts.clamp(min=0) / max(1, highest)) * (len(anchors) - 1)
    low = place.floor().long().clamp(max=len(anchors) - 2)
    share = (place - low)[..., None]
    colours = anchors[low] * (1 - share) + anchors[low + 1] * share
    colours[counts == 0] = torch.tensor(NEVER, dtype=torch.float32)
    colours[counts < 0] = 255
    return colours


def _image(colours: Tensor) -> Image.Image:
    """Colours ``(H, W, 3)`` from 0 to 255, a pixel each."""
    return Image.fromarray(colours.round().to(torch.uint8).numpy())


def _map(colours: Tensor) -> Image.Image:
    """Colours ``(H, W, 3)`` as a picture that fits the space of a map."""
    image = _image(colours)
    scale = MAP / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)


def _draw(panels: Sequence[Panel]) -> Image.Image:
    rows = [math.ceil(len(panel.maps) / COLUMNS) for panel in panels]
    columns = max(min(COLUMNS, len(panel.maps)) for panel in panels)
    # of a panel: title and text, rows of maps, the scale of colours
    heights = [3 * LINE + (count * (MAP + 2 * LINE) + LINE if count else 0) + GAP for count in rows]
    width = 2 * MARGIN + HISTOGRAM[0] + columns * (MAP + GAP)
    canvas = Image.new("RGB", (max(width, MIN_WIDTH), sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for panel, height in zip(panels, heights, strict=True):
        draw.text((MARGIN, top), panel.title, fill=INK, font=ImageFont.load_default(16))
        draw.text((MARGIN, top + LINE + 4), panel.text, fill=INK, font=ImageFont.load_default(13))
        if panel.after is not None:
            _draw_histogram(draw, panel.before, panel.after, MARGIN, top + 3 * LINE)
            _draw_maps(canvas, draw, panel, MARGIN + HISTOGRAM[0] + GAP, top + 3 * LINE)
        top += height
    return canvas


def _draw_maps(canvas: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, left: int, top: int) -> None:
    font = ImageFont.load_default(12)
    for start in range(0, len(panel.maps), COLUMNS):
        for column, (caption, image) in enumerate(panel.maps[start : start + COLUMNS]):
            x = left + column * (MAP + GAP)
            draw.text((x, top), caption, fill=INK, font=font)
            canvas.paste(image, (x, top + LINE))
        top += MAP + 2 * LINE
    # one scale for all maps: they are to be compared
    top -= LINE - 8
    draw.rectangle((left, top, left + 11, top + 11), fill=NEVER)
    draw.text((left + 18, top - 1), "0", fill=INK, font=font)
    draw.text((left + 42, top - 1), "1", fill=INK, font=font)
    ramp = torch.linspace(1, max(1, panel.highest), 120).expand(12, -1)
    canvas.paste(_image(_coloured(ramp, panel.highest)), (left + 56, top))
    draw.text((left + 182, top - 1), f"{panel.highest:,}", fill=INK, font=font)


def _draw_histogram(draw: ImageDraw.ImageDraw, before: Tensor | None, after: Tensor, left: int, top: int) -> None:
    """Bars over the number of reads; an outline where it was another before the training."""
    font = ImageFont.load_default(12)
    largest = int(max(after.max(), 0 if before is None else before.max()))
    step = max(1, math.ceil((largest + 1) / MAX_BINS))
    bins = largest // step + 1
    heights = torch.bincount(after // step, minlength=bins)
    outline = None if before is None else torch.bincount(before // step, minlength=bins)
    tallest = int(max(heights.max(), 0 if outline is None else outline.max()))
    caption = "inputs by number of reads" + (f", {step} to a bar" if step > 1 else "")
    caption += "" if outline is None else " (outline: at the start)"
    draw.text((left, top), caption, fill=INK, font=font)
    width, height = HISTOGRAM
    base = top + LINE + height
    for index in range(bins):
        edges = left + index * width // bins, left + (index + 1) * width // bins - (1 if bins < width // 3 else 0)
        bar = int(heights[index]) * (height - LINE) // tallest
        if bar:
            draw.rectangle((edges[0], base - bar, edges[1] - 1, base), fill=BAR)
        bar = 0 if outline is None else int(outline[index]) * (height - LINE) // tallest
        if bar:
            draw.rectangle((edges[0], base - bar, edges[1] - 1, base), outline=INK)
    draw.line((left, base, left + width, base), fill=FAINT)
    every = math.ceil(bins / MAX_TICKS)
    for index in range(0, bins, every):
        centre = left + (2 * index + 1) * width // (2 * bins)
        draw.text((centre, base + 4), f"{index * step:,}", fill=INK, font=font, anchor="ma")
    draw.text((left + width, base - height), f"tallest bar: {tallest:,} inputs", fill=FAINT, font=font, anchor="ra")
