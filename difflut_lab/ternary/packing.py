"""A trained network as it is deployed: codes of two bits, no latent weights."""

from __future__ import annotations

import copy
import itertools
import math
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.ops.ternary_linear import pack_codes
from difflut_lab.ternary.base import TernaryLayer
from difflut_lab.ternary.conv import TernaryConv2d
from difflut_lab.ternary.fuse import FoldedConv2d, fold
from difflut_lab.ternary.linear import TernaryLinear
from difflut_lab.ternary.norm import TernaryBatchNorm
from difflut_lab.ternary.packed.layers import PackedConv2d, PackedLayer, PackedLinear, PackError, Storage, shown
from difflut_lab.ternary.quantizers import Ternary

# those that are, in eval mode, an affine function of each channel
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, TernaryBatchNorm)


class FoldedBatchNorm(nn.Identity):
    """The place of a batch norm that the packed layer before it now contains."""


@torch.no_grad()
def pack(model: nn.Module, *, storage: Storage = "2bit") -> nn.Module:
    """The inference form of a trained model: a copy in eval mode whose ternary layers hold codes and scales only.

    Every ``TernaryLinear`` and ``TernaryConv2d``, also those that other modules are composed of, becomes a
    ``PackedLinear`` or ``PackedConv2d`` with the codes of eval mode; latent weights and what quantizers learned are
    gone. Layers whose quantizer is ``none`` stay as they are. The output is that of the model in eval mode: codes, and
    sums over 8-bit activations, exactly; floats up to rounding.

    A batch norm directly behind a ternary layer goes into its scale, skew and bias. Which ones those are, the modules
    say that hold both:

    - an ``nn.Sequential``, by the order of its children;
    - any other module, by an attribute ``FOLDABLE``: pairs of names, of a layer and of the batch norm that reads the
      layer's output and alone reads it, such as ``FOLDABLE = (("conv1", "bn1"), ("conv2", "bn2"))``. The first may also
      be an ``nn.Sequential`` that ends in a layer, the second one that begins with a batch norm.

    All other batch norms stay, and so do those without running statistics, and pairs of which a part stands in several
    places of the model.

    Parameters
    ----------
    model : nn.Module
        A model that holds ternary layers, or a ternary layer; in training mode or not. It is left as it is.
    storage : str
        How ``state_dict()`` and files hold the codes: ``2bit``, or ``base3`` for five codes per byte, 1.6 bits each. In
        memory they take two bits.

    Returns
    -------
    nn.Module
        Of the model's class, with its other modules and attributes; its remaining parameters need no gradient.

    Raises
    ------
    PackError
        If the model is packed already, or holds nothing ternary, or a ternary layer that has no packed form, or one
        whose codes are all 0.
    ConfigError
        If there is no such storage.
    """
    choices = typing.get_args(Storage)
    if storage not in choices:
        raise ConfigError(f"storage={storage}: must be one of {', '.join(choices)}.")
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            raise PackError(f"{shown(name)} is packed already: there are no latent weights to pack.")
    model = copy.deepcopy(model).eval()
    norms = foldable(model)
    replaced: dict[nn.Module, nn.Module] = {norm: FoldedBatchNorm() for norm in norms.values()}
    for name, layer in packable(model):
        replaced[layer] = _pack(name, layer, norms.get(layer), storage)
    if not replaced:
        raise PackError(f"This {type(model).__name__} holds no ternary layers: there is nothing to pack.")
    return replace(model, replaced).eval().requires_grad_(False)


def packable(model: nn.Module) -> Iterator[tuple[str, TernaryLayer | FoldedConv2d]]:
    """Names and modules of a model, or the model itself, that have ternary weights, and not in float."""
    for name, module in model.named_modules():
        if isinstance(module, TernaryLayer | FoldedConv2d) and not _is_float(module):
            yield name, module


def packed_form(name: str, layer: TernaryLayer | FoldedConv2d) -> tuple[type[PackedLayer], dict[str, Any]]:
    """The class of the packed form of a model's layer, and the settings that it takes over.

    Raises
    ------
    PackError
        If there is none, as for a subclass that computes something else.
    """
    forward = type(layer).forward
    settings: dict[str, Any] = {"activation_bits": layer.activation_bits}
    if isinstance(layer, TernaryLinear) and forward is TernaryLinear.forward:
        return PackedLinear, settings | {"weight_shape": list(layer.weight.shape)}
    if isinstance(layer, TernaryConv2d | FoldedConv2d) and forward in (TernaryConv2d.forward, FoldedConv2d.forward):
        weight = layer.codes if isinstance(layer, FoldedConv2d) else layer.weight
        return PackedConv2d, settings | {
            "weight_shape": list(weight.shape),
            "stride": list(layer.stride),
            "padding": list(layer.padding),
            "groups": layer.groups,
        }
    raise PackError(
        f"{shown(name)} is a {type(layer).__name__}, which has no packed form: TernaryLinear and TernaryConv2d have, "
        "and subclasses that keep their forward."
    )


