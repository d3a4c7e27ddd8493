"""Encoders that number a value's level: decoding gives the level back, and the codes are what their names say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from difflut_lab import REGISTRY
from difflut_lab.encoders import LevelEncoder, Logarithmic, build_encoder
from difflut_lab.errors import ConfigError


def build(name: str, inputs: int = 1, **options: Any) -> LevelEncoder:
    encoder = REGISTRY.build("encoder", {"name": name, **options}, input_size=inputs)
    assert isinstance(encoder, LevelEncoder)
    return encoder


def decode(name: str, bits: Tensor) -> list[int]:
    """Levels of code words, (B, T); of sign and magnitude: the magnitude, or minus one less it below zero."""
    words = [[int(bit) for bit in row] for row in bits.tolist()]
    if name == "onehot":
        assert all(sum(word) == 1 for word in words)
        return [word.index(1) for word in words]
    if name == "gray":
        # every bit is the exclusive or of those above it
        words = [[sum(word[t:]) % 2 for t in range(len(word))] for word in words]
    if name == "sign_magnitude":
        magnitudes = [sum(bit << t for t, bit in enumerate(word[:-1])) for word in words]
        return [-1 - magnitude if word[-1] else magnitude for word, magnitude in zip(words, magnitudes, strict=True)]
    return [sum(bit << t for t, bit in enumerate(word)) for word in words]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 9, 12])
@pytest.mark.parametrize("name", ["binary", "gray", "onehot"])
def test_decoding_gives_the_level(name: str, bits: int) -> None:
    encoder = build(name, bits=bits)
    levels = bits if name == "onehot" else 2**bits
    assert encoder.num_levels == levels
    encoder.fit(torch.tensor([[-3.0], [-3.0 + levels]]))
    centres = torch.arange(levels) - 2.5
    assert decode(name, encoder(centres[:, None])) == list(range(levels))
    # a value at a bound is not above it
    assert decode(name, encoder(centres[:, None] + 0.5)) == list(range(levels))
    assert decode(name, encoder(torch.tensor([[-3.0], [-1e9], [1e9]]))) == [0, 0, levels - 1]


@pytest.mark.parametrize("bits", [2, 3, 8, 9])
def test_neighbours_in_gray_code_differ_in_one_bit(bits: int) -> None:
    encoder = build("gray", bits=bits)
    encoder.fit(torch.tensor([[0.0], [1.0]]))
    words = encoder((torch.arange(2**bits)[:, None] + 0.5) / 2**bits)
    assert (words[1:] != words[:-1]).sum(dim=1).eq(1).all()
    assert len(words.unique(dim=0)) == 2**bits


@pytest.mark.parametrize("bits", [2, 3, 8, 9])
def test_sign_and_magnitude(bits: int) -> None:
    encoder = build("sign_magnitude", bits=bits)
    half = 2 ** (bits - 1)
    # the greatest absolute value may be that of the least value
    encoder.fit(torch.tensor([[-float(half)], [0.25 * half]]))
    x = torch.arange(half)[:, None] + 0.5
    assert decode("sign_magnitude", encoder(x)) == list(range(half))
    assert decode("sign_magnitude", encoder(-x)) == [-1 - level for level in range(half)]
    assert torch.equal(encoder(x)[:, :-1], encoder(-x)[:, :-1])
    assert encoder(torch.tensor([[0.0], [-0.0]])).count_nonzero() == 0
    assert decode("sign_magnitude", encoder(torch.tensor([[9.0 * half], [-9.0 * half]]))) == [half - 1, -half]


def test_magnitudes_of_integers() -> None:
    x = torch.tensor([[-128], [127], [0], [-1]], dtype=torch.int8)
    encoder = build("sign_magnitude", bits=3)
    encoder.fit(x)
    assert encoder.high.tolist() == [128]
    assert decode("sign_magnitude", encoder(x)) == [-4, 3, 0, -1]


@pytest.mark.parametrize(("bits", "base"), [(1, 2.0), (3, 2.0), (4, 2.0), (6, 2.0), (3, 10.0), (8, 1.25)])
def test_logarithmic_levels_are_geometric(bits: int, base: float) -> None:
    encoder = build("logarithmic", bits=bits, base=base)
    levels = 2**bits
    # multiplied out, no powers: bounds from the greatest value down
    bounds = [1024.0]
    while len(bounds) < levels:
        bounds.insert(0, bounds[0] / base)
    encoder.fit(torch.tensor([[0.0], [1024.0]]))
    below = torch.tensor(bounds, dtype=torch.float64)[:, None] * (1 - 1e-4)
    assert decode("logarithmic", encoder(below)) == list(range(levels))
    above = torch.tensor(bounds, dtype=torch.float64)[:, None] * (1 + 1e-4)
    assert decode("logarithmic", encoder(above)) == [*range(1, levels), levels - 1]
    assert decode("logarithmic", encoder(torch.tensor([[0.0], [-7.0], [1e9]]))) == [0, 0, levels - 1]


def test_logarithmic_levels_do_not_depend_on_the_normalisation() -> None:
    # sums and quotients by powers of 2, which do not round
    x = torch.randint(0, 257, (200, 1)).float()
    raw, normalised = build("logarithmic", bits=4), build("logarithmic", bits=4)
    raw.fit(x)
    normalised.fit((x - 64) / 128)
    assert torch.equal(raw(x), normalised((x - 64) / 128))
    # a value at a bound is not above it
    raw.fit(torch.tensor([[0.0], [256.0]]))
    assert decode("logarithmic", raw(torch.tensor([[256.0], [128.0], [64.0], [65.0]]))) == [15, 14, 13, 14]


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"base=2.0: with bits=8 the levels reach down to base\^-255 .* 1\.41"):
        Logarithmic(4, bits=8)
    with pytest.raises(ConfigError, match=r"base=1e\+300: with bits=8"):
        Logarithmic(4, bits=8, base=1e300)
    with pytest.raises(ConfigError, match="base=1.0: must be greater than 1"):
        Logarithmic(4, base=1.0)
    with pytest.raises(ConfigError, match="bits=9: must be at least 1 and at most 8"):
        Logarithmic(4, bits=9, base=1.01)
    with pytest.raises(ConfigError, match=r"bits=17: 131072 levels are too many; at most 2\^16"):
        build("binary", bits=17)
    with pytest.raises(ConfigError, match="bits=1: must be at least 2, one for the sign"):
        build("sign_magnitude", bits=1)


def test_more_onehot_bits_than_an_integer_has() -> None:
    encoder = build_encoder({"name": "onehot", "bits": 300}, (2,))
    encoder.fit(torch.tensor([[0.0, 0.0], [300.0, 3.0]]))
    words = encoder(torch.tensor([[299.5, 1.005], [255.5, 0.0]])).view(2, 2, 300)
    assert words.argmax(dim=2).tolist() == [[299, 100], [255, 0]]
    assert words.sum(dim=2).eq(1).all()
