"""Convolutions with ternary weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_ternary
from difflut_lab.schema import PositiveInt
from difflut_lab.seeding import derive_seed
from difflut_lab.ternary.base import ActivationBits, Augmented, LayerConfigSpec, QuantizerSpec, TernaryLayer

Size = int | tuple[int, int]


@register_ternary("conv2d")
class TernaryConv2d(TernaryLayer):
    """``nn.Conv2d`` with ternary weights: ``(B, C, H, W)`` to ``(B, O, H', W')``.

    With 8-bit activations, all values of a sample share a step.

    Parameters
    ----------
    in_channels, out_channels : int
        C and O.
    kernel_size, stride, padding : int or tuple of int
        As of ``nn.Conv2d``.
    groups : int
        Each of as many groups of output channels sees only its own input channels.
    bias, quantizer, bias_quantizer, activation_bits, layer_config, seed
        As of ``TernaryLayer``.

    Raises
    ------
    ConfigError
        If the groups do not divide the channels, or sizes are not one or two integers.
    """

    FEATURE_DIM: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: PositiveInt,
        out_channels: PositiveInt,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        groups: PositiveInt = 1,
        bias: bool = True,
        *,
        quantizer: QuantizerSpec = "absmean",
        bias_quantizer: QuantizerSpec = "none",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        if in_channels % groups or out_channels % groups:
            raise ConfigError(
                f"groups={groups}: must divide in_channels={in_channels} and out_channels={out_channels}."
            )
        kernel = _pair("kernel_size", kernel_size, 1)
        super().__init__(
            (out_channels, in_channels // groups, *kernel),
            bias,
            quantizer=quantizer,
            bias_quantizer=bias_quantizer,
            activation_bits=activation_bits,
            layer_config=layer_config,
            seed=seed,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel
        self.stride = _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(B, O, H', W')`` of inputs ``(B, C, H, W)``."""
        y = functional.conv2d(
            self.quantize_activations(x),
            self.effective_weight(),
            self.effective_bias(),
            self.stride,
            self.padding,
            groups=self.groups,
        )
        return self.stabilize(y)

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}{groups}, {super().extra_repr()}"
        )

    def _token_dims(self, x: Tensor) -> tuple[int, ...]:
        return (-3, -2, -1)


@register_ternary("depthwise_separable")
class TernaryDepthwiseSeparable(Augmented, nn.Sequential):
    """A convolution of each channel alone, then a 1 x 1 convolution across them, both ternary.

    ``(B, C, H, W)`` to ``(B, O, H', W')`` (Howard et al., MobileNets, arXiv 1704.04861, without the batch
    normalisation in between).

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding
        As of ``TernaryConv2d``.
    bias : bool
        Of the 1 x 1 convolution; the other has none.
    quantizer, bias_quantizer, activation_bits, layer_config, seed
        As of ``TernaryLayer``.

    Attributes
    ----------
    depthwise, pointwise : TernaryConv2d
    """

    def __init__(
        self,
        in_channels: PositiveInt,
        out_channels: PositiveInt,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size = 0,
        bias: bool = True,
        *,
        quantizer: QuantizerSpec = "absmean",
        bias_quantizer: QuantizerSpec = "none",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.depthwise = TernaryConv2d(
            in_channels,
            in_channels,
            kernel_size,
            stride,
            padding,
            groups=in_channels,
            bias=False,
            quantizer=quantizer,
            activation_bits=activation_bits,
            layer_config=layer_config,
            seed=derive_seed(seed, "depthwise"),
        )
        self.pointwise = TernaryConv2d(
            in_channels,
            out_channels,
            1,
            bias=bias,
            quantizer=quantizer,
            bias_quantizer=bias_quantizer,
            activation_bits=activation_bits,
            layer_config=layer_config,
            seed=derive_seed(seed, "pointwise"),
        )
        self.layer_config = layer_config


def _pair(name: str, size: Size, least: int) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(value, int) and value >= least for value in pair):
        raise ConfigError(f"{name}={size!r}: must be an integer, at least {least}, or two of them.")
    return pair
