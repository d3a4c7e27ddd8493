"""The checks of quantizers and ternary layers can fail: each broken part is told what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from difflut_lab.layers import LayerConfig
from difflut_lab.layers.stabilization import stabilize
from difflut_lab.schema import PositiveInt
from difflut_lab.ternary import Ternary, TernaryLinear
from difflut_lab.ternary.base import Augmented, flip_codes
from difflut_lab.ternary.quantizers import AbsMean, TrainedTernary
from difflut_lab.ternary.quantizers.base import straight_through
from difflut_lab.testing import check_quantizer, check_ternary_layer

BROKEN: list[tuple[Callable[..., None], type, str]] = []


def broken(check: Callable[..., None], message: str) -> Callable[[type], type]:
    """Marks a part that a check must refuse with a message that matches."""

    def add(part: type) -> type:
        BROKEN.append((check, part, message))
        return part

    return add


class Own(AbsMean):
    """A quantizer with nothing wrong with it; wrong ones change one thing."""


class Layer(TernaryLinear):
    """A layer with nothing wrong with it."""

    def __init__(
        self,
        in_features: PositiveInt,
        out_features: PositiveInt,
        *,
        layer_config: LayerConfig | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__(in_features, out_features, layer_config=layer_config, seed=seed)


def test_parts_with_nothing_wrong_pass() -> None:
    check_quantizer(Own)
    check_ternary_layer(Layer)
    check_ternary_layer(Layer, input_shape=(3, 24))


@broken(check_quantizer, "its codes have shape .* and are torch.int8; .* Integers have no gradient")
class IntegerCodes(Own):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        ternary = super().quantize(weight, generator)
        return ternary._replace(codes=ternary.codes.to(torch.int8))


@broken(check_quantizer, "its codes are not -1, 0 and \\+1 only")
class FiveLevels(Own):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        ternary = super().quantize(weight, generator)
        return ternary._replace(codes=2 * ternary.codes)


@broken(check_quantizer, "its values have no gradient: the latent weight would never be trained")
class Detached(Own):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        return super().quantize(weight.detach(), generator)


@broken(check_quantizer, "latent weights of code 0 get no gradient")
class DeadZeros(Own):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        ternary = super().quantize(weight, generator)
        return ternary._replace(codes=ternary.codes * ternary.codes.detach().abs())


@broken(check_quantizer, "ternary already get other codes when they are quantised again")
class Shrinks(Own):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        ternary = super().quantize(weight, generator)
        codes = weight.detach().sign() * (weight.detach().abs() > 0.06)
        return ternary._replace(codes=straight_through(weight, codes, 1.0))


@broken(check_quantizer, "'log_negative' gets no gradient")
class OneScaleOfTwo(TrainedTernary):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        ternary = super().quantize(weight, generator)
        scale = self.spread(self.log_positive.exp(), weight)
        return Ternary(ternary.codes, scale, torch.zeros_like(scale))


@broken(check_quantizer, "with granularity=channel its scale has shape \\(1, 1\\); .* it must be \\(8, 1\\)")
class AlwaysPerTensor(Own):
    def mean(self, values: Tensor) -> Tensor:
        return values.mean().view([1] * values.dim())


@broken(check_quantizer, "changed the latent weight in place")
class ClampsTheWeight(Own):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        weight.data.clamp_(-0.1, 0.1)
        return super().quantize(weight, generator)


@broken(check_quantizer, "codes differ between generators of two seeds, but the class says draws = False")
class DrawsSilently(Own):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        noise = 0.0 if generator is None else 0.02 * torch.randn(weight.shape, generator=generator)
        return super().quantize(weight + noise, generator)


@broken(check_quantizer, "draws from the global random state of torch")
class GlobalNoise(Own):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        return super().quantize(weight + 0 * torch.randn(weight.shape), generator)


@broken(check_quantizer, "of a weight of zeros it gives codes other than 0, or values that are not finite")
class DividesByZero(Own):
    def quantize(self, weight: Tensor, generator: Generator | None) -> Ternary:
        ternary = super().quantize(weight, generator)
        return ternary._replace(scale=ternary.scale / self.mean(weight.abs()) * self.mean(weight.abs()))


@broken(check_quantizer, "unknown option no_such_option=1 was accepted")
class Swallows(Own):
    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("no_such_option", None)
        super().__init__(**kwargs)


@broken(check_ternary_layer, "the parameter 'layer.weight' of shape \\(12, 24\\) got no gradient in 3 steps")
class NeverTrained(Layer):
    def effective_weight(self) -> Tensor:
        return super().effective_weight().detach()


@broken(check_ternary_layer, "flip_probability=0.5 changes nothing in training mode.*self.effective_weight\\(\\)")
class NeverFlips(Layer):
    def effective_weight(self) -> Tensor:
        value: Tensor = self.quantizer(self.weight).values()
        return value


@broken(check_ternary_layer, "flip_probability=0.5 changes its outputs in eval mode")
class FlipsInEval(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        probability = self.layer_config.flip_probability
        return y if self.training else y + flip_codes(torch.zeros_like(y), probability, Generator().manual_seed(0))


@broken(check_ternary_layer, "grad_stabilization has no effect in training mode: gradients grow 1e\\+03 times")
class NeverStabilizes(Layer):
    def stabilize(self, y: Tensor) -> Tensor:
        return y


@broken(check_ternary_layer, "grad_stabilization acts in eval mode")
class StabilizesInEval(Layer):
    def stabilize(self, y: Tensor) -> Tensor:
        return stabilize(y, self.layer_config)


@broken(check_ternary_layer, "in eval mode the weight of 'layer' is not that of its codes")
class LatentInEval(Layer):
    def effective_weight(self) -> Tensor:
        return super().effective_weight() if self.training else self.weight


@broken(check_ternary_layer, "layer_config cannot be replaced on it. Derive it from difflut_lab.ternary.Augmented")
class PlainConfig(nn.Module):
    def __init__(self, in_features: PositiveInt, *, layer_config: LayerConfig | None = None, seed: int = 42) -> None:
        super().__init__()
        self.inner = TernaryLinear(in_features, 4, layer_config=layer_config, seed=seed)
        self.layer_config = layer_config

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@broken(check_ternary_layer, "a layer_config that replaces another one does not act in all parts")
class Forgetful(Augmented):
    def __init__(self, in_features: PositiveInt, *, layer_config: LayerConfig | None = None, seed: int = 42) -> None:
        super().__init__()
        self.inner = TernaryLinear(in_features, 4, layer_config=layer_config, seed=seed)
        self.layer_config = layer_config
        self.probability = self.layer_config.flip_probability

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return functional.relu(y) if self.probability and self.training else y


@pytest.mark.parametrize(("check", "part", "message"), BROKEN, ids=[part.__name__ for _, part, _ in BROKEN])
def test_what_is_broken_is_named(check: Callable[..., None], part: type, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(part)
