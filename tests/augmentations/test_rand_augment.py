"""RandAugment: each operation beside torchvision's, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from difflut_lab.augmentations import RandAugment, operations
from difflut_lab.augmentations.operations import OPERATIONS
from difflut_lab.errors import ConfigError
from difflut_lab.seeding import generator

SHAPE = (3, 18, 24)
LINEAR = InterpolationMode.BILINEAR


def images(channels: int = 3, batch: int = 6) -> Tensor:
    """Smooth images, each in a range of its own, so that interpolation and histograms have something to do."""
    draws = generator(0)
    coarse = torch.rand(batch, channels, 4, 5, generator=draws) * 255
    smooth = torch.nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear")
    low = torch.arange(batch).view(-1, 1, 1, 1) * 10.0
    return (low + smooth * (200 - low) / 255).round()


# the reference and the largest difference: torchvision rounds to bytes
COLOURS: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "identity": (lambda x, s: x, 0),
    "brightness": (lambda x, s: functional.adjust_brightness(x, 1 + 0.9 * s), 1),
    "color": (lambda x, s: functional.adjust_saturation(x, 1 + 0.9 * s), 2),
    "contrast": (lambda x, s: functional.adjust_contrast(x, 1 + 0.9 * s), 2),
    "sharpness": (lambda x, s: functional.adjust_sharpness(x, 1 + 0.9 * s), 2),
    "posterize": (lambda x, s: functional.posterize(x, 8 - round(4 * abs(s))), 0),
    "solarize": (lambda x, s: functional.solarize(x, 255 * (1 - abs(s))), 0),
    "autocontrast": (lambda x, s: functional.autocontrast(x), 1.001),
    "equalize": (lambda x, s: functional.equalize(x), 0),
}
MOVES: dict[str, Callable[[float], dict[str, object]]] = {
    "rotate": lambda s: {"angle": -30 * s},
    "shear_x": lambda s: {"shear": [torch.rad2deg(torch.atan(torch.tensor(0.3 * s))).item(), 0.0]},
    "shear_y": lambda s: {"shear": [0.0, torch.rad2deg(torch.atan(torch.tensor(0.3 * s))).item()]},
    "translate_x": lambda s: {"translate": [-150 / 331 * 24 * s, 0.0]},
    "translate_y": lambda s: {"translate": [0.0, -150 / 331 * 18 * s]},
}
STILL = {"angle": 0.0, "translate": [0.0, 0.0], "scale": 1.0, "shear": [0.0, 0.0]}


def test_all_operations_are_compared() -> None:
    assert {operation.__name__ for operation in OPERATIONS} == {*COLOURS, *MOVES}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_those_of_torchvision(name: str, channels: int) -> None:
    x = images(channels)
    for strength in (-1.0, -0.3, 0.0, 0.3, 1.0):
        found = getattr(operations, name)(x, torch.full((len(x),), strength))
        reference, tolerance = COLOURS[name]
        expected = reference(x.to(torch.uint8), strength).float()
        assert (found - expected).abs().max() <= tolerance, strength
        assert found.min() >= 0 and found.max() <= 255


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_those_of_torchvision(name: str) -> None:
    x = images()
    for strength in (-1.0, 0.3, 1.0):
        found = getattr(operations, name)(x, torch.full((len(x),), strength))
        expected = functional.affine(x, interpolation=LINEAR, **(STILL | MOVES[name](strength)))
        assert (found - expected).abs().max() < 0.5, strength


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_each_image_has_its_own_strength(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, strengths = images(), torch.tensor([-1.0, -0.5, -0.1, 0.1, 0.5, 1.0])
    kept = x.clone()
    together = operation(x, strengths)
    alone = [operation(image[None], strength[None]) for image, strength in zip(x, strengths, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert torch.equal(x, kept), "inputs are left alone"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_even_and_tiny_images_pass(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    for x in (torch.full((2, 3, 5, 5), 7.0), torch.zeros(2, 1, 1, 2)):
        assert torch.isfinite(operation(x, torch.tensor([-1.0, 1.0]))).all()


def test_images_are_changed_by_different_operations() -> None:
    x = images(batch=1).expand(300, -1, -1, -1).to(torch.uint8)
    changed, _ = RandAugment(input_shape=SHAPE, num_ops=1)(x, torch.arange(300), generator(0))
    # 14 operations, of which 9 have two directions and 2 with an effect have one; the identity keeps its images
    kinds = {image.numpy().tobytes() for image in changed}
    assert 18 <= len(kinds) <= 2 * len(OPERATIONS)
    assert 5 <= int((changed == x).flatten(1).all(dim=1).sum()) <= 70


def test_more_operations_and_a_larger_magnitude_change_more() -> None:
    x = images(batch=1).expand(300, -1, -1, -1)
    differences = []
    for num_ops, magnitude in ((1, 3.0), (1, 20.0), (3, 20.0)):
        augmentation = RandAugment(input_shape=SHAPE, num_ops=num_ops, magnitude=magnitude)
        changed, _ = augmentation(x, torch.arange(300), generator(0))
        differences.append(float((changed - x).abs().mean()))
    assert differences[0] < differences[1] < differences[2]


def test_floats_are_changed_as_bytes_are() -> None:
    x = images()
    labels = torch.arange(len(x))
    as_bytes, _ = RandAugment(input_shape=SHAPE)(x.to(torch.uint8), labels, generator(0))
    as_floats, _ = RandAugment(input_shape=SHAPE, max_value=1.0)(x / 255, labels, generator(0))
    assert as_bytes.dtype == torch.uint8 and as_floats.dtype == torch.float32
    assert (as_floats * 255 - as_bytes.float()).abs().max() < 0.51


def test_no_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="rand_augment: needs images"):
        RandAugment(input_shape=(64,))
