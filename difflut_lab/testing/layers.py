"""The check of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from difflut_lab.layers import BaseLUTLayer, LayerConfig
from difflut_lab.nodes import LUTNodes
from difflut_lab.registry import REGISTRY
from difflut_lab.schema import options as declared_options
from difflut_lab.testing import modules
from difflut_lab.testing.nodes import relaxed
from difflut_lab.testing.subject import Subject, bits, only_bits, shape_of, uniform
from difflut_lab.testing.tables import look_up, read_inputs

BATCH = 64
AUGMENTED = LayerConfig(flip_probability=0.25, grad_stabilization="nodewise")


def check_layer(
    part: str | type[BaseLUTLayer],
    *,
    input_size: int = 48,
    output_size: int = 24,
    node_type: str | type[LUTNodes] = "probabilistic",
    n: int | None = None,
    node_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Check a layer: it trains, saves, repeats, augments in training only, and is its truth table in eval mode.

    Parameters
    ----------
    part : str or type
        The registered name, or a subclass of ``BaseLUTLayer``.
    input_size, output_size : int
        F and N of the layers that are built; N channels, where a layer has an ``output_shape``.
    node_type : str or type
        The nodes in them: a registered name, or a subclass of ``LUTNodes``.
    n : int, optional
        Inputs per node; None for the nodes' own default.
    node_kwargs : mapping, optional
        Options of the nodes.
    **options
        Options of the layer.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused.
    """
    if n is None:
        nodes = REGISTRY.get("node", node_type) if isinstance(node_type, str) else node_type
        n = declared_options(nodes)["n"].default
    provided = {
        "input_size": input_size,
        "output_size": output_size,
        "node_type": node_type,
        "n": n,
        "node_kwargs": node_kwargs,
        "seed": 42,
    }
    subject = Subject.of("layer", part, provided, options)
    subject.check_unknown_option()
    layer = subject.build()
    subject.require(
        isinstance(layer, BaseLUTLayer) and isinstance(layer.nodes, LUTNodes),
        "must be a subclass of difflut_lab.layers.BaseLUTLayer and keep its bank of nodes in self.nodes.",
    )
    x = uniform(BATCH, input_size)
    y = modules.train(subject, layer, x)
    # a layer of planes has output_size channels
    width = math.prod(getattr(layer, "output_shape", (output_size,)))
    subject.require(
        tuple(y.shape) == (BATCH, width),
        f"of inputs ({BATCH}, {input_size}) its outputs have shape {shape_of(y)}; they must be ({BATCH}, {width}).",
    )
    modules.check_registered_tensors(subject, layer)
    modules.check_schedulable(subject, layer)
    _check_flips(subject, layer, x)
    _check_stabilization(subject, layer, x)
    layer.layer_config = AUGMENTED
    modules.train(subject, layer, x)
    _check_truth_table(subject, layer)
    modules.check_evaluates(subject, layer, x)
    _check_soft(subject, layer, x)

    def build() -> nn.Module:
        augmented: nn.Module = subject.build(layer_config=AUGMENTED)
        return augmented

    modules.check_repeats(subject, build, x)
    settled = {"in eval mode": modules.call, "evaluated softly": relaxed}
    modules.check_round_trip(subject, layer.eval(), subject.build(seed=43).eval(), x, settled, " with another seed")
    modules.check_round_trip(subject, layer.train(), build(), x, {"in training mode": modules.call})
    _check_frozen(subject, layer, x)
    modules.check_moves(subject, build(), x)


def _check_flips(subject: Subject, layer: BaseLUTLayer, x: Tensor) -> None:
    outputs = {}
    for training in (True, False):
        for config in (LayerConfig(), LayerConfig(flip_probability=0.5)):
            twin = _copy(subject, layer, config).train(training)
            where = f"with flip_probability={config.flip_probability} in {'training' if training else 'eval'} mode"
            outputs[training, config.flip_probability] = modules.run(subject, f"a forward {where}", twin, x)
    subject.require(
        not torch.equal(outputs[True, 0.0], outputs[True, 0.5]),
        "flip_probability=0.5 changes nothing in training mode. A forward of one's own calls "
        "self._apply_bit_flip(routed) on what its nodes read, (B, N, n), and computes with what that returns.",
    )
    subject.require(
        torch.equal(outputs[False, 0.0], outputs[False, 0.5]),
        "flip_probability=0.5 changes its outputs in eval mode. Flip with self._apply_bit_flip(routed), which acts in "
        "training mode only.",
    )


