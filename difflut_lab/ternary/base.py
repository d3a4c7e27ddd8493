"""The base class of layers with ternary weights.

Shape letters: B batch, O output features or channels, I input features or channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers import LayerConfig
from difflut_lab.layers.stabilization import stabilize
from difflut_lab.schema import PartOf
from difflut_lab.seeding import derive_seed, generator
from difflut_lab.ternary.activation_quantization import fake_quantize
from difflut_lab.ternary.quantizers import Quantizer, Ternary, build_quantizer
from difflut_lab.ternary.quantizers.base import straight_through

# the options that all ternary layers have, as annotations
QuantizerSpec = Annotated[str | dict[str, Any] | Quantizer, PartOf("quantizer")]
ActivationBits = Literal[8] | None
LayerConfigSpec = LayerConfig | Mapping[str, Any] | None


class Augmented(nn.Module):
    """A module with a ``layer_config``, which it shares with all such modules in it."""

    _layer_config: LayerConfig

    @property
    def layer_config(self) -> LayerConfig:
        """Augmentation while training; may be replaced at any time, in this module and all that are in it."""
        return self._layer_config

    @layer_config.setter
    def layer_config(self, config: LayerConfigSpec) -> None:
        if not isinstance(config, LayerConfig | Mapping | None):
            raise ConfigError(f"layer_config={config!r}: must be a LayerConfig or a mapping of its fields.")
        if not isinstance(config, LayerConfig):
            config = LayerConfig(**schema.validate(LayerConfig, config or {}, "layer_config"))
        for module in self.modules():
            if isinstance(module, Augmented):
                module._layer_config = config


class TernaryLayer(Augmented):
    """A layer whose weight is quantised anew in every forward, from a latent float weight that is trained.

    A subclass computes its output from ``effective_weight()`` and ``effective_bias()``, with inputs that
    ``quantize_activations`` has seen, and returns ``stabilize(y)``.

    Parameters
    ----------
    weight_shape : tuple of int
        ``(O, I, ...)``
    bias : bool
        Whether there is a bias, one value per output.
    quantizer : str, mapping or Quantizer
        Registered name of the weight's quantizer, with its options; ``none`` keeps the weight in float.
    bias_quantizer : str, mapping or Quantizer
        The same for the bias.
    activation_bits : int, optional
        8 rounds the inputs to 8-bit integers, with one step per token or sample; None leaves them as they are.
    layer_config : LayerConfig or mapping, optional
        Augmentation while training: with ``flip_probability`` a weight's code becomes one of the other two;
        stabilisation acts on the gradient of the output.
    seed : int
        Initial values and flips each have a stream of their own; the global random state is neither read nor changed.

    Attributes
    ----------
    weight : nn.Parameter
        The latent weight; at the start uniform within ``sqrt(6 / fan_in)`` (He et al., arXiv 1502.01852).
    bias : nn.Parameter or None
        The latent bias, at the start uniform within ``1 / sqrt(fan_in)``.
    draw_step : Tensor
        Number of training forwards so far in which something was drawn, int64, a buffer.
    """

    # the dimension of the output that its features or channels are
    FEATURE_DIM: ClassVar[int] = -1

    draw_step: Tensor

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        *,
        quantizer: QuantizerSpec = "absmean",
        bias_quantizer: QuantizerSpec = "none",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if activation_bits not in (None, 8):
            raise ConfigError(f"activation_bits={activation_bits}: must be 8, or null for inputs in float.")
        self.activation_bits = activation_bits
        self.layer_config = layer_config
        self.seed = seed
        fan_in = math.prod(weight_shape[1:])
        self.weight = nn.Parameter(_uniform(weight_shape, math.sqrt(6 / fan_in), seed, "weight"))
        self.bias = nn.Parameter(_uniform(weight_shape[:1], 1 / math.sqrt(fan_in), seed, "bias")) if bias else None
        self.quantizer = build_quantizer(quantizer)
        self.bias_quantizer = build_quantizer(bias_quantizer)
        self.quantizer.prepare(self.weight)
        if self.bias is not None:
            self.bias_quantizer.prepare(self.bias)
        self.register_buffer("draw_step", torch.zeros((), dtype=torch.int64))

    @property
    def is_float(self) -> bool:
        """Whether the weight stays as it is."""
        return self.quantizer.is_float

    @torch.no_grad()
    def quantized(self) -> Ternary:
        """Codes, scale and skew that the layer has in eval mode.

        Raises
        ------
        TypeError
            If the layer's weight stays in float.
        """
        ternary: Ternary = self.quantizer(self.weight)
        return ternary

    def effective_weight(self) -> Tensor:
        """The weight of this forward, ``(O, I, ...)``; in training drawn and flipped as configured."""
        if self.training and self._is_random:
            self.draw_step += 1
        return self._effective(self.weight, self.quantizer, "weight")

    def effective_bias(self) -> Tensor | None:
        """The bias of this forward, ``(O,)``, or None."""
        return None if self.bias is None else self._effective(self.bias, self.bias_quantizer, "bias")

    def quantize_activations(self, x: Tensor) -> Tensor:
        """Inputs as the layer sees them: rounded to 8 bits per token where it is so configured."""
        return x if self.activation_bits is None else fake_quantize(x, self._token_dims(x))

    def stabilize(self, y: Tensor) -> Tensor:
        """The identity on an output, whose gradient is standardised as configured, in training mode."""
        return stabilize(y, self.layer_config, self.FEATURE_DIM) if self.training else y

    def extra_repr(self) -> str:
        bits = f", activation_bits={self.activation_bits}" if self.activation_bits else ""
        return f"bias={self.bias is not None}{bits}, {self.layer_config}"

    @property
    def _is_random(self) -> bool:
        flips = self.layer_config.flip_probability > 0 and not self.is_float
        return flips or self.quantizer.draws or self.bias_quantizer.draws

    def _token_dims(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions that the values which share an activation step extend over."""
        return (-1,)

    def _effective(self, latent: Tensor, quantizer: Quantizer, what: str) -> Tensor:
        if quantizer.is_float:
            return latent
        if not self.training:
            value: Tensor = quantizer(latent).values()
            return value
        ternary: Ternary = quantizer(latent, self._draws(what, latent.device) if quantizer.draws else None)
        probability = self.layer_config.flip_probability if what == "weight" else 0.0
        if probability:
            codes = flip_codes(ternary.codes, probability, self._draws("flips", latent.device))
            ternary = ternary._replace(codes=codes)
        value = ternary.values()
        return value if quantizer.blend == 1 else quantizer.blend * value + (1 - quantizer.blend) * latent

    def _draws(self, purpose: str, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(derive_seed(self.seed, purpose, int(self.draw_step)))


def flip_codes(codes: Tensor, probability: float, draws: torch.Generator) -> Tensor:
    """Codes of which each becomes, with a probability, one of the other two, both as likely; gradients pass unchanged.

    Parameters
    ----------
    codes : Tensor
        -1, 0 or +1, any shape.
    probability : float
        From 0 to 1.
    draws : Generator
        Source of randomness, on the device of the codes.
    """
    noise = torch.rand(codes.shape, generator=draws, device=codes.device)
    # 0 where the code stays, else 1 or 2: how far to go round the three codes
    turn = (noise < probability).to(codes.dtype) + (noise < probability / 2).to(codes.dtype)
    flipped = torch.remainder(codes.detach() + turn + 1, 3) - 1
    return straight_through(codes, flipped, 1.0)


def _uniform(shape: tuple[int, ...], bound: float, seed: int, purpose: str) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, "init", purpose))
