"""Linear layers and convolutions that hold codes of two bits and no latent weight.

Shape letters: B batch, O output features or channels, I input features or channels that an output reads, K all weights
that an output has, G groups of input channels that share a scale, W words that K codes take.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from difflut_lab.errors import UserError
from difflut_lab.ops.ternary_linear import (
    pack_base3,
    pack_codes,
    ternary_conv2d,
    ternary_linear,
    unpack_base3,
    unpack_codes,
)
from difflut_lab.ternary.base import ActivationBits
from difflut_lab.ternary.quantizers import Ternary

Storage = Literal["2bit", "base3"]


class PackError(UserError):
    """A model that has no packed form, or is not in it."""


class PackedLayer(nn.Module):
    """Base class of packed layers: their weight is ``scale * codes + skew * |codes|``, and nothing changes it.

    Nothing is quantised, drawn, flipped or trained any more. A packed layer has no training mode: ``train()`` leaves
    it in eval mode.

    Parameters
    ----------
    weight_shape : sequence of int
        ``(O, I, ...)``
    codes : Tensor
        int32 ``(O, W)``, 16 codes per word.
    scale : Tensor
        ``(O,)``, or ``(O, G)`` with a scale per group.
    skew : Tensor, optional
        Of the scale's shape; None where positive and negative weights share their scales.
    bias : Tensor, optional
        ``(O,)``
    group_size : int, optional
        Input channels that share a scale, where not all of an output do.
    activation_bits : int, optional
        8 rounds inputs to 8-bit integers, as ``TernaryLayer`` does, and sums them as integers.
    normalized : bool
        Whether scale, skew and bias contain a batch norm.
    storage : str
        How ``state_dict()``, and so every file, holds the codes: ``2bit``, as in memory, or ``base3``, five codes per
        byte. A layer loads either.
    """

    codes: Tensor
    scale: Tensor
    skew: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight_shape: Sequence[int],
        codes: Tensor,
        scale: Tensor,
        skew: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        group_size: int | None = None,
        activation_bits: ActivationBits = None,
        normalized: bool = False,
        storage: Storage = "2bit",
    ) -> None:
        super().__init__()
        self.weight_shape = tuple(weight_shape)
        self.group_size = group_size
        self.activation_bits = activation_bits
        self.normalized = normalized
        self.storage = storage
        for name, tensor in (("codes", codes), ("scale", scale), ("skew", skew), ("bias", bias)):
            self.register_buffer(name, tensor)
        self.train(False)

    def train(self, mode: bool = True) -> PackedLayer:
        """Stay in eval mode, whatever is asked for: there is nothing to train."""
        return super().train(False)

    def quantized(self) -> Ternary:
        """Codes ``(O, I, ...)`` as floats, scale and skew, as of the layer's ``TernaryLayer.quantized``.

        With the batch norm that they contain, where there is one.
        """
        codes = unpack_codes(self.codes, self._length).to(self.scale.dtype).view(self.weight_shape)
        scale = self._spread(self.scale)
        return Ternary(codes, scale, torch.zeros_like(scale) if self.skew is None else self._spread(self.skew))

    def settings(self) -> dict[str, Any]:
        """What the layer is built with beside its tensors, as plain values."""
        return {
            "weight_shape": list(self.weight_shape),
            "group_size": self.group_size,
            "activation_bits": self.activation_bits,
            "normalized": self.normalized,
            "storage": self.storage,
        }

    @classmethod
    def empty(cls, settings: Mapping[str, Any], names: Container[str]) -> Self:
        """A layer of these settings, with tensors of zeros: ``codes``, ``scale`` and those that are named."""
        outputs, inputs, *kernel = settings["weight_shape"]
        size = settings["group_size"]
        codes = pack_codes(torch.zeros(outputs, inputs * math.prod(kernel), dtype=torch.int8))
        scale = torch.zeros(outputs, math.ceil(inputs / size)) if size else torch.zeros(outputs)
        skew = torch.zeros_like(scale) if "skew" in names else None
        bias = torch.zeros(outputs) if "bias" in names else None
        options = {key: value for key, value in settings.items() if key != "weight_shape"}
        return cls(settings["weight_shape"], codes, scale, skew, bias, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.settings().items() if value)

    @property
    def _length(self) -> int:
        return math.prod(self.weight_shape[1:])

    def _spread(self, values: Tensor) -> Tensor:
        """One value per channel or group, broadcastable against the weight."""
        ones = [1] * (len(self.weight_shape) - 2)
        if self.group_size is None:
            return values.view(-1, 1, *ones)
        spread = values.repeat_interleave(self.group_size, dim=1)[:, : self.weight_shape[1]]
        return spread.reshape(*spread.shape, *ones)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.storage == "base3":
            destination[f"{prefix}codes"] = pack_base3(unpack_codes(self.codes, self._length))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}codes"
        stored = state_dict.get(key)
        if isinstance(stored, Tensor) and stored.dtype == torch.uint8:
            state_dict[key] = pack_codes(unpack_base3(stored, self._length))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PackedLinear(PackedLayer):
    """``TernaryLinear`` for inference: ``(..., I)`` to ``(..., O)``; parameters as of ``PackedLayer``."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(..., O)`` of inputs ``(..., I)``.

        Raises
        ------
        ValueError
            If it contains a batch norm and inputs are not ``(B, I)``.
        """
        if self.normalized and x.dim() != 2:
            # the batch norm would have taken dimension 1 for its channels
            raise ValueError(f"A linear layer that contains a batch norm needs inputs (B, I), not {tuple(x.shape)}.")
        return ternary_linear(
            x,
            self.codes,
            self.scale,
            self.bias,
            self.skew,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
        )


class PackedConv2d(PackedLayer):
    """``TernaryConv2d`` for inference: ``(B, C, H, W)`` to ``(B, O, H', W')``.

    Parameters
    ----------
    weight_shape, codes, scale, skew, bias, group_size, activation_bits, normalized, storage
        As of ``PackedLayer``.
    stride, padding : tuple of int
    groups : int
        As of ``TernaryConv2d``.
    """

    def __init__(
        self,
        weight_shape: Sequence[int],
        codes: Tensor,
        scale: Tensor,
        skew: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        groups: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(weight_shape, codes, scale, skew, bias, **options)
        self.stride = stride[0], stride[1]
        self.padding = padding[0], padding[1]
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(B, O, H', W')`` of inputs ``(B, C, H, W)``."""
        return ternary_conv2d(
            x,
            self.codes,
            self.scale,
            self.bias,
            self.skew,
            weight_shape=self.weight_shape,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
        )

    def settings(self) -> dict[str, Any]:
        """What the layer is built with beside its tensors, as plain values."""
        own = {"stride": list(self.stride), "padding": list(self.padding), "groups": self.groups}
        return super().settings() | own


def shown(name: str) -> str:
    """How messages name a module of a model, or the model itself."""
    return f"Layer '{name}'" if name else "The model"
