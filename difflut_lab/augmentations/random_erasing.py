"""Images of which a rectangle is erased."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from difflut_lab.augmentations.base import Augmentation, check_images
from difflut_lab.augmentations.rectangles import inside
from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_augmentation
from difflut_lab.schema import Fraction, Probability


@register_augmentation("random_erasing")
class RandomErasing(Augmentation):
    """With a probability, a rectangle of an image is overwritten (Zhong et al., arXiv 1708.04896).

    Its area is uniform between two shares of the image's, the logarithm of its height over its width is uniform, and
    its place is anywhere in the image, whose sides cut it where it is longer.

    Parameters
    ----------
    input_shape : sequence of int
        Shape of a sample, ``(C, H, W)``.
    probability : float
        Of an image losing a rectangle.
    min_area, max_area : float
        Shares of the image's area.
    min_aspect : float
        Height over width is from it to its inverse.
    fill : str
        ``noise``: each pixel becomes one of the batch's, drawn at random; ``mean``: the batch's mean per channel.

    Raises
    ------
    ConfigError
        If the samples are no images, or the areas are the wrong way round.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        probability: Probability = 0.5,
        min_area: Fraction = 0.02,
        max_area: Fraction = 0.4,
        min_aspect: Annotated[float, Field(gt=0, le=1)] = 0.3,
        fill: Literal["noise", "mean"] = "noise",
    ) -> None:
        check_images("random_erasing", input_shape)
        if max_area < min_area:
            raise ConfigError(f"max_area={max_area}: must be at least min_area={min_area}.")
        self.probability = probability
        self.min_area = min_area
        self.max_area = max_area
        self.min_aspect = min_aspect
        self.fill = fill

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        size = torch.tensor(x.shape[2:])
        chosen, area, aspect = torch.rand(3, len(x), generator=generator)
        area = (self.min_area + (self.max_area - self.min_area) * area) * size.prod()
        # from min_aspect to its inverse
        aspect = torch.exp((1 - 2 * aspect) * math.log(self.min_aspect))
        lengths = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).round().long()
        lengths = torch.minimum(lengths.clamp(min=1), size)
        start = (torch.rand(len(x), 2, generator=generator) * (size - lengths + 1)).long()
        lengths[chosen >= self.probability] = 0
        erased = inside(start, lengths, x.shape[2:]).to(x.device)
        if self.fill == "mean":
            mean = x.to(torch.float32).mean(dim=(0, 2, 3), keepdim=True)
            return torch.where(erased, (mean if x.is_floating_point() else mean.round()).to(x.dtype), x), y
        images, _, rows, columns = erased.nonzero(as_tuple=True)
        draws = [torch.randint(x.shape[dim], (len(rows),), generator=generator).to(x.device) for dim in (0, 2, 3)]
        changed = x.clone()
        # indices around a slice: the channels come last
        changed[images, :, rows, columns] = x[draws[0], :, draws[1], draws[2]]
        return changed, y