def _check_stabilization(subject: Subject, layer: BaseLUTLayer, x: Tensor) -> None:
    """Stabilised gradients have the size that was asked for, whatever reaches the layer; others grow with it."""
    config = LayerConfig(grad_stabilization="layerwise", grad_target_std=0.5)
    upstream = uniform(*layer.eval()(x).shape, seed=1) - 0.5
    for soft in (False, True):
        sizes = []
        for factor in (1.0, 1000.0):
            twin = _copy(subject, layer, config)
            where = "in training mode" if not soft else "within difflut_lab.layers.soft"
            inputs = x.clone().requires_grad_()
            y = modules.run(subject, f"a forward {where}", twin, inputs, relaxed if soft else modules.call)
            with subject.doing(f"the backward of a forward {where}"):
                wanted = [inputs, *twin.parameters()]
                gradients = torch.autograd.grad(y, wanted, factor * upstream.to(y), allow_unused=True)
            sizes.append(sum(float(gradient.abs().sum()) for gradient in gradients if gradient is not None))
        growth = sizes[1] / sizes[0] if sizes[0] else float("nan")
        if soft:
            subject.require(
                growth > 500,
                "grad_stabilization acts in eval mode: gradients do not grow with the gradient of "
                "the output. Call self._apply_gradient_stabilization(y), which acts in training mode only.",
            )
        else:
            subject.require(
                0.9 < growth < 1.1,
                "grad_stabilization has no effect: in training mode gradients grow with the gradient "
                f"of the output ({growth:.3g} times for 1000 times). A forward of one's own ends in "
                "return self._apply_gradient_stabilization(y).",
            )


def _check_truth_table(subject: Subject, layer: BaseLUTLayer) -> None:
    """In eval mode: bits in, bits out, those of the truth table at what the layer says that it reads."""
    layer.eval()
    table = layer.nodes.truth_table()
    for x, which in (
        (bits(4 * BATCH, layer.input_size), "bits"),
        (uniform(BATCH, layer.input_size), "values between 0 and 1, which count as bits where they are >= 1/2"),
    ):
        with _recorded(layer) as seen:
            y = modules.run(subject, "a forward in eval mode", layer, x).detach()
        subject.require(
            only_bits(y),
            f"in eval mode its outputs are no bits, they reach from {float(y.min()):.4g} to {float(y.max()):.4g} "
            f"(inputs: {which}). Call self.nodes(routed), which looks up truth tables in eval mode.",
        )
        wiring = None
        if type(layer).wiring is not BaseLUTLayer.wiring:
            with subject.doing("wiring()"):
                wiring = layer.wiring()
        if wiring is not None and len(wiring) == y.shape[1]:
            routed, got, said = read_inputs(x, wiring), y, "what wiring() reads"
        elif type(layer).forward is BaseLUTLayer.forward:
            with subject.doing("route(x)"):
                routed = layer.route(x)
            got, said = y, "what route(x) gives"
        elif sum(inputs.shape[1] for inputs, _ in seen) == len(table):
            # a forward of its own, which may do anything with what its nodes give
            routed = torch.cat([inputs for inputs, _ in seen], dim=1)
            got, said = torch.cat([outputs for _, outputs in seen], dim=1), "what its nodes were given"
        else:
            continue
        wanted = torch.from_numpy(look_up(table, routed))
        differing = (got != wanted).nonzero()
        if len(differing):
            sample, node = differing[0].tolist()
            subject.fail(
                f"in eval mode output {node} of sample {sample} is {float(got[sample, node]):.4g}, but node {node}'s "
                f"truth table at {said} says {int(wanted[sample, node])} (inputs: {which}); "
                f"{len(differing)} of {got.numel()} outputs differ. What is exported is wiring() and truth_table(): "
                "the forward must be the same in eval mode."
            )


def _check_soft(subject: Subject, layer: BaseLUTLayer, x: Tensor) -> None:
    step = int(layer.flip_step)
    for training in (True, False):
        layer.train(training)
        modes = [module.training for module in layer.modules()]
        first = modules.run(subject, "a forward within difflut_lab.layers.soft", layer, x, relaxed)
        again = modules.run(subject, "a forward within difflut_lab.layers.soft", layer, x, relaxed)
        subject.require(
            torch.equal(first, again) and int(layer.flip_step) == step,
            "within difflut_lab.layers.soft, two forwards of the same input differ, or flip_step counts: nothing is "
            "flipped or drawn there. What is random acts where self.training is true only.",
        )
        subject.require(
            modes == [module.training for module in layer.modules()],
            "within difflut_lab.layers.soft a module changed its training mode.",
        )


def _check_frozen(subject: Subject, layer: BaseLUTLayer, x: Tensor) -> None:
    wanted = modules.run(subject, "a forward in eval mode", layer.eval(), x)
    with subject.doing("freeze()"):
        layer.freeze()
    for training in (True, False):
        y = modules.run(subject, "a forward of a frozen layer", layer.train(training), x)
        subject.require(
            torch.equal(y, wanted),
            f"frozen, it gives other outputs in {'training' if training else 'eval'} mode than in eval mode before. "
            "Call self.nodes(routed), and let freeze() store the wiring and the table.",
        )


@contextmanager
def _recorded(layer: BaseLUTLayer) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within this context: what the bank is given and gives, call by call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(bank: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del bank
        seen.append((inputs[0], output))

    with layer.nodes.register_forward_hook(record):
        yield seen


def _copy(subject: Subject, layer: BaseLUTLayer, config: LayerConfig) -> BaseLUTLayer:
    twin: BaseLUTLayer = subject.build(layer_config=config)
    modules.load(subject, twin, layer)
    return twin
