"""The check of ternary layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difflut_lab import schema
from difflut_lab.layers import LayerConfig
from difflut_lab.registry import REGISTRY
from difflut_lab.ternary import TernaryActivation, TernaryLayer
from difflut_lab.testing import modules
from difflut_lab.testing.subject import Subject, normal

BATCH = 16
AUGMENTED = LayerConfig(flip_probability=0.25, grad_stabilization="nodewise")
# arguments that say how large a layer is, by their usual names, where none are given
SIZES: Mapping[str, int] = {
    "in_features": 24,
    "out_features": 12,
    "in_channels": 8,
    "out_channels": 8,
    "kernel_size": 3,
    "num_features": 12,
    "d_model": 12,
    "num_heads": 3,
    "input_size": 24,
    "hidden_size": 12,
}
# shapes of a sample of inputs, by the argument that says how many features it has
SAMPLES: Mapping[str, tuple[int, ...]] = {
    "in_features": (-1,),
    "in_channels": (-1, 6, 6),
    "num_features": (-1,),
    "d_model": (5, -1),
    "input_size": (5, -1),
}


def check_ternary_layer(
    part: str | type[nn.Module],
    *,
    input_shape: tuple[int, ...] | None = None,
    forward: Callable[[Any, Tensor], Any] = modules.call,
    **options: Any,
) -> None:
    """Check a ternary layer: it trains its latent weights, saves, repeats, augments in training only, has codes.

    Parameters
    ----------
    part : str or type
        The registered name, or a class.
    input_shape : tuple of int, optional
        Shape of a sample; by default one that suits arguments named as those of the built-in layers are.
    forward : callable
        What is done with the layer and inputs ``(B, *input_shape)``; by default the layer is called. Of several outputs
        the first is checked.
    **options
        Arguments of the layer; sizes named as those of the built-in layers need not be given.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused.
    """
    subject = Subject.of("ternary", part, {}, _sized(part, options))
    subject = subject.providing(**({"seed": 42} if subject.asks_for("seed") else {}))
    subject.check_unknown_option()

    def build(**changes: Any) -> _Applied:
        layer = subject.build(**changes)
        subject.require(isinstance(layer, nn.Module), "must be a torch.nn.Module.")
        return _Applied(layer, forward)

    layer = build()
    x = normal(BATCH, *(input_shape or _sample(subject)))
    with subject.doing("a forward"):
        y = layer(x)
    subject.require(y.is_floating_point(), f"its outputs are {y.dtype}; integers have no gradient.")
    modules.train(subject, layer, x)
    modules.check_registered_tensors(subject, layer)
    for module in layer.modules():
        modules.check_schedulable(subject, module)
    _check_codes(subject, layer, x)
    modules.check_evaluates(subject, layer, x)
    augmented: dict[str, Any] = {}
    if subject.asks_for("layer_config"):

        def copy(config: LayerConfig) -> _Applied:
            twin = build(layer_config=config)
            modules.load(subject, twin, layer)
            return twin

        _check_flips(subject, copy, x)
        _check_stabilization(subject, copy, x)
        _check_swap(subject, copy, x)
        augmented = {"layer_config": AUGMENTED}
    modules.check_repeats(subject, lambda: build(**augmented), x)
    other = {"seed": 43} if subject.asks_for("seed") else {}
    modules.check_round_trip(
        subject, layer.eval(), build(**other).eval(), x, {"in eval mode": modules.call}, " with another seed"
    )
    trained = build(**augmented)
    modules.train(subject, trained, x)
    modules.check_round_trip(subject, trained, build(**augmented), x, {"in training mode": modules.call})
    modules.check_moves(subject, build(**augmented), x)


class _Applied(nn.Module):
    """A layer, used as it is to be checked: one tensor in, one tensor out."""

    def __init__(self, layer: nn.Module, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer = layer
        self.apply_layer = forward

    def forward(self, x: Tensor) -> Tensor:
        output = self.apply_layer(self.layer, x)
        while isinstance(output, tuple):
            output = output[0]
        return output


Copy = Callable[[LayerConfig], _Applied]


def _sized(part: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with sizes that are needed and not given."""
    needed = {
        name: SIZES[name]
        for name, parameter in _arguments(part).items()
        if name in SIZES and parameter.default is parameter.empty
    }
    if "num_heads" in _arguments(part):
        needed["num_heads"] = SIZES["num_heads"]
    return needed | dict(options)


def _arguments(part: Any) -> Mapping[str, Any]:
    return schema.options(REGISTRY.get("ternary", part) if isinstance(part, str) else part)


def _sample(subject: Subject) -> tuple[int, ...]:
    for name, shape in SAMPLES.items():
        if name in subject.options:
            # a cell takes a single step
            shape = shape[1:] if name == "input_size" and "num_layers" not in subject.options else shape
            return tuple(subject.options[name] if size == -1 else size for size in shape)
    return (SIZES["num_features"],)


