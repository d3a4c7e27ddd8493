"""Images shifted at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional

from difflut_lab.augmentations.base import Augmentation, check_images
from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_augmentation
from difflut_lab.schema import PositiveInt


@register_augmentation("random_crop")
class RandomCrop(Augmentation):
    """Each image is padded on all sides and cropped to its size at a random place.

    All (2 padding + 1)^2 places are as likely as each other.

    Parameters
    ----------
    input_shape : sequence of int
        Shape of a sample, ``(C, H, W)``.
    padding : int
        Pixels put on every side, 0: the largest shift.

    Raises
    ------
    ConfigError
        If the samples are no images, or not larger than the padding.
    """

    def __init__(self, *, input_shape: Sequence[int], padding: PositiveInt = 4) -> None:
        check_images("random_crop", input_shape)
        if padding >= min(input_shape[1:]):
            raise ConfigError(f"padding={padding}: must be less than the images' size, {tuple(input_shape[1:])}.")
        self.padding = padding

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        batch, _, height, width = x.shape
        padded = functional.pad(x, (self.padding,) * 4)
        top, left = torch.randint(2 * self.padding + 1, (2, batch, 1), generator=generator).to(x.device)
        rows = top + torch.arange(height, device=x.device)
        columns = left + torch.arange(width, device=x.device)
        sample = torch.arange(batch, device=x.device).view(-1, 1, 1)
        # indices around a slice: the channels come last
        cropped = padded[sample, :, rows.unsqueeze(2), columns.unsqueeze(1)]
        return cropped.permute(0, 3, 1, 2), y
