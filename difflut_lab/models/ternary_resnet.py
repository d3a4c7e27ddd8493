"""Residual networks with ternary convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from difflut_lab.errors import ConfigError
from difflut_lab.models.base import Model
from difflut_lab.registry import register_model
from difflut_lab.schema import PositiveInt
from difflut_lab.seeding import derive_seed
from difflut_lab.ternary import TernaryBottleneck, TernaryConv2d, TernaryLinear, TernaryResidualBlock
from difflut_lab.ternary.base import ActivationBits, LayerConfigSpec, QuantizerSpec

Depth = Literal[18, 20, 32, 44, 50, 56]
# with fewer channels in this layout, the backward of 1 x 1 convolutions of stride 2 corrupts memory (torch 2.14, CPU)
NARROWEST = 8
Widths = Annotated[list[PositiveInt], Field(min_length=1)]


class _Shape(NamedTuple):
    widths: list[int]
    blocks: list[int]
    block: type[nn.Module]


# He et al., arXiv 1512.03385: table 1 for ImageNet, section 4.2 for CIFAR
_DEPTHS: dict[int | None, _Shape] = {
    None: _Shape([64, 128, 256], [2, 2, 2], TernaryResidualBlock),
    18: _Shape([64, 128, 256, 512], [2, 2, 2, 2], TernaryResidualBlock),
    50: _Shape([64, 128, 256, 512], [3, 4, 6, 3], TernaryBottleneck),
} | {depth: _Shape([16, 32, 64], [(depth - 2) // 6] * 3, TernaryResidualBlock) for depth in (20, 32, 44, 56)}


@register_model("ternary_resnet")
class TernaryResNet(Model):
    """A residual network (He et al., arXiv 1512.03385) whose blocks have ternary weights.

    The first convolution and the last layer are in float, unless told otherwise.

    Parameters
    ----------
    num_classes : int
        Number of classes.
    depth : int, optional
        Of the published networks: 20, 32, 44, 56 (three stages of 16, 32, 64 channels), 18 (four stages of 64 to 512),
        50 (the same with bottlenecks). None: three stages of 64, 128, 256 channels, two blocks each.
    stem : str
        What comes before the blocks: ``imagenet``, a 7 x 7 convolution of stride 2 and 3 x 3 max pooling of stride 2;
        ``cifar``, a 3 x 3 convolution.
    widths, blocks : list of int, optional
        Channels (before a bottleneck's expansion) and number of blocks per stage, other than the depth's.
    conv : str
        ``conv2d``, or ``depthwise_separable`` in place of 3 x 3 convolutions.
    activation : str
        ``relu``, ``ternary`` (thresholds +-0.5) or ``learnable_ternary`` (a threshold per channel).
    activation_bits : int, optional
        8 rounds the inputs of ternary convolutions to 8-bit integers.
    quantize_first, quantize_last : bool
        Whether the first convolution and the last layer are ternary, too.
    channels_last : bool
        Memory layout of the convolutions; on CPUs, and on GPUs in half precision, the faster one. Networks with less
        than 8 channels somewhere do without.
    input_shape : tuple of int
        Shape of a sample, (C, H, W).
    quantizer : str or mapping
        Of the weights; ``none`` gives the float network of the same shape.
    layer_config : LayerConfig or mapping, optional
        Augmentation of every ternary convolution.
    seed : int
        Initial values and flips derive from it.

    Raises
    ------
    ConfigError
        If samples are no images, or widths and blocks have not one entry per stage.

    Attributes
    ----------
    conv1, bn1, layer1, layer2, layer3, ..., fc
        As torchvision names them.
    """

    # pairs of a convolution and the batch normalisation that it alone feeds
    FOLDABLE: ClassVar[tuple[tuple[str, str], ...]] = (("conv1", "bn1"),)

    def __init__(
        self,
        num_classes: int = 10,
        *,
        depth: Depth | None = None,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        widths: Widths | None = None,
        blocks: Widths | None = None,
        conv: Literal["conv2d", "depthwise_separable"] = "conv2d",
        activation: Literal["relu", "ternary", "learnable_ternary"] = "relu",
        activation_bits: ActivationBits = None,
        quantize_first: bool = False,
        quantize_last: bool = False,
        channels_last: bool = True,
        input_shape: tuple[int, ...] = (3, 224, 224),
        quantizer: QuantizerSpec = "absmean",
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ConfigError(
                f"model.name=ternary_resnet: samples must be images (channels, height, width); these have shape "
                f"{tuple(input_shape)}. For them there is ternary_mlp."
            )
        if stem not in ("imagenet", "cifar"):
            raise ConfigError(f"stem={stem}: must be imagenet or cifar.")
        if depth not in _DEPTHS:
            raise ConfigError(f"depth={depth}: must be one of {', '.join(str(known) for known in _DEPTHS)}.")
        shape = _DEPTHS[depth]
        widths, blocks = widths or shape.widths, blocks or shape.blocks
        _check_stages({"widths": widths, "blocks": blocks})
        ternary: dict[str, Any] = {
            "quantizer": quantizer,
            "activation_bits": activation_bits,
            "layer_config": layer_config,
        }
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = TernaryConv2d(
            input_shape[0],
            widths[0],
            kernel,
            stride,
            kernel // 2,
            bias=False,
            seed=derive_seed(seed, "conv1"),
            **(ternary if quantize_first else {"quantizer": "none"}),
        )
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        channels, self._stages = widths[0], []
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage: list[nn.Module] = []
            for number in range(count):
                block = shape.block(
                    channels,
                    width * getattr(shape.block, "expansion", 1),
                    2 if index and not number else 1,
                    conv=conv,
                    activation=activation,
                    seed=derive_seed(seed, "layer", index, number),
                    **ternary,
                )
                channels = width * getattr(shape.block, "expansion", 1)
                stage.append(block)
            self._stages.append(f"layer{index + 1}")
            self.add_module(self._stages[-1], nn.Sequential(*stage))
        self.fc = TernaryLinear(
            channels,
            num_classes,
            seed=derive_seed(seed, "fc"),
            **(ternary if quantize_last else {"quantizer": "none"}),
        )
        wide = min(widths) >= NARROWEST
        self.memory_format = torch.channels_last if channels_last and wide else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    @classmethod
    def resolve(
        cls, options: Mapping[str, Any], groups: Mapping[str, Any], num_classes: int | None = None
    ) -> dict[str, Any]:
        """Check that widths and blocks have one entry per stage."""
        shape = _DEPTHS[options["depth"]]
        _check_stages({key: options[key] or getattr(shape, key) for key in ("widths", "blocks")})
        return dict(options)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, num_classes)`` of normalised images ``(B, C, H, W)``."""
        x = self.pool(functional.relu(self.bn1(self.conv1(x.contiguous(memory_format=self.memory_format)))))
        for name in self._stages:
            x = getattr(self, name)(x)
        scores: Tensor = self.fc(x.mean(dim=(2, 3)))
        return scores


def _check_stages(stages: Mapping[str, list[int]]) -> None:
    counts = {len(values) for values in stages.values()}
    if len(counts) > 1:
        given = ", ".join(f"model.{key}={values}" for key, values in stages.items())
        raise ConfigError(f"{given}: must have one entry per stage each.")
