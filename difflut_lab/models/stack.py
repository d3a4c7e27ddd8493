"""Stacks of layers that share configuration groups: what each layer of a model is, and building it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.layers import BaseLUTLayer, LayerConfig
from difflut_lab.registry import REGISTRY

GROUPS = ("layer", "node", "layer_config")


def plan(
    widths: list[int], per_layer: Mapping[Any, Any] | None, groups: Mapping[str, Any]
) -> list[dict[str, dict[str, Any]]]:
    """The groups of each layer, ``per_layer`` laid over them and checked.

    Parameters
    ----------
    widths : list of int
        Nodes of each layer; here only how many there are matters.
    per_layer : mapping, optional
        By index, settings of the groups of a layer.
    groups : mapping
        ``layer``, ``node`` and ``layer_config``, which the layers share.

    Raises
    ------
    ConfigError
        If there is no such layer or group, or a part refuses its options.
    """
    specs = [{group: dict(groups[group]) for group in GROUPS} for _ in widths]
    for index, overlay in (per_layer or {}).items():
        prefix = f"model.per_layer.{index}"
        # YAML has integer keys, the command line has words
        if not str(index).isdecimal() or int(index) >= len(widths):
            raise ConfigError(
                f"{prefix}: there is no such layer; model.widths={widths} has layers 0 to {len(widths) - 1}."
            )
        if not isinstance(overlay, Mapping):
            raise ConfigError(f"{prefix}={overlay!r}: must be a mapping of {', '.join(GROUPS)}.")
        for group, values in overlay.items():
            if group not in GROUPS:
                raise ConfigError(f"Unknown key '{prefix}.{group}'. Allowed: {', '.join(GROUPS)}.")
            values = {"name": values} if isinstance(values, str) else dict(values)
            merged = _overlay(specs[int(index)][group], values)
            if group == "layer_config":
                merged = schema.validate(LayerConfig, merged, f"{prefix}.{group}")
            else:
                merged = schema.validate_part(group, merged, f"{prefix}.{group}")
            specs[int(index)][group] = merged
    return specs


def _overlay(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A part of another name brings its own options; fan-in stays what it was unless it says otherwise."""
    if values.get("name", base.get("name")) == base.get("name"):
        return base | values
    return ({"n": base["n"]} if "n" in base else {}) | values


def build_layer(
    spec: Mapping[str, Mapping[str, Any]], input_size: int, output_size: int, bits_per_feature: int | None, seed: int
) -> BaseLUTLayer:
    """Build a layer of ``plan``.

    Parameters
    ----------
    spec : mapping
        The layer's groups.
    input_size, output_size : int
        F and N.
    bits_per_feature : int, optional
        Of the encoder, for the layer that reads it; told to layers that ask.
    seed : int
        Of the layer.
    """
    options, node = dict(spec["layer"]), dict(spec["node"])
    layer_class = REGISTRY.get("layer", options.pop("name"))
    if "bits_per_feature" in schema.options(layer_class):
        options["bits_per_feature"] = bits_per_feature
    layer: BaseLUTLayer = layer_class(
        input_size=input_size,
        output_size=output_size,
        node_type=node.pop("name"),
        n=node.pop("n"),
        node_kwargs=node,
        layer_config=LayerConfig(**spec["layer_config"]),
        seed=seed,
        **options,
    )
    return layer
