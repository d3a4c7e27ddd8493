"""Images with a rectangle of another image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from difflut_lab.augmentations.base import Augmentation, check_images
from difflut_lab.augmentations.mixing import draw_partners, draw_shares, mix_labels
from difflut_lab.augmentations.rectangles import inside
from difflut_lab.registry import register_augmentation
from difflut_lab.schema import Probability


@register_augmentation("cutmix")
class CutMix(Augmentation):
    """Each image gets a rectangle of another one of the batch, at the same place (Yun et al., arXiv 1905.04899).

    The rectangle has the image's proportions, a share of its area that is drawn from Beta(alpha, alpha), and its centre
    anywhere; what lies outside is cut off. Labels become how much of each class an image is, by pixels.

    Parameters
    ----------
    input_shape : sequence of int
        Shape of a sample, ``(C, H, W)``.
    num_classes : int
        Number of classes.
    alpha : float
        Small: mostly one of the two images; 1: all shares as likely; large: halves.
    probability : float
        Of an image being mixed.

    Raises
    ------
    ConfigError
        If the samples are no images.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        num_classes: int,
        alpha: Annotated[float, Field(ge=0.01)] = 1.0,
        probability: Probability = 1.0,
    ) -> None:
        check_images("cutmix", input_shape)
        self.num_classes = num_classes
        self.alpha = alpha
        self.probability = probability

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        size = torch.tensor(x.shape[2:])
        partners = draw_partners(len(x), generator, x.device)
        side = (1 - draw_shares(self.alpha, self.probability, len(x), generator)).sqrt()
        lengths = (side.unsqueeze(1) * size).round().long()
        centre = (torch.rand(len(x), 2, generator=generator) * size).long()
        cut = inside(centre - lengths // 2, lengths, x.shape[2:]).to(x.device)
        kept = 1 - cut.flatten(1).to(torch.float32).mean(dim=1)
        return torch.where(cut, x[partners], x), mix_labels(y, partners, kept, self.num_classes)
