"""Routed rows: what each node reads, clamped and flipped, and gradients back to the inputs."""

from __future__ import annotations

import pytest
import torch

from difflut_lab.ops import Flips, Wiring, flip_mask
from difflut_lab.ops.gather import gather


def flips(offset: int = 0) -> Flips:
    return Flips(probability=0.4, seed=7, step=torch.tensor(3), layer=2, sample_offset=offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3, 127])
def test_rows_are_what_the_wiring_names(batch: int, dtype: torch.dtype) -> None:
    indices = torch.randint(-1, 6, (10, 3), dtype=torch.int32)
    x = (2 * torch.rand(batch, 6, dtype=dtype) - 0.5).requires_grad_()
    padded = torch.cat([x.clamp(0, 1), x.new_zeros(batch, 1)], dim=1)
    wanted = padded[:, indices.long()].permute(1, 2, 0)
    rows = gather(x, 3, Wiring(indices, 6))
    assert rows.is_contiguous() and rows.dtype == dtype
    torch.testing.assert_close(rows, wanted, rtol=0, atol=0)
    upstream = torch.randn(10, 3, batch, dtype=dtype)
    torch.testing.assert_close(
        torch.autograd.grad(rows, x, upstream)[0], torch.autograd.grad(wanted, x, upstream)[0], rtol=1e-5, atol=1e-6
    )


def test_flips_are_those_of_the_other_ops() -> None:
    indices = torch.randint(0, 6, (10, 3), dtype=torch.int32)
    indices[4, 1] = -1
    x = torch.rand(21, 6, requires_grad=True)
    mask = flip_mask(flips(5), 10, 3, 21)
    plain = gather(x, 3, Wiring(indices, 6))
    rows = gather(x, 3, Wiring(indices, 6), flips(5))
    wanted = torch.where(mask, 1 - plain, plain)
    wanted[4, 1] = 0
    torch.testing.assert_close(rows, wanted)
    upstream = torch.randn(10, 3, 21)
    # noise, not a transform: the gradient keeps its sign
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (rows, plain)))


def test_without_a_wiring_inputs_are_routed_already() -> None:
    x = torch.rand(5, 12)
    assert torch.equal(gather(x, 3), x.t().reshape(4, 3, 5))
    assert torch.equal(gather(x > 0.5, 3), (x > 0.5).float().t().reshape(4, 3, 5))
    flipped = torch.where(flip_mask(flips(), 4, 3, 5), 1 - gather(x, 3), gather(x, 3))
    torch.testing.assert_close(gather(x, 3, None, flips()), flipped)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="must have 12 inputs"):
        gather(torch.rand(5, 13), 3)
    with pytest.raises(ValueError, match=r"wiring: must have shape \(4, 2\)"):
        gather(torch.rand(5, 6), 2, Wiring(torch.zeros(4, 3, dtype=torch.int32), 6))
