"""Vision transformers with ternary weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from difflut_lab.errors import ConfigError
from difflut_lab.models.base import Model
from difflut_lab.registry import register_model
from difflut_lab.schema import PositiveInt, Probability
from difflut_lab.seeding import derive_seed, generator
from difflut_lab.ternary import TernaryAttention, TernaryConv2d, TernaryLinear
from difflut_lab.ternary.base import ActivationBits, LayerConfigSpec, QuantizerSpec


@register_model("ternary_vit")
class TernaryViT(Model):
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929) whose blocks have ternary weights.

    Patches are embedded by a convolution in float, learned positions are added, blocks normalise before attention and
    before the two linear layers behind it, and the last layer, in float, reads the mean over the patches.

    Parameters
    ----------
    patch_size : int
        Side of a patch in pixels; must divide the images' height and width.
    d_model, num_heads, depth : int
        Features of a patch, attention heads, number of blocks.
    mlp_ratio : int
        Hidden features of a block's linear layers, in units of ``d_model``.
    dropout : float
        Probability of dropping attention weights, and hidden features of the linear layers, in training.
    activation_bits : int, optional
        8 rounds the inputs of ternary layers to 8-bit integers, with a step per patch.
    quantize_first, quantize_last : bool
        Whether the embedding and the last layer are ternary, too.
    input_shape : tuple of int
        Shape of a sample, (C, H, W).
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
        If samples are no images, patches do not fit them, or the heads do not divide the features.
    """

    def __init__(
        self,
        *,
        patch_size: PositiveInt = 4,
        d_model: PositiveInt = 96,
        num_heads: PositiveInt = 3,
        depth: PositiveInt = 6,
        mlp_ratio: PositiveInt = 2,
        dropout: Probability = 0.0,
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
        if len(input_shape) != 3:
            raise ConfigError(
                f"model.name=ternary_vit: samples must be images (channels, height, width); these have shape "
                f"{tuple(input_shape)}. For them there is ternary_mlp."
            )
        channels, height, width = input_shape
        if height % patch_size or width % patch_size:
            raise ConfigError(f"model.patch_size={patch_size}: must divide the images' size, {height} x {width}.")
        ternary: dict[str, Any] = {
            "quantizer": quantizer,
            "activation_bits": activation_bits,
            "layer_config": layer_config,
        }
        floating = {"quantizer": "none"}
        self.embed = TernaryConv2d(
            channels,
            d_model,
            patch_size,
            patch_size,
            seed=derive_seed(seed, "embed"),
            **(ternary if quantize_first else floating),
        )
        patches = (height // patch_size) * (width // patch_size)
        draws = generator(seed, "positions")
        # as of the paper's code: a normal distribution of standard deviation 0.02
        self.positions = nn.Parameter(0.02 * torch.randn(1, patches, d_model, generator=draws))
        self.blocks = nn.Sequential(
            *(
                _Block(d_model, num_heads, d_model * mlp_ratio, dropout, ternary, derive_seed(seed, "block", index))
                for index in range(depth)
            )
        )
        self.norm = nn.LayerNorm(d_model)
        self.fc = TernaryLinear(
            d_model, num_classes, seed=derive_seed(seed, "fc"), **(ternary if quantize_last else floating)
        )

    @classmethod
    def resolve(
        cls, options: Mapping[str, Any], groups: Mapping[str, Any], num_classes: int | None = None
    ) -> dict[str, Any]:
        """Check that the heads divide the features."""
        if options["d_model"] % options["num_heads"]:
            raise ConfigError(
                f"model.num_heads={options['num_heads']}: must divide model.d_model={options['d_model']}."
            )
        return dict(options)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, num_classes)`` of normalised images ``(B, C, H, W)``."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        scores: Tensor = self.fc(self.norm(self.blocks(tokens)).mean(dim=1))
        return scores


class _Block(nn.Module):
    """Attention and two linear layers, each with normalisation before and a shortcut around it."""

    def __init__(
        self, d_model: int, num_heads: int, hidden: int, dropout: float, ternary: Mapping[str, Any], seed: int
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = TernaryAttention(
            d_model, num_heads, dropout=dropout, seed=derive_seed(seed, "attention"), **ternary
        )
        self.norm2 = nn.LayerNorm(d_model)
        self.fc1 = TernaryLinear(d_model, hidden, seed=derive_seed(seed, "fc1"), **ternary)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = TernaryLinear(hidden, d_model, seed=derive_seed(seed, "fc2"), **ternary)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, d_model)`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        hidden = functional.gelu(self.fc1(self.norm2(x)))
        y: Tensor = x + self.fc2(self.dropout(hidden))
        return y
