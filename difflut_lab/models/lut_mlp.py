"""A multilayer network of lookup tables: encoder, a stack of LUT layers, head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from difflut_lab.encoders import build_encoder
from difflut_lab.heads import build_head
from difflut_lab.models.base import Model
from difflut_lab.models.stack import build_layer, plan
from difflut_lab.registry import register_model
from difflut_lab.schema import PositiveInt
from difflut_lab.seeding import derive_seed


@register_model("lut_mlp")
class LUTMLP(Model):
    """Features to bits, bits through layers of lookup tables, output bits counted per class.

    In evaluation mode the network is its truth tables; ``with soft(model):`` evaluates the relaxation instead.

    Parameters
    ----------
    widths : list of int
        Nodes per layer. A last width that is not a multiple of the classes is rounded up to one.
    per_layer : mapping, optional
        By layer index, settings of ``layer``, ``node`` and ``layer_config`` that are laid over the groups of the same
        name, for example ``{0: {"layer": {"name": "learnable_routing", "candidates": 16}}}``. An entry with another
        ``name`` replaces the group, one without is merged into it.
    input_shape : tuple of int
        Shape of one sample.
    num_classes : int
        Number of classes.
    encoder, layer, node, head : mapping
        ``name`` and options of the parts.
    layer_config : mapping, optional
        Fields of ``LayerConfig``.
    seed : int
        Every layer's wiring, initial values and flips derive from it, each from a stream of its own.
    """

    def __init__(
        self,
        *,
        widths: Annotated[list[PositiveInt], Field(min_length=1)],
        per_layer: dict[int, dict[str, Any]] | None = None,
        input_shape: tuple[int, ...],
        num_classes: int,
        encoder: Mapping[str, Any],
        layer: Mapping[str, Any],
        node: Mapping[str, Any],
        head: Mapping[str, Any],
        layer_config: Mapping[str, Any] | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        groups = {"layer": layer, "node": node, "layer_config": layer_config or {}}
        widths = self.resolve({"widths": widths, "per_layer": per_layer}, groups, num_classes)["widths"]
        self.encoder = build_encoder(encoder, input_shape)
        size = self.encoder.output_size
        layers = []
        for index, (width, spec) in enumerate(zip(widths, plan(widths, per_layer, groups), strict=True)):
            bits_per_feature = self.encoder.bits_per_feature if index == 0 else None
            layers.append(build_layer(spec, size, width, bits_per_feature, derive_seed(seed, "layer", index)))
            layers[-1].layer_index = index
            size = width
        self.layers = nn.Sequential(*layers)
        self.head = build_head(head, size, num_classes, derive_seed(seed, "head"))

    @classmethod
    def resolve(
        cls, options: Mapping[str, Any], groups: Mapping[str, Any], num_classes: int | None = None
    ) -> dict[str, Any]:
        """Check ``per_layer``; with the number of classes known, round the last width up to a multiple of it."""
        widths, per_layer = list(options["widths"]), options.get("per_layer")
        plan(widths, per_layer, groups)
        if num_classes is not None:
            widths[-1] = math.ceil(widths[-1] / num_classes) * num_classes
        return {"widths": widths, "per_layer": per_layer or {}}

    def calibrate(self, x: Tensor) -> None:
        """Fit the encoder's thresholds on the training split, ``(S, *input_shape)``."""
        self.encoder.fit(x)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, num_classes)`` of normalised features ``(B, *input_shape)``."""
        scores: Tensor = self.head(self.layers(self.encoder(x)))
        return scores
