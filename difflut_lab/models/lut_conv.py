"""A convolutional network of lookup tables: encoder, blocks of tree convolutions and OR pooling, LUT layers, head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from difflut_lab import schema
from difflut_lab.encoders import build_encoder
from difflut_lab.errors import ConfigError
from difflut_lab.heads import build_head
from difflut_lab.layers import OrPool, Shortcut
from difflut_lab.models.base import Model
from difflut_lab.models.stack import build_layer, plan
from difflut_lab.registry import REGISTRY, register_model
from difflut_lab.schema import PartOf, PositiveInt
from difflut_lab.seeding import derive_seed


@register_model("lut_conv")
class LUTConv(Model):
    """Images to planes of bits, through blocks of convolution and pooling, LUT layers, output bits counted per class.

    In evaluation mode the network is its truth tables; ``with soft(model):`` evaluates the relaxation instead.

    Parameters
    ----------
    channels : list of int
        Output channels of the convolution of each block.
    pool : int
        Side and stride of the OR pooling at each block's end; 1 for none.
    shortcut : bool
        Whether a block's inputs go on, beside the convolution's outputs, to its pooling. Needs convolutions that keep
        the planes' size.
    widths : list of int
        Nodes of the LUT layers after the blocks. A last width that is not a multiple of the classes is rounded up.
    dense : str or mapping
        ``name`` and options of those layers.
    per_layer : mapping, optional
        By index, convolutions first, settings of ``layer`` (``dense`` behind the convolutions), ``node`` and
        ``layer_config`` that are laid over the groups, for example ``{0: {"layer": {"kernel_size": 5}}}``. An entry
        with another ``name`` replaces the group, one without is merged into it.
    input_shape : tuple of int
        Shape of one sample, (C, H, W).
    num_classes : int
        Number of classes.
    encoder, layer, node, head : mapping
        ``name`` and options of the parts; ``layer`` is the convolutions'.
    layer_config : mapping, optional
        Fields of ``LayerConfig``.
    seed : int
        Every layer's wiring, initial values and flips derive from it, each from a stream of its own.

    Raises
    ------
    ConfigError
        If samples are not images, a kernel or window does not fit its planes, or ``layer`` is not a convolution.
    """

    def __init__(
        self,
        *,
        channels: Annotated[list[PositiveInt], Field(min_length=1)],
        pool: PositiveInt = 2,
        shortcut: bool = False,
        widths: Annotated[list[PositiveInt], Field(min_length=1)],
        dense: Annotated[str | dict[str, Any], PartOf("layer")] = "random_routing",
        per_layer: dict[int, dict[str, Any]] | None = None,
        input_shape: tuple[int, ...],
        num_classes: int,
        encoder: Mapping[str, Any],
        layer: Mapping[str, Any],
        node: Mapping[str, Any],
        head: Mapping[str, Any],
        layer_config: Mapping[str, Any] | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        groups = {"layer": layer, "node": node, "layer_config": layer_config or {}}
        given = {"channels": channels, "widths": widths, "dense": dense, "per_layer": per_layer}
        options = self.resolve(given, groups, num_classes)
        if len(input_shape) != 3:
            raise ConfigError(
                f"model.name=lut_conv: samples must be images (channels, height, width); these have shape "
                f"{tuple(input_shape)}. For them there is lut_mlp."
            )
        self.encoder = build_encoder(encoder, input_shape)
        shape: tuple[int, ...] = (input_shape[0] * self.encoder.bits_per_feature, *input_shape[1:])
        layers: list[nn.Module] = [BitPlanes(self.encoder.bits_per_feature, shape)]
        for index, (outputs, spec) in enumerate(
            zip([*channels, *options["widths"]], _specs(options, groups), strict=True)
        ):
            layer_seed, size = derive_seed(seed, "layer", index), math.prod(shape)
            if index < len(channels):
                try:
                    built = build_layer(_with_shape(spec, shape), size, outputs, None, layer_seed)
                    block, shape = _block(built, shape, pool, shortcut)
                except ConfigError as error:
                    raise ConfigError(f"Convolution {index} of model.channels={channels}: {error}") from None
                layers += block
            else:
                built = build_layer(spec, size, outputs, None, layer_seed)
                layers.append(built)
                shape = (outputs,)
            built.layer_index = index
        self.layers = nn.Sequential(*layers)
        self.head = build_head(head, math.prod(shape), num_classes, derive_seed(seed, "head"))

    @classmethod
    def resolve(
        cls, options: Mapping[str, Any], groups: Mapping[str, Any], num_classes: int | None = None
    ) -> dict[str, Any]:
        """Check ``per_layer``; with the number of classes known, round the last width up to a multiple of it."""
        widths, dense = list(options["widths"]), options["dense"]
        if num_classes is not None:
            widths[-1] = math.ceil(widths[-1] / num_classes) * num_classes
        dense = {"name": dense} if isinstance(dense, str) else dense
        resolved = dict(options) | {"widths": widths, "dense": dense, "per_layer": options.get("per_layer") or {}}
        _specs(resolved, groups)
        return resolved

    def calibrate(self, x: Tensor) -> None:
        """Fit the encoder on the training split, ``(S, C, H, W)``."""
        self.encoder.fit(x)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, num_classes)`` of normalised images ``(B, C, H, W)``."""
        scores: Tensor = self.head(self.layers(self.encoder(x)))
        return scores


