"""The checks offered to users can fail: each broken part is told what is wrong with it, and how to mend it."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from difflut_lab import REGISTRY, register_layer, testing
from difflut_lab.augmentations import Augmentation
from difflut_lab.encoders import Encoder, ThresholdEncoder
from difflut_lab.errors import ConfigError
from difflut_lab.layers import BaseLUTLayer, RandomRouting
from difflut_lab.layers.stabilization import stabilize
from difflut_lab.models import Model
from difflut_lab.nodes import LUTNodes, ProbabilisticNodes
from difflut_lab.nodes.regularizers import Regularizer
from difflut_lab.ops import Flips, Wiring, interpolate
from difflut_lab.schema import PositiveInt
from difflut_lab.seeding import generator
from difflut_lab.testing import (
    check_augmentation,
    check_encoder,
    check_head,
    check_initializer,
    check_layer,
    check_model,
    check_node,
    check_regularizer,
)
from difflut_lab.testing import modules as checks_of_modules

BROKEN: list[tuple[Callable[..., None], type, str]] = []


def broken(check: Callable[..., None], message: str) -> Callable[[type], type]:
    """Marks a part that a check must refuse with a message that matches."""

    def add(part: type) -> type:
        BROKEN.append((check, part, message))
        return part

    return add


class Own(BaseLUTLayer):
    """A layer with a forward of its own and nothing wrong with it; wrong ones change one line."""

    idx: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("idx", self.draw().int())

    def draw(self) -> Tensor:
        return torch.randint(
            self.input_size, (self.output_size, self.n), generator=generator(self.seed, "wiring", "own")
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.nodes(self._apply_bit_flip(x[:, self.idx.long()]))
        return self._apply_gradient_stabilization(y)


class Wired(Own):
    """The same, by its wiring alone."""

    forward = BaseLUTLayer.forward

    def wiring(self) -> Tensor:
        return self.idx


class Mean(LUTNodes):
    """A node with nothing wrong with it: a weighted mean of its inputs."""

    def __init__(self, num_nodes: int, n: PositiveInt = 3, *, seed: int = 42) -> None:
        super().__init__(num_nodes, n, seed=seed)
        self.weight = nn.Parameter(torch.rand(num_nodes, n, generator=generator(seed, "weight")))

    def relaxed(self, routed: Tensor) -> Tensor:
        return torch.sigmoid((self.weight * (2 * routed - 1)).sum(dim=2))


class AboveMean(Encoder):
    """An encoder with nothing wrong with it: a bit is 1 where a feature is above its mean."""

    mean: Tensor

    def __init__(self, input_size: int) -> None:
        super().__init__(input_size, 1)
        self.register_buffer("mean", torch.full((input_size,), torch.nan))

    def fit(self, x: Tensor) -> None:
        self.mean.copy_(x.flatten(1).mean(dim=0))

    def forward(self, x: Tensor) -> Tensor:
        if self.mean.isnan().any():
            raise RuntimeError("call fit(x) first")
        return (x.flatten(1) > self.mean).to(x.dtype)


class Linear(nn.Module):
    """A head with nothing wrong with it."""

    def __init__(self, input_size: int, num_classes: int) -> None:
        super().__init__()
        start = torch.randn(num_classes, input_size, generator=generator(0, "head"))
        self.weight = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Constant:
    """An initialiser with nothing wrong with it."""

    def __init__(self, *, value: float = 0.5) -> None:
        self.value = value

    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return torch.full(shape, self.value)


@dataclass(frozen=True, kw_only=True)
class Cubes(Regularizer):
    """A regulariser with nothing wrong with it."""

    margin: float = 0.5
    # smaller magnitudes are free

    def __call__(self, values: Tensor) -> Tensor:
        return (values.abs() - self.margin).clamp(min=0).pow(3).mean()


class Blend(Augmentation):
    """An augmentation with nothing wrong with it: samples and labels are blended with those of another sample."""

    def __init__(self, *, input_shape: Sequence[int], num_classes: int, share: float = 0.25) -> None:
        self.input_shape, self.num_classes, self.share = tuple(input_shape), num_classes, share

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        partner = torch.randperm(len(x), generator=generator).to(x.device)
        rows = y if y.is_floating_point() else torch.nn.functional.one_hot(y, self.num_classes).float()
        return (1 - self.share) * x + self.share * x[partner], (1 - self.share) * rows + self.share * rows[partner]


class Small(Model):
    """A model with nothing wrong with it."""

    def __init__(self, *, input_shape: tuple[int, ...], num_classes: int, seed: int = 42) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, input_shape[0], generator=generator(seed, "weight")))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.weight.shape[1]] @ self.weight.t()


@pytest.mark.parametrize(
    ("check", "part"),
    [
        (check_layer, Own),
        (check_layer, Wired),
        (check_node, Mean),
        (check_encoder, AboveMean),
        (check_head, Linear),
        (check_initializer, Constant),
        (check_regularizer, Cubes),
        (check_augmentation, Blend),
        (check_model, Small),
    ],
)
def test_parts_with_nothing_wrong_pass_and_random_states_are_left_alone(check: Any, part: Any) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = (torch.rand(1), np.random.rand(), random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    check(part)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


# layers


@broken(check_layer, "Relaxed': in eval mode its outputs are no bits, they reach from 0.*looks up truth tables in eval")
class Relaxed(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self._apply_gradient_stabilization(self.nodes.relaxed(self._apply_bit_flip(x[:, self.idx.long()])))


@broken(
    check_layer, "output \\d+ of sample .* node \\d+'s truth table at what wiring\\(\\) reads says .* outputs differ"
)
class ReadsOtherInputs(Wired):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


@broken(check_layer, "truth table at what its nodes were given says")
class InvertsItsNodes(Own):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nodes.register_forward_hook(lambda bank, inputs, y: y if bank.is_relaxed else 1 - y)


@broken(check_layer, "flip_probability=0.5 changes nothing in training mode.*self._apply_bit_flip\\(routed\\)")
class NeverFlips(Own):
    def _apply_bit_flip(self, routed: Tensor) -> Tensor:
        super()._apply_bit_flip(routed)
        return routed


@broken(check_layer, "flip_probability=0.5 changes its outputs in eval mode")
class FlipsInEval(Own):
    def forward(self, x: Tensor) -> Tensor:
        flipped = 1 - x if self.layer_config.flip_probability > 0 else x
        return self._apply_gradient_stabilization(self.nodes(flipped[:, self.idx.long()]))


@broken(check_layer, "grad_stabilization has no effect: .* grow with the gradient of the output \\(1e\\+03 times")
class NeverStabilizes(Own):
    def _apply_gradient_stabilization(self, y: Tensor) -> Tensor:
        super()._apply_gradient_stabilization(y)
        return y


@broken(check_layer, "grad_stabilization acts in eval mode")
class StabilizesInEval(Own):
    def forward(self, x: Tensor) -> Tensor:
        return stabilize(super().forward(x), self.layer_config)


@broken(check_layer, "the parameter 'bias' of shape \\(24,\\) got no gradient in 3 steps .* make it a buffer")
class Unused(Own):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = nn.Parameter(torch.zeros(self.output_size))


@broken(check_layer, "the parameter 'bias' of shape \\(24,\\) got a gradient of zeros only")
class Multiplied(Unused):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.bias


@broken(check_layer, "its input of shape \\(64, 48\\) got no gradient other than zero")
class Detached(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@broken(check_layer, "outputs in training mode have no gradient")
class Rounded(Own):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) >= 0.5).to(x)


@broken(check_layer, "step 0 of training gave outputs that are not finite")
class NotFinite(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


@broken(check_layer, "the gradient of the parameter 'nodes.weight' of shape \\(24, 64\\) is not finite in step 0")
class GradientNotFinite(Own):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + (y - y.detach()).abs().sqrt()


@broken(check_layer, "its outputs have shape \\(64, 23\\); they must be \\(64, 24\\)")
class OneShort(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 1:]


@broken(
    check_layer,
    "'idx' is a tensor in a plain attribute: checkpoints lose it.*self.register_buffer\\(\"idx\", tensor\\)",
)
class PlainAttribute(Own):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.idx
        self.idx = self.draw()


@broken(check_layer, "'tensors' is a tensor in a plain attribute")
class ListOfTensors(Own):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tensors = [self.draw()]


@broken(check_layer, "built anew with another seed, it gives other outputs in eval mode: .* not in its state_dict")
class NotSaved(Own):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("idx", self.draw(), persistent=False)


@broken(check_layer, "state_dict of a trained part does not load into a part built anew, .*late")
class SavesWhatIsNotThere(Own):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(()))
        return super().forward(x)


@broken(check_layer, "building it, .* draws from the global random state of torch, .*seeding.generator\\(self.seed")
class GlobalTorch(Own):
    def draw(self) -> Tensor:
        return torch.randint(self.input_size, (self.output_size, self.n))


@broken(check_layer, "global random state of numpy")
class GlobalNumpy(Own):
    def draw(self) -> Tensor:
        return torch.from_numpy(np.random.randint(self.input_size, size=(self.output_size, self.n)))


@broken(check_layer, "a training forward draws from the global random state of Python")
class GlobalPython(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + random.random() / 1000)


@broken(check_layer, "two parts built alike start with another 'idx'")
class Unseeded(Own):
    def draw(self) -> Tensor:
        source = torch.Generator()
        source.seed()
        return torch.randint(self.input_size, (self.output_size, self.n), generator=source)


@broken(check_layer, "two trainings from the same seed differ in nodes.weight")
class UnseededNoise(Own):
    def forward(self, x: Tensor) -> Tensor:
        source = torch.Generator()
        source.seed()
        noise = torch.rand(x.shape, generator=source).to(x) / 100
        return super().forward(x + noise if self.training else x)


@broken(check_layer, "two forwards of the same input differ in eval mode")
class NoiseInEval(Own):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward((x + 0.5 * (self.calls % 2)) % 1 if self.nodes.can_fuse and not self.nodes.soft else x)


@broken(check_layer, "within difflut_lab.layers.soft, two forwards of the same input differ")
class NoiseInSoft(Own):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x + 0.01 * (self.calls % 2) if self.nodes.soft else x)


@broken(check_layer, "a forward in eval mode changed 'calls'")
class CountsInEval(Own):
    calls: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@broken(check_layer, "the output of sample 0 depends on the other samples of its batch")
class ComparesSamples(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.detach().mean(dim=0) + 0.5)


@broken(check_layer, "a training forward changed its input in place")
class ChangesItsInput(Own):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(0.9)
        return super().forward(x)


@broken(check_layer, "its outputs are torch.float32 for inputs of float64")
class SinglePrecision(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


@broken(check_layer, "frozen, it gives other outputs in training mode than in eval mode before")
class ThawsInTraining(Own):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 1 - y if self.training else y


@broken(check_layer, "unknown option no_such_option=1 was accepted.*hand \\*\\*kwargs on to super")
class Swallows(Own):
    def __init__(self, *args: Any, span: PositiveInt = 3, **kwargs: Any) -> None:
        kwargs.pop("no_such_option", None)
        super().__init__(*args, **kwargs)


@broken(check_layer, "the option 'span' has no annotation, so that no value of layer.span would be refused")
class NotAnnotated(Own):
    def __init__(self, *args: Any, span=3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@broken(check_layer, "a default does not pass the check of its own option: layer.span=0: must be at least 1")
class WrongDefault(Own):
    def __init__(self, *args: Any, span: PositiveInt = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@broken(check_layer, "the default .* of the option 'scale' cannot be written in YAML")
class TensorDefault(Own):
    def __init__(self, *args: Any, scale: Any = torch.nn.Identity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@broken(check_layer, "building it, as the framework does, with the keywords input_size, .* raised TypeError: ")
class TakesNothing(Own):
    def __init__(self) -> None:
        super().__init__(8, 8)


@broken(check_layer, "a training forward raised ValueError: indices: must be int32")
class FloatWiring(Wired):
    def wiring(self) -> Tensor:
        return self.idx.float()


@broken(check_layer, "SCHEDULABLE names 'tau', but self.tau is None")
class NothingToSchedule(Own):
    SCHEDULABLE = ("tau",)


@broken(check_layer, "must be a subclass of difflut_lab.layers.BaseLUTLayer")
class NoLayer(nn.Module):
    def __init__(
        self, input_size: int, output_size: int, node_type: str, n: int, node_kwargs: dict[str, Any], seed: int
    ) -> None:
        super().__init__()


# nodes


@broken(check_node, "its truth table disagrees with what was trained: for the inputs \\[.*bit k of the address, least")
class MostSignificantFirst(Mean):
    def tabulate(self) -> Tensor:
        table = super().tabulate()
        order = [int(f"{address:0{self.n}b}"[::-1], 2) for address in range(2**self.n)]
        return table[:, order]


@broken(check_node, "in eval mode node 0 gives 0.* for the inputs \\[.*\\], its truth table [01] \\(bits")
class RelaxedInEval(Mean):
    def forward(self, routed: Tensor) -> Tensor:
        return self.relaxed(routed)


@broken(check_node, "its truth table [01] \\(values between 0 and 1, which count as bits where they are >= 1/2")
class AnotherThreshold(Mean):
    def forward(self, routed: Tensor) -> Tensor:
        return super().forward(routed if self.is_relaxed else (routed > 0.7).to(routed))


@broken(check_node, "truth_table\\(\\) must be bool of shape \\(8, 8\\), .*it is torch.float32 of shape \\(8, 8\\)")
class FloatTable(Mean):
    def truth_table(self) -> Tensor:
        return super().truth_table().float()


@broken(check_node, "bank\\[j\\]\\(x\\) gives other outputs than node j of the bank evaluated softly")
class CountsNodesItself(Mean):
    def relaxed(self, routed: Tensor) -> Tensor:
        values = (self.weight * (2 * routed - 1)).sum(dim=2)
        return torch.sigmoid(values + torch.arange(self.num_nodes) / self.num_nodes)


@broken(check_node, "the parameter 'weight' has shape \\(3,\\); every parameter leads with the number of nodes, here 8")
class SharedWeight(Mean):
    def __init__(self, num_nodes: int, n: PositiveInt = 3, *, seed: int = 42) -> None:
        super().__init__(num_nodes, n, seed=seed)
        self.weight = nn.Parameter(torch.ones(n))


@broken(check_node, "in training mode its outputs reach from .* takes values in \\[0, 1\\]. Finish with a sigmoid")
class Unbounded(Mean):
    def relaxed(self, routed: Tensor) -> Tensor:
        return 5 * super().relaxed(routed)


@broken(check_node, "outputs of fused\\(x, wiring, flips\\) and of forward\\(routed, flipped\\) differ")
class FusedWithoutFlips(ProbabilisticNodes):
    def relaxed_fused(self, x: Tensor, wiring: Wiring | None, flips: Flips | None) -> Tensor:
        return interpolate(x, torch.sigmoid(self.weight), wiring)


@broken(check_node, "building it, .* draws from the global random state of torch")
class GlobalInit(Mean):
    def __init__(self, num_nodes: int, n: PositiveInt = 3, *, seed: int = 42) -> None:
        super().__init__(num_nodes, n, seed=seed)
        self.weight = nn.Parameter(torch.rand(num_nodes, n))


@broken(check_node, "frozen, it gives other outputs than in eval mode before")
class NeverFreezes(Mean):
    def freeze(self) -> None:
        pass


@broken(check_node, "regularization\\(\\) must be one finite number, .* it has shape \\(8,\\)")
class PenaltyPerNode(Mean):
    def regularization(self) -> Tensor:
        return self.weight.abs().mean(dim=1)


# encoders


@broken(check_encoder, "its outputs are no bits, they reach from .* Compare with thresholds")
class NoBits(AboveMean):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.flatten(1) - x.flatten(1)[:, :1]


@broken(check_encoder, "'mean' is a tensor in a plain attribute")
class PlainThresholds(AboveMean):
    def __init__(self, input_size: int) -> None:
        super().__init__(input_size)
        del self.mean
        self.mean = torch.full((input_size,), torch.nan)


@broken(
    check_encoder, "a forward in eval mode of a part that a checkpoint was loaded into raised RuntimeError: call fit"
)
class ThresholdsNotSaved(AboveMean):
    def __init__(self, input_size: int) -> None:
        super().__init__(input_size)
        self.register_buffer("mean", torch.full((input_size,), torch.nan), persistent=False)


@broken(check_encoder, "loaded from a checkpoint into a part built anew, it gives other outputs in eval mode")
class HalfSaved(AboveMean):
    shift = 0.0

    def fit(self, x: Tensor) -> None:
        super().fit(x)
        self.shift = float(x.std())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.shift)


@broken(check_encoder, "before fit\\(x\\) it gave bits that mean nothing")
class NeverRefuses(AboveMean):
    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) > self.mean).to(x.dtype)


@broken(check_encoder, "a forward before fit\\(x\\) raised AttributeError: .*Raise a RuntimeError that says to call")
class FailsUnfitted(AboveMean):
    fitted: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) > self.fitted).to(x.dtype)


@broken(check_encoder, "its bits have shape \\(40, 24\\); its output_size says \\(40, 12\\)")
class MoreBits(AboveMean):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).repeat(1, 2)


@broken(check_encoder, "output_size is 24, but 12 features of 1 bits each")
class MoreOutputs(MoreBits):
    output_size = 24


@broken(check_encoder, "every sample gives the same bits")
class Blind(AboveMean):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(super().forward(x))


@broken(check_encoder, "its bits are torch.float64 for features of torch.float32")
class DoubleBits(AboveMean):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


@broken(check_encoder, "its bits are others in training mode than in eval mode")
class TwoModes(AboveMean):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.training else -x)


@broken(check_encoder, "fit\\(x\\) changed the training data in place")
class Normalises(AboveMean):
    def fit(self, x: Tensor) -> None:
        x -= x.mean(dim=0)
        super().fit(x)


@broken(check_encoder, "fit\\(x\\) draws from the global random state of torch")
class FitsASample(AboveMean):
    def fit(self, x: Tensor) -> None:
        super().fit(x[torch.randperm(len(x))[:50]])


@broken(check_encoder, "fitted twice to the same data, it gives other bits")
class FitsAnySample(AboveMean):
    def fit(self, x: Tensor) -> None:
        source = torch.Generator()
        source.seed()
        super().fit(x[torch.randperm(len(x), generator=source)[:5]])


@broken(check_encoder, "the output of sample 0 depends on the other samples")
class ThresholdsOfTheBatch(AboveMean):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return (x.flatten(1) > x.flatten(1).mean(dim=0)).to(x.dtype)


@broken(check_encoder, "a forward of images, \\(B, 1, F\\), raised |features of shape \\(B, 1, F\\) give other bits")
class NeverFlattens(AboveMean):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return (x > self.mean).to(x.dtype)


# heads, initialisers, regularisers, augmentations, models


@broken(check_head, "the score of a class is the same whatever the bits")
class ForgetsAClass(Linear):
    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        return torch.cat([scores[:, 1:], 0 * scores[:, :1]], dim=1)


@broken(check_head, "its input of shape \\(64, 60\\) got no gradient")
class CutsTheGradient(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@broken(check_head, "its scores have shape \\(64, 9\\); they must be \\(64, 10\\)")
class NineClasses(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 1:]


@broken(check_initializer, "asked for weights of shape \\(8, 8\\) it gave \\(8, 1\\)")
class OneColumn(Constant):
    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return torch.zeros(shape[0], 1)


@broken(check_initializer, "draws from the global random state of torch")
class IgnoresGenerator(Constant):
    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return torch.randn(shape)


@broken(check_initializer, "asked twice with generators of one seed, it gave different weights")
class GoesOn(Constant):
    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        self.value += 1
        return super().__call__(shape, generator)


@broken(check_initializer, "its weights are not all finite")
class Infinite(Constant):
    def __call__(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        return super().__call__(shape, generator) / 0


@broken(check_regularizer, "it must be one finite number that is at least 0, .* of shape \\(8,\\)")
class PerNode(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return values.square().mean(dim=1)


@broken(check_regularizer, "it must be one finite number that is at least 0, .*it is \\[-")
class Negative(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return values.sum() - 100


@broken(check_regularizer, "it has no gradient for the values: it would change nothing")
class DetachedPenalty(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return super().__call__(values.detach())


@broken(check_regularizer, "its gradient is 0 for normal values of the standard deviations 0.1, 1.0, 10.0")
class Counts(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return values.sign().square().mean()


@broken(check_regularizer, "a small step against its gradient does not lower it: from .* to .*")
class WrongGradient(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        penalty = super().__call__(values)
        return 2 * penalty.detach() - penalty


@broken(check_regularizer, "its gradient for values of magnitudes up to 0 is none, or not finite. Roots have none at 0")
class Root(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return values.square().mean().sqrt()


@broken(check_regularizer, "of values of torch.float64 on cpu it is of torch.float32 on cpu")
class SinglePrecisionPenalty(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return super().__call__(values.float())


@broken(check_regularizer, "of twice as many nodes of the same values it is 2 times as large. Take the mean over nodes")
class Sum(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return values.square().sum()


@broken(check_regularizer, "two calls with the same values give different penalties")
class Dithered(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        source = torch.Generator()
        source.seed()
        return super().__call__(values) + torch.rand((), generator=source).to(values)


@broken(check_regularizer, "draws from the global random state of torch")
class Dropped(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return (values * (torch.rand(values.shape) < 0.5)).square().mean()


@broken(check_regularizer, "changed its input in place")
class Clamps(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            values.clamp_(-0.05, 0.05)
        return super().__call__(values)


@broken(check_regularizer, "not the weight 0.0001 times the penalty, .* a regulariser does not multiply by it")
class Weighs(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return self.weight * super().__call__(values)


@broken(check_regularizer, "its gradient reaches no parameter of .* nodes, which take it")
class WidthOfEight(Cubes):
    def __call__(self, values: Tensor) -> Tensor:
        return super().__call__(values) if values.shape[1] <= 8 else 0 * values.mean()


@broken(check_regularizer, "has no option weight")
class NoWeight(Regularizer):
    def __init__(self) -> None:
        pass

    def __call__(self, values: Tensor) -> Tensor:
        return values.abs().mean()


@broken(check_regularizer, "must be a subclass of difflut_lab.nodes.regularizers.Regularizer")
class NoRegularizer(Constant):
    pass


@broken(check_augmentation, "of samples \\(24, 3, 32, 32\\) of torch.uint8 it gives .* of torch.float64. Samples keep")
class DoubleSamples(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        blended, rows = super().__call__(x, y, generator)
        return blended.double(), rows


@broken(check_augmentation, "of samples of torch.uint8 from 0 to 255 it gives floats from .* to .*scaled as those are")
class ScaledSamples(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        blended, rows = super().__call__(x, y, generator)
        return blended / 255, rows


@broken(check_augmentation, "it gives \\(24, 3, 28, 28\\) of torch.uint8")
class Crops(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return x[:, :, 2:-2, 2:-2], y


@broken(check_augmentation, "it changed the samples or the labels that it was given in place. Work on a copy")
class Erases(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        x[torch.rand(x.shape, generator=generator) < 0.1] = 0
        return x, y


@broken(check_augmentation, "it changed the samples or the labels that it was given in place")
class Relabels(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        y[torch.rand(y.shape, generator=generator) < 0.1] = 0
        return x, y


@broken(check_augmentation, "draws from the global random state of torch")
class GlobalNoise(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return super().__call__(x, y, torch.manual_seed(0))


@broken(check_augmentation, "two calls with generators of one seed give different batches")
class Remembers(Blend):
    previous: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        blended, rows = super().__call__(x, y, generator)
        kept, self.previous = self.previous, blended
        return blended if kept is None or kept.shape != blended.shape else kept, rows


@broken(check_augmentation, "generators of 5 seeds give the same batch. Draw from generator")
class Mirrors(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return x.flip(3), y


@broken(
    check_augmentation, "labels \\(24,\\) of torch.int32; they must be classes, int64 \\(24,\\), or parts of classes"
)
class ShortLabels(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return super().__call__(x, y, generator)[0], y.int()


@broken(check_augmentation, "of labels that are parts of classes it makes classes, torch.int64. Pass them on")
class Decides(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return super().__call__(x, y, generator)[0], y.argmax(dim=1) if y.is_floating_point() else y


@broken(check_augmentation, "they must be at least 0 and sum to 1; their sums reach from 0.75 to 0.75")
class Partial(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        blended, rows = super().__call__(x, y, generator)
        return blended, 0.75 * rows


@broken(check_augmentation, "parts of classes must have shape \\(24, 10\\)")
class FewerClasses(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        blended, rows = super().__call__(x, y, generator)
        return blended, rows[:, 1:]


@broken(check_augmentation, "that are not from 0 to 9")
class NextClass(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return super().__call__(x, y, generator)[0], y + 1


@broken(check_augmentation, "gave Tensor, not a tuple of two tensors")
class SamplesOnly(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> Any:
        return super().__call__(x, y, generator)[0]


@broken(check_augmentation, "with torch.uint8 samples \\(1, 3, 32, 32\\), labels and a generator raised ValueError")
class NeedsPairs(Blend):
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        if len(x) < 2:
            raise ValueError("nothing to blend with")
        return super().__call__(x, y, generator)


@broken(check_augmentation, "must be a subclass of difflut_lab.augmentations.Augmentation")
class NoAugmentation:
    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return x, y


@broken(check_model, "building it, .* draws from the global random state of torch")
class GlobalModel(Small):
    def __init__(self, *, input_shape: tuple[int, ...], num_classes: int, seed: int = 42) -> None:
        super().__init__(input_shape=input_shape, num_classes=num_classes, seed=seed)
        self.weight = nn.Parameter(torch.randn(num_classes, input_shape[0]))


@broken(check_model, "the parameter 'second' of shape \\(3,\\) got no gradient")
class HalfTrained(Small):
    def __init__(self, *, input_shape: tuple[int, ...], num_classes: int, seed: int = 42) -> None:
        super().__init__(input_shape=input_shape, num_classes=num_classes, seed=seed)
        self.second = nn.Parameter(torch.zeros(3))


@broken(check_model, "it gives other outputs in eval mode: something that it computes with is not in its state_dict")
class CalibrationNotSaved(Small):
    shift = 0.0

    def calibrate(self, x: Tensor) -> None:
        self.shift = float(x.mean())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - self.shift).abs())


@pytest.mark.parametrize(("check", "part", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.filterwarnings("ignore:.*never calls self._apply_bit_flip")
def test_broken_parts_are_told_what_is_wrong(check: Callable[..., None], part: type, message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check(part)
    said = str(caught.value)
    assert re.search(message, said), said
    assert said.startswith(f"{check.__name__.removeprefix('check_')} '{part.__name__}': ") and "\n" not in said


@pytest.mark.parametrize("device", ["cpu"])
def test_every_device_that_there_is_is_checked(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    asked = []

    class Records(Own):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            asked.append(fn(torch.zeros(1)).device.type)
            return super()._apply(fn, recurse)

    monkeypatch.setattr(checks_of_modules, "devices", lambda: [device])
    check_layer(Records)
    assert asked == [device, "cpu", "cpu", "meta"]


def test_names_options_and_sizes() -> None:
    with pytest.raises(ConfigError, match="Unknown node 'dwm'. Did you mean 'dwn'"):
        check_node("dwm")
    with pytest.raises(ConfigError, match=r"^layer\.candidates=0: must be"):
        check_layer("learnable_routing", candidates=0)
    with pytest.raises(ConfigError, match=r"Unknown key 'encoder\.bit' .* Did you mean 'encoder\.bits'"):
        check_encoder("thermometer", bit=3)
    seen = []

    class Sized(RandomRouting):
        def __init__(self, *args: Any, span: PositiveInt, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen.append((self.input_size, self.output_size, self.n, type(self.nodes), span))

    with pytest.raises(ConfigError, match=r"^layer\.span: must be given"):
        check_layer(Sized)
    check_layer(Sized, input_size=20, output_size=7, n=2, node_type=Mean, span=3)
    assert set(seen) == {(20, 7, 2, Mean, 3)}
    check_regularizer("spectral", n=1, power=0.0)
    check_augmentation("random_crop", input_shape=(1, 9, 5), num_classes=2, padding=4)
    with pytest.raises(ConfigError, match=r"padding=5: must be less than the images' size, \(9, 5\)"):
        check_augmentation("random_crop", input_shape=(1, 9, 5), padding=5)


def test_a_layer_that_asks_for_bits_per_feature_may_be_given_them() -> None:
    check_layer("feature_wise_groups", num_groups="features", bits_per_feature=4)


def test_the_name_is_the_registered_one() -> None:
    register_layer("test_relaxed")(Relaxed)
    try:
        with pytest.raises(AssertionError, match="^layer 'test_relaxed': "):
            check_layer("test_relaxed")
    finally:
        REGISTRY._parts["layer"].pop("test_relaxed")


def test_an_encoder_may_need_no_fit() -> None:
    class Sign(Encoder):
        def __init__(self, input_size: int) -> None:
            super().__init__(input_size, 1)

        def fit(self, x: Tensor) -> None:
            pass

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1) > 0).to(x.dtype)

    check_encoder(Sign)


def test_an_own_threshold_encoder() -> None:
    class Median(ThresholdEncoder):
        def __init__(self, input_size: int) -> None:
            super().__init__(input_size, bits=1)

        def find_thresholds(self, columns: Tensor) -> Tensor:
            return columns.median(dim=1, keepdim=True).values

    check_encoder(Median)


def test_the_checks_need_no_test_framework() -> None:
    for path in Path(testing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not any("pytest" in name for name in [*names, getattr(node, "module", None) or ""])
            # python -O leaves such statements out
            assert not isinstance(node, ast.Assert)
