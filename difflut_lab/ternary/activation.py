"""Activations that are trits: -1, 0 or +1."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from difflut_lab.errors import ConfigError
from difflut_lab.layers.stabilization import stabilize
from difflut_lab.registry import register_ternary
from difflut_lab.schema import PositiveInt
from difflut_lab.seeding import derive_seed
from difflut_lab.ternary.base import Augmented, LayerConfigSpec, flip_codes

THRESHOLD = 0.5

Activation = Literal["relu", "ternary", "learnable_ternary"]


@register_ternary("activation")
class TernaryActivation(Augmented):
    """The sign of inputs beyond thresholds of +-0.5, else 0.

    The gradient is that of ``clip(x, -1, 1)``: it passes where ``|x| <= 1`` (straight-through, Hubara et al.,
    arXiv 1602.02830).

    Parameters
    ----------
    layer_config : LayerConfig or mapping, optional
        Augmentation while training: with ``flip_probability`` a trit becomes one of the other two; stabilisation acts
        on the gradient of the output.
    seed : int
        Of the flips.
    feature_dim : int
        The dimension of features or channels, for stabilisation.

    Attributes
    ----------
    draw_step : Tensor
        Number of training forwards with flips so far, int64, a buffer.
    """

    draw_step: Tensor

    def __init__(self, *, layer_config: LayerConfigSpec = None, seed: int = 42, feature_dim: int = 1) -> None:
        super().__init__()
        self.layer_config = layer_config
        self.seed = seed
        self.feature_dim = feature_dim
        self.register_buffer("draw_step", torch.zeros((), dtype=torch.int64))

    def trits(self, x: Tensor) -> Tensor:
        """Codes of inputs, with their gradients."""
        value: Tensor = _Trits.apply(x)
        return value

    def forward(self, x: Tensor) -> Tensor:
        """Trits, as floats, of inputs of any shape."""
        y = self.trits(x)
        if not self.training:
            return y
        if self.layer_config.flip_probability:
            seed = derive_seed(self.seed, "flips", int(self.draw_step))
            y = flip_codes(y, self.layer_config.flip_probability, torch.Generator(x.device).manual_seed(seed))
            self.draw_step += 1
        return stabilize(y, self.layer_config, self.feature_dim)

    def extra_repr(self) -> str:
        return f"{self.layer_config}"


@register_ternary("learnable_activation")
class LearnableTernaryActivation(TernaryActivation):
    """The sign of inputs beyond a threshold of their feature, which is learned, else 0.

    With threshold t, the output's slope is that of ``clip(x / (2 t), -1, 1)``, a ramp whose rounding the trit is: for
    ``|x| <= 2 t`` the gradient of x is 1 / (2 t), and that of t is ``-x / (2 t^2)``, so that a threshold grows where
    inputs shall rather be 0. t is ``softplus`` of the parameter, and so stays positive.

    Parameters
    ----------
    num_features : int
        Features of inputs ``(B, F)``, channels of inputs ``(B, F, H, W)``: size of ``feature_dim``.
    layer_config, seed, feature_dim
        As of ``TernaryActivation``.

    Attributes
    ----------
    raw_threshold : nn.Parameter
        ``(F,)``; thresholds start at 0.5.
    """

    def __init__(
        self,
        num_features: PositiveInt,
        *,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
        feature_dim: int = 1,
    ) -> None:
        super().__init__(layer_config=layer_config, seed=seed, feature_dim=feature_dim)
        self.num_features = num_features
        self.raw_threshold = nn.Parameter(torch.full((num_features,), math.log(math.expm1(THRESHOLD))))

    @property
    def threshold(self) -> Tensor:
        """Thresholds ``(F,)``, positive."""
        return functional.softplus(self.raw_threshold)

    def trits(self, x: Tensor) -> Tensor:
        """Codes of inputs, with gradients for them and for the thresholds.

        Raises
        ------
        ValueError
            If the inputs have another number of features.
        """
        if x.shape[self.feature_dim] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} expects {self.num_features} features in dimension {self.feature_dim}, got "
                f"inputs of shape {tuple(x.shape)}."
            )
        shape = [1] * x.dim()
        shape[self.feature_dim] = self.num_features
        value: Tensor = _LearnableTrits.apply(x, self.threshold.to(x.dtype).view(shape))
        return value

    def extra_repr(self) -> str:
        return f"{self.num_features}, {super().extra_repr()}"


def build_activation(
    name: Activation, num_features: int, *, layer_config: LayerConfigSpec = None, seed: int = 42
) -> nn.Module:
    """An activation of features in dimension 1.

    Parameters
    ----------
    name : str
        ``relu``, ``ternary`` or ``learnable_ternary``.
    num_features : int
        Features or channels.
    layer_config : LayerConfig or mapping, optional
        Augmentation of trits.
    seed : int
        Of their flips.

    Raises
    ------
    ConfigError
        If there is no such activation.
    """
    if name == "relu":
        return nn.ReLU()
    if name == "ternary":
        return TernaryActivation(layer_config=layer_config, seed=seed)
    if name == "learnable_ternary":
        return LearnableTernaryActivation(num_features, layer_config=layer_config, seed=seed)
    raise ConfigError(f"activation={name}: must be one of relu, ternary, learnable_ternary.")


class _Trits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() <= 1)
        return torch.where(x.abs() > THRESHOLD, torch.sign(x), 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inside,) = ctx.saved_tensors
        return gradient * inside


class _LearnableTrits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold)
        return torch.where(x.abs() > threshold, torch.sign(x), 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, threshold = ctx.saved_tensors
        slope = torch.where(x.abs() <= 2 * threshold, gradient / (2 * threshold), 0.0)
        return slope, -(slope * x / threshold).sum_to_size(threshold.shape)
