"""Augmentations: what they draw, that they fit, and that a training repeats them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from difflut_lab.augmentations import Augmentation, RandomCrop
from difflut_lab.data import Split
from difflut_lab.errors import ConfigError
from difflut_lab.registry import REGISTRY
from difflut_lab.seeding import generator
from difflut_lab.training.compose import build_augmentations
from difflut_lab.training.datamodule import Batches


def test_random_crop_shifts_each_image_by_itself() -> None:
    images = torch.arange(1, 1 + 2 * 5 * 6, dtype=torch.uint8).view(1, 2, 5, 6).expand(500, -1, -1, -1)
    crop = RandomCrop(input_shape=(2, 5, 6), padding=2)
    cropped, labels = crop(images, torch.arange(500), generator(0))
    assert cropped.dtype == torch.uint8 and cropped.shape == images.shape
    assert torch.equal(labels, torch.arange(500))
    padded = functional.pad(images[0], (2, 2, 2, 2))
    places = [padded[:, top : top + 5, left : left + 6] for top in range(5) for left in range(5)]
    found = torch.stack([(cropped == place).flatten(1).all(dim=1) for place in places])
    # every image is one of the 25 places, and 500 draws reach all of them
    assert torch.equal(found.sum(dim=0), torch.ones(500, dtype=torch.int64))
    assert found.any(dim=1).all()


@pytest.mark.parametrize(("shape", "padding"), [((64,), 1), ((1, 8, 8), 8)])
def test_random_crop_refuses_what_it_does_not_fit(shape: tuple[int, ...], padding: int) -> None:
    with pytest.raises(ConfigError, match="needs images|must be less than"):
        RandomCrop(input_shape=shape, padding=padding)


@pytest.mark.parametrize("name", REGISTRY.names("augmentation"))
def test_batches_are_augmented_by_seed_and_epoch(name: str) -> None:
    split = Split(x=torch.randint(0, 256, (50, 1, 8, 8)).to(torch.uint8), y=torch.arange(50))
    (augmentation,) = build_augmentations({"augmentations": {"mine": {"name": name}}}, (1, 8, 8), 50)
    kept = split.x.clone()

    def batches(epoch: int, *augmentations: Augmentation) -> list[torch.Tensor]:
        loader = Batches(split, 20, seed=3, augmentations=augmentations)
        loader.set_epoch(epoch)
        found = list(loader)
        for x, y in found:
            assert x.shape[1:] == (1, 8, 8) and x.dtype in (torch.uint8, torch.float32)
            assert y.dtype == torch.int64 or (y.shape == (len(x), 50) and y.dtype == torch.float32)
        return [x for x, _ in found]

    first, again, later, plain = (
        batches(0, augmentation),
        batches(0, augmentation),
        batches(1, augmentation),
        batches(0),
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, later, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    assert torch.equal(split.x, kept), "the data itself is left alone"
