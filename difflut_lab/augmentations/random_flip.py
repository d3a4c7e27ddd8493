"""Images mirrored at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from difflut_lab.augmentations.base import Augmentation, check_images
from difflut_lab.registry import register_augmentation
from difflut_lab.schema import Probability


@register_augmentation("random_flip")
class RandomFlip(Augmentation):
    """Each image is mirrored, left to right, with a probability.

    Parameters
    ----------
    input_shape : sequence of int
        Shape of a sample, ``(C, H, W)``.
    probability : float
        Of being mirrored.

    Raises
    ------
    ConfigError
        If the samples are no images.
    """

    def __init__(self, *, input_shape: Sequence[int], probability: Probability = 0.5) -> None:
        check_images("random_flip", input_shape)
        self.probability = probability

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        mirrored = (torch.rand(len(x), generator=generator) < self.probability).to(x.device)
        return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x), y
