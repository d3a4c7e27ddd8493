"""Packed networks as files: safetensors, with a description of the model in the metadata."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from difflut_lab.errors import CheckpointError, ConfigError
from difflut_lab.registry import REGISTRY
from difflut_lab.ternary.packed.layers import PackedLayer, PackError
from difflut_lab.ternary.packing import FoldedBatchNorm, packable, packed_form, replace

FORMAT = 1
KEY = "difflut_lab"  # of our part of the metadata


def save_packed(
    model: nn.Module,
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a packed model, whole or not at all.

    Parameters
    ----------
    model : nn.Module
        What ``pack`` returned.
    path : str or Path
        The file, by custom ``*.safetensors``; one that is there is replaced.
    config : mapping, optional
        How a registered model is built, for ``load_packed(path)`` to do it: its registered ``name`` and the arguments
        of its constructor, ``input_shape`` and ``num_classes`` included, as plain values. Without it the file is loaded
        into a model that is there already.
    about : mapping, optional
        Further plain values that the file shall keep, such as names of classes; see ``read_header``.

    Raises
    ------
    PackError
        If the model is not packed, or part of its state is no tensor.
    ConfigError
        If the configuration is that of another model, or holds other than plain values.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
    if not layers:
        raise PackError(f"This {type(model).__name__} is not packed: save what pack(model) returns.")
    if config is not None and "name" not in config:
        raise ConfigError("config.name: must be given, the registered name of the model.")
    if config is not None and type(model) is not REGISTRY.get("model", config["name"]):
        raise ConfigError(f"config.name={config['name']}: the model is a {type(model).__name__}, which is another one.")
    header = {
        "format": FORMAT,
        "config": config,
        "about": about or {},
        "layers": {name: layer.settings() for name, layer in layers.items()},
        "folded": [name for name, module in model.named_modules() if isinstance(module, FoldedBatchNorm)],
    }
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise PackError(f"'{name}' in the state of this {type(model).__name__} is no tensor: no file can hold it.")
        # of its own memory, which a tensor that two modules share has not
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    _write(Path(path), save(tensors, {KEY: _json(header)}))


def load_packed(path: str | Path, *, into: nn.Module | None = None) -> nn.Module:
    """Rebuild a packed model from its file, without running any code of the file.

    Parameters
    ----------
    path : str or Path
        What ``save_packed`` wrote.
    into : nn.Module, optional
        A model of the same structure, not packed, with any weights: it is packed in place and gets the file's content.
        Needed where the file was written without ``config``.

    Returns
    -------
    nn.Module
        In eval mode; ``into`` itself, or what replaces it where it is a single layer.

    Raises
    ------
    CheckpointError
        If there is no such file, it is of another kind or format, or its content does not fit the model.
    ConfigError
        If the file's model is not registered.
    """
    header = read_header(path)
    if into is None:
        if header["config"] is None:
            raise CheckpointError(
                f"{path}: does not say how its model is built; build it, and write load_packed(path, into=model)."
            )
        into = _build(header["config"], path)
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    layers, modules = dict(packable(into)), dict(into.named_modules())
    apart = set(header["layers"]).symmetric_difference(layers) | set(header["folded"]).difference(modules)
    if apart:
        raise CheckpointError(f"{path}: belongs to another model: not in both are {', '.join(sorted(apart))}.")
    replaced: dict[nn.Module, nn.Module] = {modules[name]: FoldedBatchNorm() for name in header["folded"]}
    for name, there in header["layers"].items():
        kind, here = packed_form(name, layers[name])
        for key, value in here.items():
            if there[key] != value:
                raise CheckpointError(
                    f"{path}: belongs to another model: {key} of layer '{name}' is {there[key]} there, {value} here."
                )
        prefix = f"{name}." if name else ""
        replaced[layers[name]] = kind.empty(there, [key.removeprefix(prefix) for key in state])
    model = replace(into, replaced).eval().requires_grad_(False)
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:  # ValueError: codes that are none, or too few
        problems = str(error).splitlines()
        lines = "; ".join(line.strip() for line in problems[1:4] or problems)
        raise CheckpointError(f"{path}: does not fit this model: {lines}") from None
    return model


def read_header(path: str | Path) -> dict[str, Any]:
    """What a packed file says of itself, as plain values.

    Parameters
    ----------
    path : str or Path
        What ``save_packed`` wrote.

    Returns
    -------
    dict
        ``format``; ``config`` and ``about`` as given to ``save_packed``; ``layers``, of each packed layer its shape and
        settings; ``folded``, names of batch norms that the layers contain.

    Raises
    ------
    CheckpointError
        If there is no such file, or it is of another kind or format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is no safetensors file, or damaged ({error}).") from None
    if KEY not in metadata:
        raise CheckpointError(f"{path}: is not a packed network of difflut_lab.")
    header: dict[str, Any] = json.loads(metadata[KEY])
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {header['format']}; this version of difflut_lab reads format {FORMAT}."
        )
    return header


def _build(config: Mapping[str, Any], path: str | Path) -> nn.Module:
    options = {key: tuple(value) if key == "input_shape" else value for key, value in config.items()}
    try:
        model: nn.Module = REGISTRY.build("model", options)
    except TypeError as error:
        raise CheckpointError(f"{path}: its model '{config['name']}' is built otherwise here: {error}.") from None
    return model


def _json(header: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        raise ConfigError(f"{value!r} in the description of a packed model: must be a plain value.")

    return json.dumps(header, default=plain)


def _write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, which becomes its name when it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
