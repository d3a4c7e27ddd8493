"""A multilayer perceptron with ternary weights."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from difflut_lab.models.base import Model
from difflut_lab.registry import register_model
from difflut_lab.schema import PositiveInt, Probability
from difflut_lab.seeding import derive_seed
from difflut_lab.ternary import TernaryLinear, build_activation
from difflut_lab.ternary.base import ActivationBits, LayerConfigSpec, QuantizerSpec


@register_model("ternary_mlp")
class TernaryMLP(Model):
    """Linear layers with ternary weights, each followed by batch normalisation and an activation.

    The first and the last linear layer are in float, unless told otherwise.

    Parameters
    ----------
    widths : list of int
        Features of the hidden layers.
    activation : str
        ``relu``, ``ternary`` (thresholds +-0.5) or ``learnable_ternary`` (a threshold per feature).
    activation_bits : int, optional
        8 rounds the inputs of ternary layers to 8-bit integers.
    dropout : float
        Probability with which a hidden feature is 0 in training.
    quantize_first, quantize_last : bool
        Whether the first and the last linear layer are ternary, too.
    input_shape : tuple of int
        Shape of a sample; samples are flattened.
    num_classes : int
        Number of classes.
    quantizer : str or mapping
        Of the weights; ``none`` gives the float network of the same shape.
    layer_config : LayerConfig or mapping, optional
        Augmentation of every ternary layer.
    seed : int
        Initial values and flips derive from it.
    """

    def __init__(
        self,
        *,
        widths: Annotated[list[PositiveInt], Field(min_length=1)],
        activation: Literal["relu", "ternary", "learnable_ternary"] = "relu",
        activation_bits: ActivationBits = None,
        dropout: Probability = 0.0,
        quantize_first: bool = False,
        quantize_last: bool = False,
        input_shape: tuple[int, ...],
        num_classes: int,
        quantizer: QuantizerSpec = "absmean",
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        ternary: dict[str, Any] = {
            "quantizer": quantizer,
            "activation_bits": activation_bits,
            "layer_config": layer_config,
        }
        sizes = [math.prod(input_shape), *widths]
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            options = ternary if index or quantize_first else {"quantizer": "none"}
            # batch normalisation has a bias
            layers += [
                TernaryLinear(inputs, outputs, bias=False, seed=derive_seed(seed, "layer", index), **options),
                nn.BatchNorm1d(outputs),
                build_activation(activation, outputs, layer_config=layer_config, seed=derive_seed(seed, "act", index)),
            ]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers)
        last = ternary if quantize_last else {"quantizer": "none"}
        self.fc = TernaryLinear(sizes[-1], num_classes, seed=derive_seed(seed, "fc"), **last)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, num_classes)`` of normalised features ``(B, *input_shape)``."""
        scores: Tensor = self.fc(self.layers(x.flatten(1)))
        return scores