def foldable(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The ternary layers of a model that a batch norm directly follows, each with its batch norm, as of ``pack``.

    Raises
    ------
    PackError
        If a module names something in ``FOLDABLE`` that it does not have.
    """
    # what stands in two places may be followed by two different modules
    places = Counter(child for module in model.modules() for child in module._modules.values())
    found: dict[nn.Module, nn.Module] = {}
    for name, owner in model.named_modules():
        pairs = list(getattr(owner, "FOLDABLE", ()))
        pairs += itertools.pairwise(owner._modules) if _is_chain(owner) else []
        for first, second in pairs:
            before, after = _chain(owner, first, -1, name), _chain(owner, second, 0, name)
            if any(places[module] > 1 for module in before + after):
                continue
            if _folds(before[-1], after[-1]):
                found[before[-1]] = after[-1]
    return found


def replace(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    """The model with other modules in the places of some of its modules, or of itself."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in replaced:
                setattr(module, name, replaced[child])
    return replaced.get(model, model)


def _is_chain(module: Any) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _folds(layer: Any, norm: Any) -> bool:
    if not isinstance(layer, TernaryLayer) or layer.is_float or type(norm) not in NORMS:
        return False
    if type(norm) is nn.BatchNorm2d and not isinstance(layer, TernaryConv2d):
        return False  # its channels are not the layer's features
    # without running statistics a batch norm computes them from the batch, in eval mode, too
    return norm.running_mean is not None and norm.num_features == len(layer.weight)


def _chain(owner: nn.Module, path: str, end: int, name: str) -> list[Any]:
    """The modules on a path, down to the one at the end, or beginning, of the sequences that it leads to."""
    passed = []
    module: Any = owner
    for step in path.split("."):
        if not hasattr(module, step):
            raise PackError(f"{shown(name)}, a {type(owner).__name__}, has no '{path}', which its FOLDABLE names.")
        module = getattr(module, step)
        passed.append(module)
    while _is_chain(module) and len(module):
        module = module[end]
        passed.append(module)
    return passed


def _is_float(module: TernaryLayer | FoldedConv2d) -> bool:
    return module.codes.is_floating_point() if isinstance(module, FoldedConv2d) else module.is_float


def _pack(name: str, layer: TernaryLayer | FoldedConv2d, norm: nn.Module | None, storage: Storage) -> PackedLayer:
    kind, settings = packed_form(name, layer)
    bias: Tensor | None
    if isinstance(layer, FoldedConv2d):
        ternary, bias = Ternary(layer.codes, layer.scale, layer.skew), layer.bias
    else:
        ternary, bias = layer.quantized(), layer.effective_bias()
    if not ternary.codes.any():
        raise PackError(f"{shown(name)}: every code is 0, so that its output does not depend on its input.")
    scale, skew = ternary.scale, ternary.skew
    if norm is not None:
        scale, skew, bias = fold(ternary, bias, norm)
    # over the same groups
    both = torch.stack(torch.broadcast_tensors(scale, skew))
    values, group_size = _per_group(name, both, settings["weight_shape"])
    return kind(
        codes=pack_codes(ternary.codes.flatten(1).to(torch.int8)),
        scale=values[0].contiguous(),
        skew=values[1].contiguous() if skew.any() else None,
        bias=None if bias is None else bias.clone(),
        group_size=group_size,
        normalized=norm is not None,
        storage=storage,
        **settings,
    )


def _per_group(name: str, values: Tensor, weight_shape: Sequence[int]) -> tuple[Tensor, int | None]:
    """Values ``(2, ...)`` that broadcast against a weight, as ``(2, O)``, or as ``(2, O, G)`` and the groups' size."""
    if values[0, 0, 0].numel() > 1:
        raise PackError(f"{shown(name)}: weights of one output and input channel have several scales.")
    rows = values.flatten(2).expand(-1, weight_shape[0], -1)
    changes = (rows[:, :, 1:] != rows[:, :, :-1]).any(dim=(0, 1)).nonzero().flatten() + 1
    if not len(changes):
        return rows[:, :, 0], None
    size = math.gcd(*changes.tolist())
    return rows[:, :, ::size], size
