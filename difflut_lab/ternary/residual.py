"""Residual blocks with ternary convolutions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_ternary
from difflut_lab.schema import PositiveInt
from difflut_lab.seeding import derive_seed
from difflut_lab.ternary.activation import Activation, build_activation
from difflut_lab.ternary.base import ActivationBits, Augmented, LayerConfigSpec, QuantizerSpec
from difflut_lab.ternary.conv import TernaryConv2d, TernaryDepthwiseSeparable

Conv = Literal["conv2d", "depthwise_separable"]


class _Block(Augmented):
    """What blocks have in common: options of their convolutions, and the shortcut."""

    # pairs of a convolution and the batch normalisation that it alone feeds
    FOLDABLE: ClassVar[tuple[tuple[str, str], ...]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        downsample: nn.Module | None,
        conv: Conv,
        ternary: dict[str, Any],
        seed: int,
    ) -> None:
        super().__init__()
        if conv not in ("conv2d", "depthwise_separable"):
            raise ConfigError(f"conv={conv}: must be conv2d or depthwise_separable.")
        self._options = conv, ternary, seed
        if downsample is None and (stride != 1 or in_channels != out_channels):
            downsample = nn.Sequential(
                self._conv("downsample", in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )
        # a shortcut that was given keeps its own
        self.layer_config = ternary["layer_config"]
        self.downsample = downsample

    def _conv(self, name: str, inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Module:
        conv, ternary, seed = self._options
        separable = conv == "depthwise_separable" and kernel_size > 1
        return (TernaryDepthwiseSeparable if separable else TernaryConv2d)(
            inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False, seed=derive_seed(seed, name), **ternary
        )

    def _activation(self, name: str, activation: Activation, channels: int) -> nn.Module:
        _, ternary, seed = self._options
        return build_activation(
            activation, channels, layer_config=ternary["layer_config"], seed=derive_seed(seed, name)
        )

    def _shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


@register_ternary("residual_block")
class TernaryResidualBlock(_Block):
    """Two 3 x 3 convolutions with batch normalisation, and a shortcut around them (He et al., arXiv 1512.03385).

    ``(B, C, H, W)`` to ``(B, O, H / stride, W / stride)``.

    Parameters
    ----------
    in_channels, out_channels : int
        C and O; O is C by default.
    stride : int
        Of the first convolution.
    downsample : nn.Module, optional
        The shortcut; by default the identity, or where the shape changes a ternary 1 x 1 convolution with batch
        normalisation.
    conv : str
        ``conv2d``, or ``depthwise_separable`` in place of the 3 x 3 convolutions.
    activation : str
        ``relu``, ``ternary`` or ``learnable_ternary``.
    quantizer, activation_bits, layer_config, seed
        As of ``TernaryLayer``.

    Attributes
    ----------
    conv1, bn1, conv2, bn2
        The convolutions and their normalisation.
    """

    FOLDABLE = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(
        self,
        in_channels: PositiveInt,
        out_channels: PositiveInt | None = None,
        stride: PositiveInt = 1,
        downsample: nn.Module | None = None,
        *,
        conv: Conv = "conv2d",
        activation: Activation = "relu",
        quantizer: QuantizerSpec = "absmean",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        ternary = {"quantizer": quantizer, "activation_bits": activation_bits, "layer_config": layer_config}
        outputs = out_channels or in_channels
        super().__init__(in_channels, outputs, stride, downsample, conv, ternary, seed)
        self.conv1 = self._conv("conv1", in_channels, outputs, 3, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = self._activation("act1", activation, outputs)
        self.conv2 = self._conv("conv2", outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = self._activation("act2", activation, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, O, H', W')`` of ``(B, C, H, W)``."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self._shortcut(x)
        output: Tensor = self.act2(y)
        return output


@register_ternary("bottleneck")
class TernaryBottleneck(_Block):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, the inner ones with a quarter of the channels, and a shortcut.

    ``(B, C, H, W)`` to ``(B, O, H / stride, W / stride)`` (He et al., arXiv 1512.03385; the stride is that of the
    3 x 3 convolution, as in torchvision).

    Parameters
    ----------
    in_channels, out_channels : int
        C and O, a multiple of 4; O is C by default.
    stride : int
        Of the 3 x 3 convolution.
    downsample, conv, activation, quantizer, activation_bits, layer_config, seed
        As of ``TernaryResidualBlock``.

    Raises
    ------
    ConfigError
        If ``out_channels`` is not a multiple of 4.

    Attributes
    ----------
    conv1, bn1, conv2, bn2, conv3, bn3
        The convolutions and their normalisation.
    """

    FOLDABLE = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: PositiveInt,
        out_channels: PositiveInt | None = None,
        stride: PositiveInt = 1,
        downsample: nn.Module | None = None,
        *,
        conv: Conv = "conv2d",
        activation: Activation = "relu",
        quantizer: QuantizerSpec = "absmean",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        ternary = {"quantizer": quantizer, "activation_bits": activation_bits, "layer_config": layer_config}
        outputs = out_channels or in_channels
        if outputs % self.expansion:
            raise ConfigError(f"out_channels={outputs}: must be a multiple of {self.expansion}.")
        inner = outputs // self.expansion
        super().__init__(in_channels, outputs, stride, downsample, conv, ternary, seed)
        self.conv1 = self._conv("conv1", in_channels, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = self._activation("act1", activation, inner)
        self.conv2 = self._conv("conv2", inner, inner, 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = self._activation("act2", activation, inner)
        self.conv3 = self._conv("conv3", inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.act3 = self._activation("act3", activation, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, O, H', W')`` of ``(B, C, H, W)``."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y)) + self._shortcut(x)
        output: Tensor = self.act3(y)
        return output
