from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from difflut_lab import REGISTRY
from difflut_lab.encoders import ThresholdEncoder

THERMOMETERS = [name for name in REGISTRY.names("encoder") if name.endswith("thermometer")]


def build(name: str, inputs: int = 6, **options: Any) -> ThresholdEncoder:
    encoder: ThresholdEncoder = REGISTRY.build("encoder", {"name": name, **options}, input_size=inputs)
    return encoder


@pytest.mark.parametrize("scope", ["feature", "global"])
@pytest.mark.parametrize("name", THERMOMETERS)
def test_bits_are_comparisons_with_ascending_thresholds(name: str, scope: str) -> None:
    encoder = build(name, bits=4, scope=scope)
    x = torch.randn(200, 6) * torch.arange(1, 7)
    encoder.fit(x)
    assert encoder.thresholds.shape == (6 if scope == "feature" else 1, 4)
    assert (encoder.thresholds[:, 1:] > encoder.thresholds[:, :-1]).all()
    bits = encoder(x)
    assert torch.equal(bits, (x.unsqueeze(2) > encoder.thresholds).flatten(1).float())
    # ones first: a feature's bits never rise
    assert (bits.view(200, 6, 4).diff(dim=2) <= 0).all()
    # a value at a threshold is not above it
    assert torch.equal(encoder(encoder.thresholds[:1, 1:2].expand(1, 6))[0, :4], torch.tensor([1.0, 0, 0, 0]))


def test_gaussian_thresholds() -> None:
    encoder = build("gaussian_thermometer", inputs=2, bits=3)
    encoder.fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    z = 0.6744897501960817  # three quarters of a normal distribution are below
    torch.testing.assert_close(encoder.thresholds, torch.tensor([[2 - z, 2.0, 2 + z], [5.0, 5.0, 5.0]]))


def test_gaussian_thresholds_of_values_far_from_zero() -> None:
    x = torch.randn(1000, 1)
    near, far = build("gaussian_thermometer", inputs=1), build("gaussian_thermometer", inputs=1)
    near.fit(x)
    far.fit(x + 4096)
    torch.testing.assert_close(far.thresholds - 4096, near.thresholds, atol=1e-3, rtol=0)


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
