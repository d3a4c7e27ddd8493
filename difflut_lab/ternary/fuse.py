"""Batch norms folded into the scales of the ternary layers before them.

Shape letters: O output channels or features, I input channels or features that an output reads.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from difflut_lab.registry import register_ternary
from difflut_lab.schema import PositiveInt
from difflut_lab.ternary.activation_quantization import fake_quantize
from difflut_lab.ternary.base import ActivationBits, Augmented, LayerConfigSpec, QuantizerSpec
from difflut_lab.ternary.conv import Size, TernaryConv2d
from difflut_lab.ternary.norm import TernaryBatchNorm
from difflut_lab.ternary.quantizers import Ternary


@torch.no_grad()
def fold(ternary: Ternary, bias: Tensor | None, bn: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, skew and bias of a layer that contains the batch norm behind it; its codes stay what they are.

    With ``factor = gamma / sqrt(running_var + eps)``, of either sign: ``scale * factor``, ``skew * factor`` and
    ``beta + (bias - running_mean) * factor``. Nothing is quantised again.

    Parameters
    ----------
    ternary : Ternary
        The layer's weight, ``(O, I, ...)``.
    bias : Tensor, optional
        The layer's bias, ``(O,)``.
    bn : nn.Module
        A ``TernaryBatchNorm``, or any of torch's, of O features.

    Returns
    -------
    scale, skew : Tensor
        ``(O, 1, ...)``, or ``(O, I, 1, ...)`` with scales per group of input channels.
    bias : Tensor
        ``(O,)``

    Raises
    ------
    ValueError
        If ``bn`` is no batch norm, or keeps no running statistics: then eval mode, too, computes them from the batch.
    """
    if not isinstance(bn, _BatchNorm) or bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"A {type(bn).__name__} without running statistics cannot be folded.")
    dtype = ternary.scale.dtype
    precise = torch.promote_types(dtype, torch.float32)
    factor = torch.rsqrt(bn.running_var.to(precise) + bn.eps)
    gamma = bn.effective_weight() if isinstance(bn, TernaryBatchNorm) else bn.weight
    if gamma is not None:
        factor = factor * gamma
    shift = -bn.running_mean if bias is None else bias - bn.running_mean
    shift = shift * factor if bn.bias is None else shift * factor + bn.bias
    per_output = factor.view(-1, *[1] * (ternary.codes.dim() - 1))
    return (ternary.scale * per_output).to(dtype), (ternary.skew * per_output).to(dtype), shift.to(dtype)


class FoldedConv2d(nn.Module):
    """A convolution of fixed codes, scale, skew and bias, which contains the batch norm behind it.

    Nothing of it is trained, and it does the same in every mode. A convolution in float has its weight as codes.

    Parameters
    ----------
    conv : TernaryConv2d
        The convolution; it is left as it is.
    bn : nn.Module
        The batch norm that reads it.

    Attributes
    ----------
    codes : Tensor
        int8 ``(O, I, kh, kw)``; the float weight where the quantizer is ``none``.
    scale, skew : Tensor
        ``(O, 1, 1, 1)``, or ``(O, I, 1, 1)`` with scales per group of input channels.
    bias : Tensor
        ``(O,)``
    """

    codes: Tensor
    scale: Tensor
    skew: Tensor
    bias: Tensor

    @torch.no_grad()
    def __init__(self, conv: TernaryConv2d, bn: nn.Module) -> None:
        super().__init__()
        if conv.is_float:
            one = conv.weight.new_ones(1, 1, 1, 1)
            ternary, codes = Ternary(conv.weight, one, torch.zeros_like(one)), conv.weight.detach().clone()
        else:
            ternary = conv.quantized()
            codes = ternary.codes.to(torch.int8)
        scale, skew, bias = fold(ternary, conv.effective_bias(), bn)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("skew", skew)
        self.register_buffer("bias", bias)
        self.activation_bits = conv.activation_bits
        self.stride, self.padding, self.groups = conv.stride, conv.padding, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(B, O, H', W')`` of inputs ``(B, C, H, W)``."""
        codes = self.codes.to(self.scale.dtype)
        weight = Ternary(codes, self.scale, self.skew).values()
        if self.activation_bits is not None:
            x = fake_quantize(x, (-3, -2, -1))
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)

    def extra_repr(self) -> str:
        outputs, inputs, *kernel = self.codes.shape
        return f"{inputs * self.groups}, {outputs}, kernel_size={tuple(kernel)}, stride={self.stride}"


@register_ternary("fused_conv_bn")
class FusedTernaryConvBN(Augmented):
    """A ternary convolution and a batch norm that become one convolution: ``(B, C, H, W)`` to ``(B, O, H', W')``.

    It is trained as the pair. After training, ``fuse()`` folds the batch norm into the convolution's scales.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, groups, bias
        As of ``TernaryConv2d``; batch normalisation has a bias of its own.
    quantizer, bias_quantizer, activation_bits, layer_config, seed
        As of ``TernaryLayer``.

    Attributes
    ----------
    conv : TernaryConv2d or FoldedConv2d
    bn : nn.BatchNorm2d or nn.Identity
    """

    # pairs of a layer and the batch norm that it alone feeds
    FOLDABLE: ClassVar[tuple[tuple[str, str], ...]] = (("conv", "bn"),)

    def __init__(
        self,
        in_channels: PositiveInt,
        out_channels: PositiveInt,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        groups: PositiveInt = 1,
        bias: bool = False,
        *,
        quantizer: QuantizerSpec = "absmean",
        bias_quantizer: QuantizerSpec = "none",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.conv: nn.Module = TernaryConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            groups,
            bias,
            quantizer=quantizer,
            bias_quantizer=bias_quantizer,
            activation_bits=activation_bits,
            layer_config=layer_config,
            seed=seed,
        )
        self.bn: nn.Module = nn.BatchNorm2d(out_channels)
        self.layer_config = layer_config

    def forward(self, x: Tensor) -> Tensor:
        """Normalised outputs ``(B, O, H', W')`` of inputs ``(B, C, H, W)``."""
        output: Tensor = self.bn(self.conv(x))
        return output

    def fuse(self) -> FusedTernaryConvBN:
        """Fold the batch norm into the convolution, for good; the output stays that of eval mode, up to rounding.

        The codes are those of eval mode and are not quantised again. The latent weight and everything else that was
        trained is gone: ``train()`` changes nothing any more, and a checkpoint of it loads into a fused layer only.

        Returns
        -------
        FusedTernaryConvBN
            The layer itself.

        Raises
        ------
        RuntimeError
            In training mode, where statistics still move; or if it is fused already.
        """
        if not isinstance(self.conv, TernaryConv2d):
            raise RuntimeError("fuse(): the layer is fused, or packed, already.")
        if self.training or self.bn.training:
            raise RuntimeError("fuse() in training mode: call eval() first. Statistics and codes still change here.")
        self.conv, self.bn = FoldedConv2d(self.conv, self.bn), nn.Identity()
        return self
