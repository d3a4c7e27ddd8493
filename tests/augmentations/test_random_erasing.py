"""Rectangles that are erased."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflut_lab.augmentations import RandomErasing
from difflut_lab.errors import ConfigError
from difflut_lab.seeding import generator

SHAPE = (3, 20, 30)


def erased(images: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Changed images, and which pixels changed."""
    changed, labels = RandomErasing(input_shape=SHAPE, **options)(images, torch.arange(len(images)), generator(0))  # type: ignore[arg-type]  # options of several types
    assert torch.equal(labels, torch.arange(len(images)))
    assert changed.dtype == images.dtype
    return changed, (changed != images).any(dim=1)


def test_what_is_erased_is_a_rectangle_of_the_area_and_shape_that_was_asked_for() -> None:
    images = torch.zeros(600, *SHAPE)
    images[0] = 1e6
    options = {"min_area": 0.05, "max_area": 0.2, "min_aspect": 0.5, "fill": "mean"}
    _, pixels = erased(images, probability=0.5, **options)
    rows, columns = pixels.any(dim=2), pixels.any(dim=1)
    assert torch.equal(pixels, rows[:, :, None] & columns[:, None, :])
    changed = pixels.flatten(1).any(dim=1)
    assert float(changed.float().mean()) == pytest.approx(0.5, abs=0.07)
    heights, widths = rows.sum(dim=1)[changed].float(), columns.sum(dim=1)[changed].float()
    assert all((flags.int().diff(dim=1).abs().sum(dim=1) <= 2).all() for flags in (rows, columns))
    area = heights * widths / (20 * 30)
    # sides are rounded to pixels
    assert 0.035 < float(area.min()) < 0.07 and 0.17 < float(area.max()) < 0.23
    assert 0.4 < float((heights / widths).min()) < 0.65 and 1.5 < float((heights / widths).max()) < 2.5
    # all rows and columns of the image are reached
    assert rows.any(dim=0).all() and columns.any(dim=0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_what_takes_its_place(dtype: torch.dtype) -> None:
    images = (torch.rand(50, *SHAPE) * 200 + torch.tensor([0.0, 20.0, 40.0]).view(3, 1, 1)).to(dtype)
    changed, pixels = erased(images, probability=1.0, fill="mean")
    mean = images.float().mean(dim=(0, 2, 3))
    for channel in range(3):
        values = changed[:, channel][pixels].float()
        inside = values[values != images[:, channel][pixels].float()]
        assert (inside - mean[channel]).abs().max() < (0.51 if dtype == torch.uint8 else 1e-3)
    changed, pixels = erased(images, probability=1.0, fill="noise")
    own = {tuple(pixel) for pixel in images.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    noise = changed.permute(0, 2, 3, 1)[pixels].tolist()
    assert len(noise) > 1000 and all(tuple(pixel) in own for pixel in noise)


def test_a_large_rectangle_is_cut_by_the_image() -> None:
    images = torch.rand(200, *SHAPE)
    _, pixels = erased(images, probability=1.0, min_area=0.9, max_area=0.95, min_aspect=0.1)
    assert pixels.flatten(1).any(dim=1).all()


def test_areas_the_wrong_way_round_and_no_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_area=0.1: must be at least min_area=0.2"):
        RandomErasing(input_shape=SHAPE, min_area=0.2, max_area=0.1)
    with pytest.raises(ConfigError, match="random_erasing: needs images"):
        RandomErasing(input_shape=(64,))