def _leaves(layer: nn.Module) -> Iterator[tuple[str, TernaryLayer]]:
    """What holds ternary weights."""
    for name, module in layer.named_modules():
        if isinstance(module, TernaryLayer) and not module.is_float:
            yield name, module


def _check_codes(subject: Subject, layer: nn.Module, x: Tensor) -> None:
    """In eval mode weights are ternary; in training their gradients are not zero where the codes are."""
    for name, leaf in _leaves(layer.eval()):
        ternary = leaf.quantized()
        subject.require(
            bool(torch.isin(ternary.codes, torch.tensor([-1.0, 0.0, 1.0])).all()) and bool(ternary.codes.any()),
            f"codes of '{name}' are not -1, 0 and +1, or all 0.",
        )
        subject.require(
            torch.equal(leaf.effective_weight().detach(), ternary.values()),
            f"in eval mode the weight of '{name}' is not that of its codes.",
        )
    y = modules.run(subject, "a training forward", layer.train(), x)
    leaves = dict(_leaves(layer))
    if not leaves:
        return
    weights = [leaf.weight for leaf in leaves.values()]
    gradients = torch.autograd.grad(y, weights, normal(*y.shape, seed=5))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        zeros = leaf.quantized().codes == 0
        subject.require(
            not zeros.any() or bool(gradient[zeros].any()),
            f"latent weights of '{name}' whose code is 0 get no gradient: they would stay 0 for ever.",
        )


def _check_flips(subject: Subject, copy: Copy, x: Tensor) -> None:
    outputs = {}
    for training in (True, False):
        for probability in (0.0, 0.5):
            twin = copy(LayerConfig(flip_probability=probability)).train(training)
            where = f"with flip_probability={probability} in {'training' if training else 'eval'} mode"
            outputs[training, probability] = modules.run(subject, f"a forward {where}", twin, x)
    # weights in float have no codes to flip
    flips = any(True for _ in _leaves(twin)) or any(isinstance(part, TernaryActivation) for part in twin.modules())
    subject.require(
        torch.equal(outputs[True, 0.0], outputs[True, 0.5]) != flips,
        "flip_probability=0.5 changes nothing in training mode. Compute with self.effective_weight(), which flips; or "
        "flip trits with difflut_lab.ternary.base.flip_codes."
        if flips
        else "flip_probability=0.5 changes its outputs in training mode, although nothing in it is ternary.",
    )
    subject.require(
        torch.equal(outputs[False, 0.0], outputs[False, 0.5]),
        "flip_probability=0.5 changes its outputs in eval mode. Flip where self.training is true only.",
    )


def _check_stabilization(subject: Subject, copy: Copy, x: Tensor) -> None:
    """Gradients that pass a stabilised output have the size that was asked for, whatever reaches the layer."""
    config = LayerConfig(grad_stabilization="layerwise", grad_target_std=0.5)
    for training in (True, False):
        sizes = []
        for factor in (1.0, 1000.0):
            twin = copy(config).train(training)
            inputs = x.clone().requires_grad_()
            y = modules.run(subject, "a forward", twin, inputs)
            layers = [module for module in twin.modules() if isinstance(module, TernaryLayer)]
            weights: list[Tensor] = [module.weight for module in layers]
            # around a ternary layer there may be other ways for gradients, such as a shortcut
            gradients = torch.autograd.grad(y, weights or [inputs], factor * normal(*y.shape, seed=1))
            sizes.append(sum(float(gradient.abs().sum()) for gradient in gradients))
        growth = sizes[1] / sizes[0] if sizes[0] else float("nan")
        subject.require(
            # where a layer is used several times, gradients of different directions meet
            0.5 < growth < 2 if training else growth > 500,
            f"grad_stabilization {'has no effect in training' if training else 'acts in eval'} mode: gradients grow "
            f"{growth:.3g} times for outputs whose gradients grow 1000 times. A forward ends in "
            "return self.stabilize(y), which acts in training mode only.",
        )


def _check_swap(subject: Subject, copy: Copy, x: Tensor) -> None:
    """A configuration given later acts like one that was there from the start."""
    built, swapped = copy(AUGMENTED).train(), copy(LayerConfig()).train()
    subject.require(
        isinstance(getattr(type(swapped.layer), "layer_config", None), property),
        "layer_config cannot be replaced on it. Derive it from difflut_lab.ternary.Augmented and set "
        "self.layer_config = layer_config in __init__.",
    )
    replaced: Any = swapped.layer
    replaced.layer_config = AUGMENTED
    results = []
    for twin in (built, swapped):
        inputs = x.clone().requires_grad_()
        y = modules.run(subject, "a training forward", twin, inputs)
        results.append((y, torch.autograd.grad(y, inputs, normal(*y.shape, seed=2))[0]))
    subject.require(
        all(torch.equal(*pair) for pair in zip(*results, strict=True)),
        "a layer_config that replaces another one does not act in all parts of the layer.",
    )
