"""Quantisation of a tensor, without a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflut_lab.ternary.quantizers import build_quantizer
from difflut_lab.ternary.quantizers.base import Granularity


def quantize(
    weight: Tensor,
    method: str = "deterministic",
    *,
    granularity: Granularity = "tensor",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """A ternary tensor with the gradient of the latent one: at most three values per scale.

    Parameters
    ----------
    weight : Tensor
        Latent weight ``(O, I, ...)``, any dtype of floats.
    method : str
        ``deterministic``, which is ``absmean``; ``stochastic``, which draws codes; or the name of another registered
        quantizer.
    granularity : str
        What shares a scale: ``tensor``, ``channel`` or ``group`` (with ``group_size=...``). ``fixed`` has one scale.
    generator : Generator, optional
        Source of the draws of ``stochastic``, on the weight's device; torch's global one by default, or on other
        devices than the CPU one that it seeds.
    **options
        Further options of the quantizer, such as ``threshold``. What a quantizer would learn is computed from the
        weight.

    Returns
    -------
    Tensor
        Of the weight's shape and dtype.

    Raises
    ------
    ConfigError
        If there is no such quantizer, or ``fixed`` finds no weight above its threshold.
    """
    name = "absmean" if method == "deterministic" else method
    if name != "fixed":
        options["granularity"] = granularity
    quantizer = build_quantizer({"name": name, **options}).to(weight.device, weight.dtype)
    quantizer.prepare(weight.detach())
    if quantizer.draws and generator is None:
        generator = torch.default_generator
        if weight.device.type != "cpu":
            # other devices' generators are not to be had in general: one that the global generator seeds
            seed = int(torch.randint(2**62, ()))
            generator = torch.Generator(weight.device).manual_seed(seed)
    values: Tensor = quantizer(weight, generator).values()
    return values
