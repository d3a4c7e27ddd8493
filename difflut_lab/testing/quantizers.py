"""The check of quantizers.

Shape letters: B batch, O output features or channels, I input features or channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from difflut_lab.seeding import generator
from difflut_lab.ternary import Quantizer, Ternary, TernaryLinear
from difflut_lab.testing import modules
from difflut_lab.testing.subject import Subject, normal, shape_of

BATCH = 32
INPUTS, OUTPUTS = 120, 8
# a linear layer's, a convolution's, a bias
SHAPES = ((OUTPUTS, INPUTS), (OUTPUTS, 20, 3, 3), (16,))


def check_quantizer(part: str | type[Quantizer], **options: Any) -> None:
    """Check a quantizer: codes in {-1, 0, +1} that training reaches through, and that stay what they are.

    Parameters
    ----------
    part : str or type
        The registered name, or a subclass of ``Quantizer``.
    **options
        Options of the quantizer.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused, or the quantizer refuses weights of usual size.
    """
    subject = Subject.of("quantizer", part, {}, options)
    subject.check_unknown_option()
    quantizer = subject.build()
    subject.require(isinstance(quantizer, Quantizer), "must be a subclass of difflut_lab.ternary.Quantizer.")
    if quantizer.is_float:
        _check_layer(subject)
        return
    for shape in SHAPES:
        weight = 0.05 * normal(*shape)
        quantizer = _prepared(subject, weight)
        ternary = _quantize(subject, quantizer, weight)
        _check_ternary(subject, ternary, weight)
        if len(shape) > 1:
            _check_granularity(subject, ternary, weight)
        _check_repeated(subject, quantizer, ternary, weight)
        _check_draws(subject, quantizer, weight)
        _check_gradients(subject, quantizer, weight)
        nothing = _quantize(subject, quantizer, torch.zeros(shape))
        subject.require(
            bool(torch.isfinite(nothing.values()).all()) and not nothing.codes.any(),
            "of a weight of zeros it gives codes other than 0, or values that are not finite. Keep what it divides by "
            "away from 0, with clamp(min=1e-12).",
        )
    _check_layer(subject)


def _prepared(subject: Subject, weight: Tensor) -> Quantizer:
    quantizer: Quantizer = subject.build()
    before = weight.clone()
    with subject.doing("prepare(weight)"):
        quantizer.prepare(weight)
    subject.require(torch.equal(before, weight), "prepare(weight) changed the weight in place. Work on a copy.")
    return quantizer


def _quantize(subject: Subject, quantizer: Quantizer, weight: Tensor, seed: int | None = None) -> Ternary:
    before = weight.detach().clone()
    draws = None if seed is None else generator(seed, "draws")
    with subject.doing("quantize(weight, generator)"):
        ternary: Ternary = quantizer(weight, draws)
    subject.require(
        isinstance(ternary, Ternary), "quantize(weight, generator) must return a difflut_lab.ternary.Ternary."
    )
    subject.require(
        torch.equal(before, weight.detach()),
        "quantize(weight, generator) changed the latent weight in place. Work on a copy.",
    )
    return ternary


def _check_ternary(subject: Subject, ternary: Ternary, weight: Tensor) -> None:
    codes, scale, skew = (part.detach() for part in ternary)
    subject.require(
        codes.shape == weight.shape and codes.dtype == weight.dtype,
        f"of a weight {shape_of(weight)} of {weight.dtype} its codes have shape {shape_of(codes)} and are "
        f"{codes.dtype}; they must be as the weight is. Integers have no gradient.",
    )
    subject.require(
        bool(torch.isin(codes, torch.tensor([-1.0, 0.0, 1.0])).all()), "its codes are not -1, 0 and +1 only."
    )
    subject.require(
        bool(codes.any()), f"of normal weights {shape_of(weight)} with a standard deviation of 0.05 every code is 0."
    )
    for name, part in (("scale", scale), ("skew", skew)):
        broadcasts = part.dim() == weight.dim() and all(
            size in (1, full) for size, full in zip(part.shape, weight.shape, strict=True)
        )
        subject.require(
            broadcasts and bool(torch.isfinite(part).all()),
            f"its {name} has shape {shape_of(part)}, or is not finite; it must broadcast against a weight "
            f"{shape_of(weight)}, with as many dimensions.",
        )
    subject.require(
        bool((scale > skew.abs()).all()),
        "its scale is not greater than the magnitude of its skew everywhere, so that a weight of code +1 is not "
        "positive, or one of code -1 not negative.",
    )
    wanted = torch.where(codes > 0, scale + skew, torch.where(codes < 0, skew - scale, 0.0))
    subject.require(
        torch.allclose(ternary.values().detach(), wanted, atol=1e-7), "values() is not scale * codes + skew * |codes|."
    )


def _check_granularity(subject: Subject, ternary: Ternary, weight: Tensor) -> None:
    """As many scales as the granularity says."""
    granularity, size = subject.options.get("granularity"), subject.options.get("group_size")
    if granularity is None:
        return
    ones = (1,) * (weight.dim() - 2)
    shapes = {"tensor": (1, 1), "channel": (len(weight), 1), "group": tuple(weight.shape[:2])}
    shape = shapes[granularity] + ones
    subject.require(
        tuple(ternary.scale.shape) == shape,
        f"with granularity={granularity} its scale has shape {shape_of(ternary.scale)}; of a weight "
        f"{shape_of(weight)} it must be {shape}. self.mean, self.sum and self.amax of the base class reduce so.",
    )
    if granularity == "group":
        for group in ternary.scale.detach().split(int(size or 1), dim=1):
            subject.require(
                torch.equal(group, group[:, :1].expand_as(group)), "a group of channels has several scales."
            )


def _check_repeated(subject: Subject, quantizer: Quantizer, ternary: Ternary, weight: Tensor) -> None:
    again = _quantize(subject, quantizer, weight)
    subject.require(
        torch.equal(again.codes, ternary.codes), "two calls without a generator give different codes of one weight."
    )
    twice = _quantize(subject, quantizer, ternary.values().detach())
    subject.require(
        torch.equal(twice.codes, ternary.codes),
        "values that are ternary already get other codes when they are quantised again, so that a network would change "
        "by being saved as its values.",
    )


def _check_draws(subject: Subject, quantizer: Quantizer, weight: Tensor) -> None:
    drawn = [_quantize(subject, quantizer, weight, seed).codes for seed in (1, 1, 2)]
    subject.require(torch.equal(drawn[0], drawn[1]), "two calls with generators of one seed give different codes.")
    differ = not torch.equal(drawn[0], drawn[2])
    subject.require(
        differ == quantizer.draws,
        f"its codes {'differ' if differ else 'do not differ'} between generators of two seeds, but the class says "
        f"draws = {quantizer.draws}.",
    )


def _check_gradients(subject: Subject, quantizer: Quantizer, weight: Tensor) -> None:
    for seed in (None, 1):
        latent = weight.clone().requires_grad_()
        ternary = _quantize(subject, quantizer, latent, seed)
        wanted = {"the latent weight": latent, **{f"'{name}'": value for name, value in quantizer.named_parameters()}}
        upstream = normal(*weight.shape, seed=3)
        subject.require(
            ternary.values().requires_grad,
            "its values have no gradient: the latent weight would never be trained. Make codes with "
            "difflut_lab.ternary.quantizers.base.straight_through(weight, codes, 1 / scale).",
        )
        with subject.doing("the backward of quantize(weight, generator)"):
            gradients = torch.autograd.grad(ternary.values(), list(wanted.values()), upstream, allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            subject.require(
                gradient is not None and bool(torch.isfinite(gradient).all()) and bool(gradient.any()),
                f"{name} gets no gradient, one of zeros only, or one that is not finite.",
            )
        zeros = ternary.codes.detach() == 0
        subject.require(
            not zeros.any() or bool((gradients[0] * zeros).any()),
            "latent weights of code 0 get no gradient: they would stay 0 for ever.",
        )


def _check_layer(subject: Subject) -> None:
    """What it does in a layer that owns it."""

    def build(seed: int = 42, blend: float | None = None) -> TernaryLinear:
        quantizer = subject.build()
        if blend is not None:
            quantizer.blend = blend
        with subject.doing("building a linear layer with it"):
            return TernaryLinear(INPUTS, OUTPUTS, quantizer=quantizer, seed=seed)

    x = normal(BATCH, INPUTS)
    layer = build()
    modules.train(subject, layer, x)
    modules.check_registered_tensors(subject, layer)
    modules.check_schedulable(subject, layer.quantizer)
    modules.check_evaluates(subject, layer, x)
    modules.check_repeats(subject, build, x)
    modules.check_round_trip(
        subject, layer.eval(), build(seed=43).eval(), x, {"in eval mode": modules.call}, " with another seed"
    )
    modules.check_round_trip(subject, layer.train(), build(), x, {"in training mode": modules.call})
    modules.check_moves(subject, build(), x)
    if not layer.is_float:
        _check_blend(subject, {blend: build(blend=blend) for blend in (0.0, 0.5, 1.0)})


def _check_blend(subject: Subject, layers: Mapping[float, TernaryLinear]) -> None:
    weights = {blend: layer.effective_weight().detach() for blend, layer in layers.items()}
    latent = layers[0.0].weight.detach()
    subject.require(
        torch.equal(weights[0.0], latent) and torch.allclose(weights[0.5], (latent + weights[1.0]) / 2, atol=1e-6),
        "in training, blend is not the share of the ternary weight. Leave it to the layer: quantize gives the ternary "
        "weight whatever blend is.",
    )
    evaluated = [layer.eval().effective_weight().detach() for layer in layers.values()]
    subject.require(
        all(torch.equal(evaluated[0], weight) for weight in evaluated), "in eval mode the weight depends on blend."
    )
