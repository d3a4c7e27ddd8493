"""A recurrent network with ternary weights."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.models.base import Model
from difflut_lab.registry import register_model
from difflut_lab.schema import PositiveInt
from difflut_lab.seeding import derive_seed
from difflut_lab.ternary import TernaryLinear, TernaryLSTM
from difflut_lab.ternary.base import ActivationBits, LayerConfigSpec, QuantizerSpec


@register_model("ternary_lstm")
class TernaryLSTMClassifier(Model):
    """An LSTM with ternary weights that reads a sample as a sequence and classifies its last output.

    Images are read row by row, tables ``(T, F)`` step by step. Each step is embedded by a linear layer first. That
    layer and the last one are in float, unless told otherwise.

    Parameters
    ----------
    hidden_size, num_layers : int
        Of the LSTM; the embedding has ``hidden_size`` features, too.
    activation_bits : int, optional
        8 rounds the inputs of ternary layers to 8-bit integers, with a step per time step.
    quantize_first, quantize_last : bool
        Whether the embedding and the last layer are ternary, too.
    input_shape : tuple of int
        Shape of a sample, (C, H, W), read as H steps of C * W features; or (T, F).
    num_classes : int
        Number of classes.
    quantizer : str or mapping
        Of the weights; ``none`` gives the float network of the same shape.
    layer_config : LayerConfig or mapping, optional
        Augmentation of every ternary layer.
    seed : int
        Initial values and flips derive from it.

    Raises
    ------
    ConfigError
        If samples are no sequences.
    """

    def __init__(
        self,
        *,
        hidden_size: PositiveInt = 128,
        num_layers: PositiveInt = 1,
        activation_bits: ActivationBits = None,
        quantize_first: bool = False,
        quantize_last: bool = False,
        input_shape: tuple[int, ...],
        num_classes: int,
        quantizer: QuantizerSpec = "absmean",
        layer_config: LayerConfigSpec = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if len(input_shape) not in (2, 3):
            raise ConfigError(
                f"model.name=ternary_lstm: samples must be images (channels, height, width) or sequences (steps, "
                f"features); these have shape {tuple(input_shape)}."
            )
        features = math.prod(input_shape) // input_shape[-2]
        ternary: dict[str, Any] = {
            "quantizer": quantizer,
            "activation_bits": activation_bits,
            "layer_config": layer_config,
        }
        floating = {"quantizer": "none"}
        self.embed = TernaryLinear(
            features, hidden_size, seed=derive_seed(seed, "embed"), **(ternary if quantize_first else floating)
        )
        self.lstm = TernaryLSTM(hidden_size, hidden_size, num_layers, seed=derive_seed(seed, "lstm"), **ternary)
        self.fc = TernaryLinear(
            hidden_size, num_classes, seed=derive_seed(seed, "fc"), **(ternary if quantize_last else floating)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, num_classes)`` of normalised samples ``(B, C, H, W)`` or ``(B, T, F)``."""
        steps = x.transpose(1, 2).flatten(2) if x.dim() == 4 else x
        output, _ = self.lstm(self.embed(steps))
        scores: Tensor = self.fc(output[:, -1])
        return scores
