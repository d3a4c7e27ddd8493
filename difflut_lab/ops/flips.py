"""Random bit flips, drawn by counter: the same on every device, in any order, without state.

Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). The counter of a draw is
(sample // 8, node * n + slot, step, layer), the key is the seed; its four words hold the halfwords of eight samples,
low half first. A slot flips where its halfword is below round(65536 p).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from difflut_lab.ops.shapes import chunks

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Flips:
    """Flips of one forward: every routed copy of an input, on its own, becomes 1 - x with a probability."""

    probability: float
    # from 0 to 1, to the nearest of 1/65536

    seed: int
    # 64 bits are used

    step: Tensor
    # int64 scalar: the number of the forward

    layer: int = 0
    # layers with one seed draw different flips

    sample_offset: int = 0
    # index of the batch's first sample in the global batch

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability}: must be from 0 to 1.")

    @property
    def threshold(self) -> int:
        """A slot flips where its 16 random bits are below this."""
        return round(65536 * self.probability)


class Draw(NamedTuple):
    """Flips as an op passes them to its backend, which draws them: the threshold in place of a probability."""

    step: Tensor
    threshold: int
    seed: int
    layer: int
    sample_offset: int

    def shape(self, num_nodes: int, n: int, batch: int) -> tuple[int, int, int]:
        """The shape of the packed flips."""
        return num_nodes, n, groups(self.sample_offset, batch)

    def packed(self, num_nodes: int, n: int, batch: int, device: torch.device) -> Tensor:
        """See ``packed_flips``."""
        shape = (num_nodes, n, batch)
        return packed_flips(self.threshold, self.seed, self.step, self.layer, self.sample_offset, shape, device)


def flip_arguments(flips: Flips | None) -> tuple[Tensor | None, int, int, int, int]:
    """Flips as the arguments ``step, threshold, seed, layer, sample_offset`` of an op; no step means no flips."""
    if flips is None:
        return None, 0, 0, 0, 0
    return flips.step, flips.threshold, flips.seed, flips.layer, flips.sample_offset


def flip_mask(flips: Flips, num_nodes: int, n: int, batch: int) -> Tensor:
    """Which routed inputs flip.

    Parameters
    ----------
    flips : Flips
        Probability and counters.
    num_nodes, n, batch : int
        N, n and B.

    Returns
    -------
    Tensor
        bool ``(N, n, B)``, on the device of ``flips.step``.
    """
    packed = packed_flips(
        flips.threshold,
        flips.seed,
        flips.step,
        flips.layer,
        flips.sample_offset,
        (num_nodes, n, batch),
        flips.step.device,
    )
    return unpack(packed, flips.sample_offset, batch).bool()


def groups(sample_offset: int, batch: int) -> int:
    """How many groups of eight samples, counted from sample 0, the batch touches."""
    return (sample_offset % 8 + batch + 7) // 8


def packed_flips(
    threshold: int,
    seed: int,
    step: Tensor,
    layer: int,
    sample_offset: int,
    shape: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """The flips of a batch, eight samples to a byte.

    Parameters
    ----------
    threshold, seed, step, layer, sample_offset
        As in ``Flips``.
    shape : tuple of int
        ``(N, n, B)``
    device : torch.device
        Where to draw.

    Returns
    -------
    Tensor
        uint8 ``(N, n, groups)``; bit i of a byte is the sample with i = sample mod 8.
    """
    num_nodes, n, batch = shape
    count = groups(sample_offset, batch)
    packed = torch.empty(num_nodes * n, count, dtype=torch.uint8, device=device)
    first = sample_offset // 8
    samples = torch.arange(first, first + count, device=device)
    key = (seed & WORD, seed >> 32 & WORD)
    for part in chunks(num_nodes * n, 4 * count, device):
        slots = torch.arange(part.start, part.stop, device=device).unsqueeze(1)
        words = philox4x32(samples, slots, step & WORD, torch.tensor(layer & WORD), key)
        byte = packed[part].zero_()
        for index, word in enumerate(words):
            byte |= (word & 0xFFFF < threshold).view(torch.uint8) << 2 * index
            byte |= (word >> 16 & 0xFFFF < threshold).view(torch.uint8) << 2 * index + 1
    return packed.view(num_nodes, n, count)


def unpack(packed: Tensor, sample_offset: int, batch: int) -> Tensor:
    """uint8 0 or 1, ``(N, n, B)``, of ``packed_flips``."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2).narrow(-1, sample_offset % 8, batch)


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of counters that broadcast against each other.

    Parameters
    ----------
    c0, c1, c2, c3 : Tensor
        int64 words of the counter, below 2^32. While they differ in shape, the first rounds work on small tensors.
    key : tuple of int
        Two words.

    Returns
    -------
    tuple of Tensor
        Four words: the bits of uint32, in int32.
    """
    for _ in range(ROUNDS):
        # int64 products wrap, which leaves all 64 bits right; what is above a word's 32 bits is cut off here only
        product0, product1 = (c0 & WORD) * MULTIPLIERS[0], (c2 & WORD) * MULTIPLIERS[1]
        c0, c1 = (product1 >> 32) ^ (c1 ^ key[0]), product1
        c2, c3 = (product0 >> 32) ^ (c3 ^ key[1]), product0
        key = (key[0] + KEY_STEPS[0] & WORD, key[1] + KEY_STEPS[1] & WORD)
    return tuple(word.to(torch.int32) for word in torch.broadcast_tensors(c0, c1, c2, c3))
