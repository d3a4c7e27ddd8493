"""A run's checkpoint, packed: a network without float latent weights, in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difflut_lab import schema
from difflut_lab.data import DataSet
from difflut_lab.errors import CheckpointError
from difflut_lab.models import Model
from difflut_lab.registry import REGISTRY
from difflut_lab.ternary import TernaryActivation
from difflut_lab.ternary.packed.file import load_packed, read_header, save_packed
from difflut_lab.ternary.packed.layers import PackedLayer, Storage
from difflut_lab.ternary.packing import pack
from difflut_lab.training import plugins
from difflut_lab.training.checkpoint import KEY, load_network, read
from difflut_lab.training.compose import groups_of, model_of
from difflut_lab.training.datamodule import Batches
from difflut_lab.training.network import Network

SUFFIX = ".safetensors"
# what a packed file says of a network beside its model
ABOUT = ("class_names", "mean", "std", "plugins")


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """What packing did to a layer."""

    name: str
    # in the network

    weight_shape: tuple[int, ...]
    # of the ternary weight

    zeros: float
    # share of the codes that are 0

    float_bytes: int
    # of the weight as float32

    packed_bytes: int
    # of the codes, scales, skews and bias in the file


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed network, and what there is to say of it."""

    network: Network
    # in eval mode

    path: Path
    # of its file

    layers: list[LayerSize]
    # of each ternary layer

    float_bytes: int
    # of all that the network was

    packed_bytes: int
    # of the file


def pack_checkpoint(path: str | Path, output: str | Path | None = None, *, storage: Storage = "2bit") -> Packed:
    """Pack a run's network and write it.

    Parameters
    ----------
    path : str or Path
        ``best.ckpt`` or ``last.ckpt``.
    output : str or Path, optional
        The file to write; by default ``best.safetensors`` or ``last.safetensors`` beside it.
    storage : str
        As of ``difflut_lab.ternary.pack``.

    Raises
    ------
    UserError
        If the checkpoint cannot be read, its network not be packed, or the file not be written.
    """
    network = load_network(path)
    packed = pack(network, storage=storage)
    assert isinstance(packed, Network)
    about = read(path)[KEY]
    config = _model_options(about["config"], about["input_shape"], len(about["class_names"]))
    output = Path(path).with_suffix(SUFFIX) if output is None else Path(output)
    try:
        save_packed(packed.model, output, config=config, about={key: about[key] for key in ABOUT})
    except OSError as error:
        raise CheckpointError(f"output={output}: cannot be written: {error.strerror}.") from None
    layers = {name: layer for name, layer in packed.model.named_modules() if isinstance(layer, PackedLayer)}
    return Packed(
        network=packed,
        path=output,
        layers=[_layer_size(name, layer) for name, layer in layers.items()],
        float_bytes=_num_bytes(network.state_dict()),
        packed_bytes=output.stat().st_size,
    )


def load_packed_network(path: str | Path) -> Network:
    """Rebuild a packed network from its file alone: raw features in, class scores out.

    Plugins that the file names are imported first, from the working directory or the import path.

    Parameters
    ----------
    path : str or Path
        What ``pack_checkpoint`` wrote.

    Raises
    ------
    CheckpointError, ConfigError
        If the file is no packed network, or a part that it names is not registered.
    """
    about = read_header(path)["about"]
    if not set(ABOUT) <= set(about):
        raise CheckpointError(
            f"{path}: holds a model without the normalisation of its inputs: difflut_lab.ternary.load_packed loads it."
        )
    plugins.load_plugins(about["plugins"])
    model = load_packed(path)
    assert isinstance(model, Model)
    return Network(model, about["mean"], about["std"], about["class_names"]).eval()


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A network and its packed form on the same samples."""

    accuracy: float
    # of the network

    packed_accuracy: float
    # of its packed form

    samples: int
    # how many there were

    differing: int
    # for how many of them the two name different classes

    rounds: bool
    # whether activations are rounded to 8 bits or trits: a value on the border between two steps may then, by the last
    # bit of a batch norm that is folded or not, be either


@torch.no_grad()
def compare(path: str | Path, packed: Network, data: Mapping[str, Any] | None = None) -> Agreement:
    """Classify the test split that a checkpoint was meant for, with its network and with the packed one.

    Parameters
    ----------
    path : str or Path
        The checkpoint.
    packed : Network
        What ``pack_checkpoint`` made of it.
    data : mapping, optional
        Options of the data set that differ here, such as ``{"root": "elsewhere"}``.

    Raises
    ------
    UserError
        If the data cannot be read, or do not belong to the checkpoint.
    """
    network, config = load_network(path), read(path)[KEY]["config"]
    options = schema.validate_part("data", config["data"] | dict(data or {}), "data")
    data_set: DataSet = REGISTRY.build("data", options).load()
    if list(data_set.class_names) != network.class_names:
        raise CheckpointError(
            f"ckpt={path}: was trained on the classes {network.class_names}, the data has {list(data_set.class_names)}."
        )
    right, packed_right, differing = 0, 0, 0
    for x, y in Batches(data_set.test, config["eval_batch_size"]):
        classes, packed_classes = network.predict(x), packed.predict(x)
        right += int((classes == y).sum())
        packed_right += int((packed_classes == y).sum())
        differing += int((classes != packed_classes).sum())
    samples = len(data_set.test.y)
    return Agreement(
        accuracy=right / samples,
        packed_accuracy=packed_right / samples,
        samples=samples,
        differing=differing,
        rounds=any(
            isinstance(module, TernaryActivation) or getattr(module, "activation_bits", None)
            for module in packed.modules()
        ),
    )


def _model_options(config: Mapping[str, Any], input_shape: list[int], num_classes: int) -> dict[str, Any]:
    """The registered name of the configured model, and the arguments that it was built with."""
    provided = {"input_shape": input_shape, "num_classes": num_classes, "seed": config["seed"]}
    provided |= {group: config[group] for group in groups_of(model_of(config))}
    declared = schema.options(model_of(config))
    return {key: value for key, value in provided.items() if key in declared} | config["model"]


def _layer_size(name: str, layer: PackedLayer) -> LayerSize:
    count = math.prod(layer.weight_shape)
    return LayerSize(
        name=name,
        weight_shape=layer.weight_shape,
        zeros=1 - int(layer.quantized().codes.count_nonzero()) / count,
        float_bytes=4 * count,
        packed_bytes=_num_bytes(layer.state_dict()),
    )


def _num_bytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())
