"""A linear layer with ternary weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from difflut_lab.registry import register_ternary
from difflut_lab.schema import PositiveInt
from difflut_lab.ternary.base import ActivationBits, LayerConfigSpec, QuantizerSpec, TernaryLayer


@register_ternary("linear")
class TernaryLinear(TernaryLayer):
    """``nn.Linear`` with ternary weights: ``(..., I)`` to ``(..., O)``.

    Parameters
    ----------
    in_features, out_features : int
        I and O.
    bias, quantizer, bias_quantizer, activation_bits, layer_config, seed
        As of ``TernaryLayer``.
    """

    def __init__(
        self,
        in_features: PositiveInt,
        out_features: PositiveInt,
        bias: bool = True,
        *,
        quantizer: QuantizerSpec = "absmean",
        bias_quantizer: QuantizerSpec = "none",
        activation_bits: ActivationBits = None,
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__(
            (out_features, in_features),
            bias,
            quantizer=quantizer,
            bias_quantizer=bias_quantizer,
            activation_bits=activation_bits,
            layer_config=layer_config,
            seed=seed,
        )
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(..., O)`` of inputs ``(..., I)``."""
        return self.bound()(x)

    def bound(self) -> Callable[[Tensor], Tensor]:
        """The layer with its weight quantised now, and codes drawn and flipped, for use on several inputs."""
        weight, bias = self.effective_weight(), self.effective_bias()

        def apply(x: Tensor) -> Tensor:
            return self.stabilize(functional.linear(self.quantize_activations(x), weight, bias))

        return apply

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {super().extra_repr()}"
