"""A wiring's inverse lists, for every input, the slots that read it."""

from __future__ import annotations

import pytest
import torch

from difflut_lab.ops import Wiring
from difflut_lab.ops.wiring import invert, sum_over_readers


@pytest.mark.parametrize("lowest", [0, -1])
def test_inverse_lists_the_readers(lowest: int) -> None:
    indices = torch.randint(lowest, 9, (11, 4), dtype=torch.int32)
    indices[indices == 5] = 6  # an input that nobody reads
    wiring = Wiring(indices, 9)
    slots, start = wiring.inverse
    assert wiring.padded == (lowest < 0)
    assert slots.dtype == start.dtype == torch.int32
    for f in range(9):
        assert slots[start[f] : start[f + 1]].tolist() == (indices.flatten() == f).nonzero().flatten().tolist()
    assert int(start[-1]) == slots.numel() == int((indices >= 0).sum())


def test_inverse_is_made_once() -> None:
    wiring = Wiring(torch.randint(0, 9, (11, 4), dtype=torch.int32), 9)
    assert wiring.inverse[0] is wiring.inverse[0]


def test_sum_over_readers_weighs_shared_rows() -> None:
    candidates = torch.randint(0, 7, (5, 3), dtype=torch.int32)
    rows, weights = torch.rand(5, 4, dtype=torch.float64), torch.rand(15, dtype=torch.float64)
    slots, start = invert(candidates, 7)
    total = sum_over_readers(rows, slots, start, weights[slots], entries_per_row=3)
    expected = torch.zeros(7, 4, dtype=torch.float64)
    for slot in range(15):
        expected[candidates.flatten()[slot]] += weights[slot] * rows[slot // 3]
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), "int32"),
        (torch.zeros(3, dtype=torch.int32), "shape"),
        (torch.full((3, 2), 4, dtype=torch.int32), "from -1 to 3, found 4 to 4"),
        (torch.full((3, 2), -2, dtype=torch.int32), "found -2 to -2"),
    ],
)
def test_refuses_indices_out_of_range(indices: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wiring(indices, 4)
