from __future__ import annotations

import copy
import io
import pickle
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab import REGISTRY, schema
from difflut_lab.encoders import ThresholdEncoder
from difflut_lab.errors import ConfigError, DataError

ENCODERS = REGISTRY.names("encoder")


def build(name: str, inputs: int = 6, **options: Any) -> ThresholdEncoder:
    encoder = REGISTRY.build("encoder", {"name": name, **options}, input_size=inputs)
    assert isinstance(encoder, ThresholdEncoder)
    return encoder


@pytest.mark.parametrize("scope", ["feature", "global"])
@pytest.mark.parametrize("name", ENCODERS)
def test_bits(name: str, scope: str) -> None:
    encoder = build(name, bits=4, scope=scope)
    x = torch.randn(200, 6) * torch.arange(1, 7)
    encoder.fit(x)
    assert encoder.bits_per_feature == 4 and encoder.output_size == 24
    assert encoder.thresholds.shape == (6 if scope == "feature" else 1, 4)
    assert (encoder.thresholds[:, 1:] > encoder.thresholds[:, :-1]).all()
    y = encoder(x[:50])
    wanted = (x[:50].unsqueeze(2) > encoder.thresholds).flatten(1).float()
    assert torch.equal(y, wanted) and y.dtype == torch.float32
    assert y.t().is_contiguous()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert encoder(x.to(dtype)).dtype == dtype
    assert not encoder(x.clone().requires_grad_()).requires_grad
    # a value at a threshold is not above it
    assert torch.equal(encoder(encoder.thresholds[:1, 1:2].expand(1, 6))[0, :4], torch.tensor([1.0, 0, 0, 0]))


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


@pytest.mark.parametrize("scope", ["feature", "global"])
@pytest.mark.parametrize("name", ENCODERS)
def test_integers_give_the_bits_of_the_same_floats(name: str, scope: str) -> None:
    x = torch.randint(0, 256, (80, 6), dtype=torch.uint8)
    encoder, floats = build(name, scope=scope), build(name, scope=scope)
    encoder.fit(x)
    floats.fit(x.float())
    assert torch.equal(encoder.thresholds, floats.thresholds)
    assert torch.equal(encoder(x), floats(x.float()))


def test_thermometer_thresholds() -> None:
    encoder = build("thermometer", inputs=2, bits=3)
    encoder.fit(torch.tensor([[0.0, -2.0], [4.0, 1.0], [1.0, 2.0]]))
    torch.testing.assert_close(encoder.thresholds, torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]]))
    encoder = build("thermometer", inputs=2, bits=1, scope="global")
    encoder.fit(torch.tensor([[0.0, -2.0], [4.0, 1.0]]))
    torch.testing.assert_close(encoder.thresholds, torch.tensor([[1.0]]))


@pytest.mark.parametrize("samples", [1, 2, 5, 100, 1003])
@pytest.mark.parametrize("bits", [1, 3, 7])
def test_distributive_thresholds(samples: int, bits: int) -> None:
    x = torch.randn(samples, 70).round(decimals=1)
    encoder = build("distributive_thermometer", inputs=70, bits=bits)
    encoder.fit(x)
    ordered = x.sort(dim=0).values
    for i in range(1, bits + 1):
        assert torch.equal(encoder.thresholds[:, i - 1], ordered[samples * i // (bits + 1)])
    encoder = build("distributive_thermometer", inputs=70, bits=bits, scope="global")
    encoder.fit(x)
    ordered = x.flatten().sort().values
    assert torch.equal(encoder.thresholds[0], ordered[[70 * samples * i // (bits + 1) for i in range(1, bits + 1)]])


def test_distributive_bits_are_evenly_set() -> None:
    encoder = build("distributive_thermometer", inputs=4, bits=3)
    x = torch.randn(1000, 4).exp()
    encoder.fit(x)
    share = encoder(x).mean(0).view(4, 3)
    torch.testing.assert_close(share, torch.tensor([0.75, 0.5, 0.25]).expand(4, -1), atol=0.002, rtol=0)


def test_distributive_fits_a_whole_data_set_quickly() -> None:
    x = torch.randn(5400, 784).relu()
    encoder = build("distributive_thermometer", inputs=784)
    start = time.perf_counter()
    encoder.fit(x)
    # a tenth of MNIST; about 0.06 s where nothing else runs
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ENCODERS)
def test_unfitted(name: str) -> None:
    encoder = build(name)
    assert encoder.thresholds.isnan().all()
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
def test_constant_features_give_zeros(name: str) -> None:
    encoder = build(name)
    x = torch.full((10, 6), 0.3)
    encoder.fit(x)
    assert encoder(x).count_nonzero() == 0


@pytest.mark.parametrize("name", ENCODERS)
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^encoder\.bits=0: must be at least 1"):
        schema.validate_part("encoder", {"name": name, "bits": 0}, "encoder")
    with pytest.raises(ConfigError, match=r"^encoder\.scope=features: must be one of feature, global\. Did you mean"):
        schema.validate_part("encoder", {"name": name, "scope": "features"}, "encoder")
    with pytest.raises(ConfigError, match="bits=0: must be at least 1"):
        build(name, bits=0)
    with pytest.raises(ConfigError, match="scope=all: must be one of feature, global"):
        build(name, scope="all")


@pytest.mark.parametrize("name", ENCODERS)
def test_moves_with_the_model(name: str) -> None:
    encoder = build(name)
    x = torch.randn(30, 6)
    encoder.fit(x)
    wanted: Tensor = encoder(x)
    assert torch.equal(encoder.double()(x), wanted)
    assert encoder.to("meta").thresholds.is_meta
