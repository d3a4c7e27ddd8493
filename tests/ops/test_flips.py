"""The flips are the stated counter-based generator, bit for bit, and as random as promised."""

from __future__ import annotations

import pytest
import torch

from difflut_lab.ops import Flips, flip_mask
from difflut_lab.ops.flips import packed_flips, philox4x32, unpack

WORD = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python integers, as its authors wrote it down."""
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & WORD,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & WORD,
        )
        key = ((key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD)
    return counter


# known answers published with Random123
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox(counter, key) == words
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    assert tuple(int(word) & WORD for word in philox4x32(c0, c1, c2, c3, key)) == words


def test_philox_broadcasts_its_counters() -> None:
    generator = torch.Generator().manual_seed(1)
    c0, c1, c2, c3 = (torch.randint(0, WORD + 1, shape, generator=generator) for shape in [(5,), (3, 1), (), ()])
    words = philox4x32(c0, c1, c2, c3, (123, WORD))
    for slot in range(3):
        for group in range(5):
            counter = (int(c0[group]), int(c1[slot, 0]), int(c2), int(c3))
            assert tuple(int(word[slot, group]) & WORD for word in words) == philox(counter, (123, WORD))


@pytest.mark.parametrize("sample_offset", [0, 3, 8, 2**33 - 16 + 5])
def test_mask_follows_the_counter_layout(sample_offset: int) -> None:
    seed, step, layer, n, threshold = 0x1234567_89ABCDEF, 7, 3, 4, round(65536 * 0.3)
    mask = flip_mask(Flips(0.3, seed, torch.tensor(step), layer, sample_offset), 3, n, 11)
    assert mask.shape == (3, n, 11)
    assert mask.dtype == torch.bool
    for node in range(3):
        for slot in range(n):
            for b in range(11):
                sample = sample_offset + b
                words = philox((sample // 8, node * n + slot, step, layer), (seed & WORD, seed >> 32))
                word = words[sample % 8 // 2]
                halfword = word >> 16 if sample % 2 else word & 0xFFFF
                assert bool(mask[node, slot, b]) == (halfword < threshold)


def test_a_sample_keeps_its_flips_whatever_the_batch() -> None:
    step = torch.tensor(5)
    whole = flip_mask(Flips(0.5, 9, step), 6, 3, 100)
    assert torch.equal(flip_mask(Flips(0.5, 9, step), 6, 3, 37), whole[:, :, :37])
    assert torch.equal(flip_mask(Flips(0.5, 9, step, sample_offset=13), 6, 3, 50), whole[:, :, 13:63])


def test_packed_flips_hold_the_mask() -> None:
    flips = Flips(0.5, 9, torch.tensor(5), sample_offset=13)
    packed = packed_flips(flips.threshold, 9, flips.step, 0, 13, (6, 3, 50), torch.device("cpu"))
    assert packed.shape == (6, 3, 7)
    assert torch.equal(unpack(packed, 13, 50).bool(), flip_mask(flips, 6, 3, 50))


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5])
def test_fraction_and_independence(probability: float) -> None:
    masks = [
        flip_mask(Flips(probability, seed, torch.tensor(step), layer), 64, 6, 512).double()
        for seed, step, layer in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1 << 32, 0, 0)]
    ]
    count = masks[0].numel()
    sigma = (probability * (1 - probability)) ** 0.5
    for mask in masks:
        assert abs(float(mask.mean()) - probability) < 5 * sigma / count**0.5
        # every slot and every sample flips at the same rate
        assert float((mask.mean(dim=2) - probability).abs().max()) < 6 * sigma / 512**0.5
        assert float((mask.mean(dim=(0, 1)) - probability).abs().max()) < 6 * sigma / 384**0.5
    centred = [mask - probability for mask in masks]
    pairs = [(first, second) for i, first in enumerate(centred) for second in centred[:i]]
    first = centred[0]
    pairs += [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first[:, :, 1:], first[:, :, :-1])]
    for left, right in pairs:
        assert abs(float((left * right).mean())) < 5 * sigma**2 / left.numel() ** 0.5


def test_never_and_always() -> None:
    step = torch.tensor(0)
    assert not flip_mask(Flips(0.0, 1, step), 20, 6, 64).any()
    assert flip_mask(Flips(1.0, 1, step), 20, 6, 64).all()


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_refuses_what_is_no_probability(probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        Flips(probability, 1, torch.tensor(0))
