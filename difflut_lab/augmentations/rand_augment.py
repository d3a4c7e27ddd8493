"""Images changed by operations that are drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from difflut_lab.augmentations.base import Augmentation, check_images
from difflut_lab.augmentations.operations import OPERATIONS, WHITE
from difflut_lab.registry import register_augmentation
from difflut_lab.schema import PositiveFloat, PositiveInt

MAX_MAGNITUDE = 30


@register_augmentation("rand_augment")
class RandAugment(Augmentation):
    """Each image passes some operations of 14, drawn with replacement, all equally strong (arXiv 1909.13719).

    Identity, rotation, shears and shifts in both directions, brightness, colour, contrast, sharpness, fewer bits,
    inversion of bright values, stretched contrast, equalised histogram. Those that have two directions take either.
    Pixels from beyond the image are 0.

    Parameters
    ----------
    input_shape : sequence of int
        Shape of a sample, ``(C, H, W)``.
    num_ops : int
        Operations per image, one after the other.
    magnitude : float
        How strong they are, from 0 to 30: at 30 a rotation is by 30 degrees.
    max_value : float
        The largest value that a pixel may have; the smallest is 0.

    Raises
    ------
    ConfigError
        If the samples are no images.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_ops: PositiveInt = 2,
        magnitude: Annotated[float, Field(ge=0, le=MAX_MAGNITUDE)] = 9.0,
        max_value: PositiveFloat = 255.0,
    ) -> None:
        check_images("rand_augment", input_shape)
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.max_value = max_value

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        images = x.to(torch.float32) * (WHITE / self.max_value)
        shape = (self.num_ops, len(x))
        drawn = torch.randint(len(OPERATIONS), shape, generator=generator)
        signs = torch.randint(2, shape, generator=generator) * 2 - 1
        strengths = signs * (self.magnitude / MAX_MAGNITUDE)
        for choice, strength in zip(drawn, strengths, strict=True):
            # an operation takes all of its images at once
            for index, operation in enumerate(OPERATIONS):
                (those,) = (choice == index).nonzero(as_tuple=True)
                if len(those):
                    where = those.to(x.device)
                    images[where] = operation(images[where], strength[those].to(x.device))
        images = images * (self.max_value / WHITE)
        return (images if x.is_floating_point() else images.round()).to(x.dtype), y
