"""What holds for every encoder, and each one's bits against its definition."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from difflut_lab import REGISTRY, schema
from difflut_lab.encoders import Encoder, FittedEncoder, build_encoder
from difflut_lab.errors import ConfigError, DataError
from difflut_lab.models import LUTMLP
from difflut_lab.registry import Registry

ENCODERS = REGISTRY.names("encoder")
SCOPES = ["feature", "channel", "global"]


def build(name: str, inputs: int = 6, **options: Any) -> FittedEncoder:
    encoder = REGISTRY.build("encoder", {"name": name, **options}, input_size=inputs)
    assert isinstance(encoder, FittedEncoder)
    return encoder


def above(thresholds: list[float], x: float) -> list[int]:
    return [int(x > threshold) for threshold in thresholds]


def uniform_level(low: float, high: float, count: int, x: float) -> int:
    return sum(x > low + (high - low) * i / count for i in range(1, count))


def number(value: int, bits: int) -> list[int]:
    return [int(digit) for digit in reversed(f"{value:0{bits}b}")]


def thermometer(row: np.ndarray, bits: int, x: float) -> list[int]:
    return above([row.min() + (row.max() - row.min()) * i / (bits + 1) for i in range(1, bits + 1)], x)


def distributive(row: np.ndarray, bits: int, x: float) -> list[int]:
    return above([sorted(row)[len(row) * i // (bits + 1)] for i in range(1, bits + 1)], x)


def gaussian(row: np.ndarray, bits: int, x: float) -> list[int]:
    normal = NormalDist(float(row.mean()), float(row.std()))
    return above([normal.inv_cdf(i / (bits + 1)) for i in range(1, bits + 1)], x)


def binary(row: np.ndarray, bits: int, x: float) -> list[int]:
    return number(uniform_level(row.min(), row.max(), 2**bits, x), bits)


def gray(row: np.ndarray, bits: int, x: float) -> list[int]:
    # the list of code words doubled and reflected, bit by bit
    words = [""]
    for _ in range(bits):
        words = ["0" + word for word in words] + ["1" + word for word in reversed(words)]
    return [int(digit) for digit in reversed(words[uniform_level(row.min(), row.max(), 2**bits, x)])]


def onehot(row: np.ndarray, bits: int, x: float) -> list[int]:
    level = uniform_level(row.min(), row.max(), bits, x)
    return [int(level == t) for t in range(bits)]


def sign_magnitude(row: np.ndarray, bits: int, x: float) -> list[int]:
    return [*number(uniform_level(0, abs(row).max(), 2 ** (bits - 1), abs(x)), bits - 1), int(x < 0)]


def logarithmic(row: np.ndarray, bits: int, x: float) -> list[int]:
    fraction = (x - row.min()) / (row.max() - row.min())
    if fraction <= 0 or math.isinf(fraction):
        level = 0 if fraction <= 0 else 2**bits - 1
    else:
        level = math.ceil(math.log2(fraction)) + 2**bits - 1
    return number(min(max(level, 0), 2**bits - 1), bits)


DEFINITIONS: dict[str, Callable[[np.ndarray, int, float], list[int]]] = {
    "thermometer": thermometer,
    "distributive_thermometer": distributive,
    "learnable_thermometer": distributive,
    "gaussian_thermometer": gaussian,
    "binary": binary,
    "gray": gray,
    "onehot": onehot,
    "sign_magnitude": sign_magnitude,
    "logarithmic": logarithmic,
}


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ENCODERS)
def test_bits_are_those_of_the_definition(name: str, scope: str, bits: int) -> None:
    encoder = build_encoder({"name": name, "scope": scope, "bits": bits}, (3, 2))
    train = torch.randn(37, 3, 2) * torch.tensor([[1.0, 2.0], [0.1, 0.2], [30.0, 5.0]]) + torch.arange(6.0).view(3, 2)
    encoder.fit(train)
    x = torch.cat(
        [train[:20], 4 * torch.randn(10, 3, 2), torch.full((1, 3, 2), math.inf), torch.full((1, 3, 2), -math.inf)]
    )
    values, features = train.double().numpy(), [(channel, pixel) for channel in range(3) for pixel in range(2)]
    for index, (channel, pixel) in enumerate(features):
        row = {"feature": values[:, channel, pixel], "channel": values[:, channel], "global": values}[scope].ravel()
        wanted = [DEFINITIONS[name](row, bits, value) for value in x[:, channel, pixel].double().tolist()]
        assert encoder(x)[:, index * bits : (index + 1) * bits].tolist() == wanted


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ENCODERS)
def test_form_of_the_output(name: str, scope: str) -> None:
    encoder = build_encoder({"name": name, "bits": 4, "scope": scope}, (2, 3))
    x = torch.randn(200, 2, 3)
    encoder.fit(x)
    assert encoder.bits_per_feature == 4 and encoder.output_size == 24
    y = encoder(x[:50])
    assert y.shape == (50, 24) and y.dtype == torch.float32
    assert ((y == 0) | (y == 1)).all()
    assert y.t().is_contiguous()
    assert torch.equal(encoder(x.double()), y.new_tensor(encoder(x).tolist()).double())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert encoder(x.to(dtype)).dtype == dtype
        assert encoder(x.to(dtype)).t().is_contiguous()
    with torch.no_grad():
        assert torch.equal(encoder(x[:50]), y)
    assert torch.equal(encoder.eval()(x[:50]), y)
    seen = x.clone().requires_grad_()
    assert not encoder(seen).requires_grad
    # one sample at a time, as all at once
    assert torch.equal(torch.cat([encoder(x[i : i + 1]) for i in range(50)]), y)


@pytest.mark.parametrize("name", ENCODERS)
def test_shapes_are_flattened(name: str) -> None:
    encoder = build(name, inputs=12)
    images = torch.rand(30, 3, 2, 2)
    encoder.fit(images)
    assert torch.equal(encoder(images), encoder(images.flatten(1)))
    assert encoder(images[:0]).shape == (0, 36)
    with pytest.raises(ValueError, match=r"expects 12 features per sample, got shape \(30, 13\)"):
        encoder(torch.rand(30, 13))
    with pytest.raises(ValueError, match="expects 12 features"):
        encoder.fit(torch.rand(12))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ENCODERS)
def test_integers_give_the_bits_of_the_same_floats(name: str, scope: str) -> None:
    x = torch.randint(0, 256, (80, 6), dtype=torch.uint8)
    encoder, floats = (build(name, scope=scope, input_shape=(3, 2)) for _ in range(2))
    encoder.fit(x)
    floats.fit(x.float())
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in floats.state_dict().items())
    assert torch.equal(encoder(x), floats(x.float()))


@pytest.mark.parametrize("name", ENCODERS)
def test_unfitted(name: str) -> None:
    encoder = build(name)
    assert all(buffer.isnan().all() for buffer in encoder.buffers())
    with pytest.raises(RuntimeError, match=r"has no thresholds yet: call fit\(x\)"):
        encoder(torch.rand(3, 6))
    assert "not fitted" in repr(encoder)
    build(name).load_state_dict(encoder.state_dict())
    with pytest.raises(RuntimeError, match="has no thresholds yet"):
        encoder(torch.rand(3, 6))


@pytest.mark.parametrize("name", ENCODERS)
def test_loaded_copied_and_pickled_encoders_are_fitted(name: str) -> None:
    encoder = build(name)
    x = torch.randn(40, 6)
    encoder.fit(x)
    file = io.BytesIO()
    torch.save(torch.nn.Sequential(encoder).state_dict(), file)
    file.seek(0)
    fresh = build(name)
    torch.nn.Sequential(fresh).load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(x), encoder(x))
        assert "not fitted" not in repr(other)
    # a copy of one that is not fitted learns it from its own state
    copied = copy.deepcopy(build(name))
    copied.load_state_dict(encoder.state_dict())
    assert torch.equal(copied(x), encoder(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ENCODERS)
def test_values_that_are_not_numbers(name: str, value: float) -> None:
    x = torch.rand(20, 2, 3)
    x[7, 1, 1] = value
    encoder = build(name)
    with pytest.raises(DataError, match="NaN or infinite values, the first in feature 4"):
        encoder.fit(x)
    with pytest.raises(DataError, match="no training data"):
        encoder.fit(x[:0])
    with pytest.raises(RuntimeError, match="no thresholds"):
        encoder(torch.rand(2, 6))


@pytest.mark.parametrize("name", ENCODERS)
def test_constant_features(name: str) -> None:
    encoder = build(name)
    x = torch.full((10, 6), 0.3)
    encoder.fit(x)
    if name == "onehot":
        assert torch.equal(encoder(x), torch.tensor([1.0, 0, 0]).repeat(10, 6))
    elif name == "sign_magnitude":
        # of the range from 0 to 0.3, the greatest
        assert torch.equal(encoder(x), torch.tensor([1.0, 1, 0]).repeat(10, 6))
    else:
        assert encoder(x).count_nonzero() == 0
        # what is greater than all training values is above all thresholds, in the last level
        top = torch.tensor([0.0, 0, 1]) if name == "gray" else torch.ones(3)
        assert torch.equal(encoder(x + 1), top.repeat(10, 6))
    x = torch.zeros(10, 6)
    encoder.fit(x)
    assert encoder(x).sum() == (60 if name == "onehot" else 0)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_value_that_is_missing_has_the_bits_of_the_least(name: str) -> None:
    encoder = build(name, bits=4)
    encoder.fit(torch.rand(50, 6) + 1)
    least = torch.zeros(1, 6)
    assert torch.equal(encoder(torch.full((1, 6), math.nan)), encoder(least))


@pytest.mark.parametrize("name", ENCODERS)
def test_values_far_apart(name: str) -> None:
    x = torch.tensor([[-3e37], [-1e-40], [0.0], [1e-40], [3e37]])
    encoder = build(name, inputs=1)
    encoder.fit(x)
    y = encoder(x)
    assert y.isfinite().all() and not torch.equal(y[0], y[-1])


@pytest.mark.parametrize("name", ENCODERS)
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^encoder\.bits=0: must be at least [12]"):
        schema.validate_part("encoder", {"name": name, "bits": 0}, "encoder")
    with pytest.raises(ConfigError, match=r"^encoder\.scope=features: must be one of feature, channel, global\. Did"):
        schema.validate_part("encoder", {"name": name, "scope": "features"}, "encoder")
    with pytest.raises(ConfigError, match="bits=0: must be at least [12]"):
        build(name, bits=0)
    with pytest.raises(ConfigError, match=r"scope=channel: needs input_shape, the shape of a sample"):
        build(name, scope="channel")
    with pytest.raises(ConfigError, match=r"input_shape=\(2, 4\): has not input_size=6 values"):
        build(name, input_shape=(2, 4))
    with pytest.raises(ConfigError, match="scope=all: must be one of feature, channel, global"):
        build(name, scope="all")


@pytest.mark.parametrize("name", ENCODERS)
def test_moves_with_the_model(name: str) -> None:
    encoder = build(name)
    x = torch.randn(30, 6)
    encoder.fit(x)
    wanted: Tensor = encoder(x)
    assert torch.equal(encoder.double()(x), wanted)
    assert all(buffer.is_meta for buffer in encoder.to("meta").buffers())


@pytest.mark.parametrize("name", ENCODERS)
def test_a_channel_of_samples_with_one_dimension_is_a_feature(name: str) -> None:
    x = torch.randn(30, 4) * torch.arange(1.0, 5.0)
    by_channel = build_encoder({"name": name, "scope": "channel"}, (4,))
    by_feature = build_encoder({"name": name, "scope": "feature"}, (4,))
    by_channel.fit(x)
    by_feature.fit(x)
    assert torch.equal(by_channel(x), by_feature(x))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ENCODERS)
def test_in_a_network(name: str, scope: str) -> None:
    model = LUTMLP(
        widths=[20, 10],
        input_shape=(2, 2, 2),
        num_classes=2,
        encoder={"name": name, "scope": scope},
        layer={"name": "random_routing"},
        node={"name": "dwn", "n": 3},
        head={"name": "group_sum"},
    )
    x = torch.rand(30, 2, 2, 2)
    model.calibrate(x)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(x).shape == (30, 2)


def test_an_encoder_that_asks_for_its_input_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(Encoder):
        def __init__(self, input_size: int, *, bits: int = 2) -> None:
            super().__init__(input_size, bits)

        def fit(self, x: Tensor) -> None: ...

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1) > 0).float().repeat_interleave(self.bits_per_feature, dim=1)

    monkeypatch.setattr(Registry, "get", lambda self, kind, name, **_: Doubled)
    encoder = build_encoder({"name": "doubled", "bits": 3}, (1, 2, 2))
    assert isinstance(encoder, Doubled) and encoder.output_size == 12
    assert isinstance(build_encoder("doubled", (4,)), nn.Module)