class BitPlanes(nn.Module):
    """An encoder's bits, feature by feature, as planes: bit t of channel c is channel ``c * bits_per_feature + t``.

    Parameters
    ----------
    bits_per_feature : int
        Bits that the encoder makes of a pixel.
    output_shape : tuple of int
        (channels of bits, H, W).
    """

    def __init__(self, bits_per_feature: int, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.bits_per_feature = bits_per_feature
        self.output_shape = output_shape

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C * bits * H * W)``, a transposed view, of bits ``(B, C * H * W * bits)``."""
        channels, height, width = self.output_shape
        images = x.t().reshape(channels // self.bits_per_feature, height * width, self.bits_per_feature, len(x))
        return images.transpose(1, 2).reshape(channels * height * width, len(x)).t()

    def extra_repr(self) -> str:
        return f"bits_per_feature={self.bits_per_feature}, output_shape={self.output_shape}"


def _specs(options: Mapping[str, Any], groups: Mapping[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """The groups of each layer, convolutions first, ``per_layer`` laid over them and checked."""
    count, sizes = len(options["channels"]), [*options["channels"], *options["widths"]]
    overlays: tuple[dict[Any, Any], dict[Any, Any]] = ({}, {})
    for index, overlay in options["per_layer"].items():
        # YAML has integer keys, the command line has words
        if not str(index).isdecimal() or int(index) >= len(sizes):
            raise ConfigError(
                f"model.per_layer.{index}: there is no such layer; model.channels={options['channels']} and "
                f"model.widths={options['widths']} have layers 0 to {len(sizes) - 1}."
            )
        overlays[int(index) >= count][index] = overlay
    specs = plan(sizes, overlays[0], groups)[:count]
    for spec in specs:
        name = spec["layer"]["name"]
        if "input_shape" not in schema.options(REGISTRY.get("layer", name)):
            raise ConfigError(
                f"layer.name={name}: the convolutions of lut_conv need a layer that takes an input_shape, such as "
                "conv_lut; model.dense names the layers behind them."
            )
    return specs + plan(sizes, overlays[1], {**groups, "layer": options["dense"]})[count:]


def _with_shape(spec: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    return {**spec, "layer": {**spec["layer"], "input_shape": shape}}


def _block(layer: Any, shape: tuple[int, ...], pool: int, shortcut: bool) -> tuple[list[nn.Module], tuple[int, ...]]:
    """A convolution with what follows it, and the shape of the planes that come out."""
    channels, *plane = layer.output_shape
    block: list[nn.Module] = [layer]
    if shortcut:
        if plane != list(shape[1:]):
            raise ConfigError(
                f"model.shortcut=true: the convolution makes planes of {plane[0]} x {plane[1]} out of "
                f"{shape[1]} x {shape[2]}; a shortcut needs them alike (stride=1, kernel_size = 2 * padding + 1)."
            )
        block, channels = [Shortcut(layer)], channels + shape[0]
    if pool == 1:
        return block, (channels, *plane)
    pooling = OrPool((channels, *plane), pool)
    return [*block, pooling], pooling.output_shape
