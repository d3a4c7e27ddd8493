"""Samples that are mixed: what becomes of values, pixels and labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from difflut_lab.augmentations import CutMix, Mixup
from difflut_lab.augmentations.mixing import draw_shares
from difflut_lab.models.base import Model
from difflut_lab.seeding import generator
from difflut_lab.training.network import Network

BATCH, CLASSES, SHAPE = 200, 5, (3, 6, 8)


def batch(*, floats: bool = False) -> tuple[Tensor, Tensor]:
    """Images of one value each, the class, so that what a mixed image is made of can be read off it."""
    y = torch.arange(BATCH) % CLASSES
    x = y.view(-1, 1, 1, 1).expand(-1, *SHAPE).to(torch.uint8)
    return (x.float() if floats else x), y


@pytest.mark.parametrize("floats", [False, True])
def test_mixup_mixes_samples_and_labels_in_the_same_shares(floats: bool) -> None:
    x, y = batch(floats=floats)
    mixed, labels = Mixup(num_classes=CLASSES, alpha=1.0)(x, y, generator(0))
    assert mixed.dtype == torch.float32 and mixed.shape == x.shape
    assert labels.dtype == torch.float32 and labels.shape == (BATCH, CLASSES)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(BATCH))
    values = (labels * torch.arange(CLASSES)).sum(dim=1)
    torch.testing.assert_close(mixed, values.view(-1, 1, 1, 1).expand_as(mixed))
    # each sample has shares of its own, and they lie between integers
    assert len(labels.amax(dim=1).unique()) > BATCH / 2


def test_cutmix_labels_are_shares_of_pixels_and_images_keep_their_type() -> None:
    x, y = batch()
    mixed, labels = CutMix(input_shape=SHAPE, num_classes=CLASSES)(x, y, generator(0))
    assert mixed.dtype == torch.uint8
    shares = functional.one_hot(mixed[:, 0].long(), CLASSES).flatten(1, 2).float().mean(dim=1)
    torch.testing.assert_close(labels, shares)
    assert ((labels > 0).sum(dim=1) <= 2).all()
    assert (labels.amax(dim=1) < 1).float().mean() > 0.5


def test_cutmix_pastes_rectangles() -> None:
    x = torch.arange(2 * 3 * 6 * 8).view(2, *SHAPE)
    for seed in range(20):
        mixed, _ = CutMix(input_shape=SHAPE, num_classes=2)(x, torch.tensor([0, 1]), generator(seed))
        pasted = (mixed != x)[:, 0]
        for image, own, result in zip(pasted, x, mixed, strict=True):
            rows, columns = image.any(dim=1), image.any(dim=0)
            assert torch.equal(image, rows[:, None] & columns[None, :])
            assert all(flags.int().diff().abs().sum() <= 2 for flags in (rows, columns))
            other = x[1] if own is x[0] or torch.equal(own, x[0]) else x[0]
            assert torch.equal(result, torch.where(image, other, own))


@pytest.mark.parametrize("build", [Mixup, CutMix])
def test_mixing_mixed_samples_keeps_labels_true_to_them(build: type) -> None:
    x, y = batch()
    options = {"input_shape": SHAPE} if build is CutMix else {}
    mixed, labels = Mixup(num_classes=CLASSES)(x, y, generator(0))
    again, mixed_labels = build(num_classes=CLASSES, **options)(mixed, labels, generator(1))
    expected = (mixed_labels * torch.arange(CLASSES)).sum(dim=1)
    torch.testing.assert_close(again.mean(dim=(1, 2, 3)), expected)


def test_a_probability_of_zero_mixes_nothing_and_gives_shares_all_the_same() -> None:
    x, y = batch()
    for augmentation in (
        Mixup(num_classes=CLASSES, probability=0.0),
        CutMix(input_shape=SHAPE, num_classes=CLASSES, probability=0.0),
    ):
        mixed, labels = augmentation(x, y, generator(0))
        assert torch.equal(mixed, x.to(mixed.dtype))
        assert torch.equal(labels, functional.one_hot(y, CLASSES).float())


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 5.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    shares = draw_shares(alpha, 1.0, 20_000, generator(0)).double()
    assert (shares >= 0).all() and (shares <= 1).all()
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


class Flat(Model):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_mixed_bytes_are_normalised_like_bytes() -> None:
    x = torch.randint(0, 256, (50, *SHAPE)).to(torch.uint8)
    network = Network(Flat(), [100.0, 120.0, 90.0], [50.0, 60.0, 70.0], ["a", "b"])
    unmixed, _ = Mixup(num_classes=2, probability=0.0)(x, torch.zeros(50, dtype=torch.int64), generator(0))
    assert torch.equal(network(unmixed), network(x))
