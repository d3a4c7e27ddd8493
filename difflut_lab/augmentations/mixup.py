"""Samples mixed with others, value by value."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from difflut_lab.augmentations.base import Augmentation
from difflut_lab.augmentations.mixing import draw_partners, draw_shares, mix_labels
from difflut_lab.registry import register_augmentation
from difflut_lab.schema import Probability


@register_augmentation("mixup")
class Mixup(Augmentation):
    """Each sample becomes ``s * x + (1 - s) * partner``, its label likewise (Zhang et al., arXiv 1710.09412).

    s is drawn from Beta(alpha, alpha) for every sample, the partner is another sample of the batch. Samples of
    integers become float32 in the same range of values; labels become how much of each class a sample is.

    Parameters
    ----------
    num_classes : int
        Number of classes.
    alpha : float
        Small: mostly one of the two; 1: all shares as likely; large: halves.
    probability : float
        Of a sample being mixed.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        alpha: Annotated[float, Field(ge=0.01)] = 0.2,
        probability: Probability = 1.0,
    ) -> None:
        self.num_classes = num_classes
        self.alpha = alpha
        self.probability = probability

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        partners = draw_partners(len(x), generator, x.device)
        shares = draw_shares(self.alpha, self.probability, len(x), generator).to(x.device)
        values = x if x.is_floating_point() else x.to(torch.float32)
        mixed = torch.lerp(values[partners], values, shares.to(values.dtype).view(-1, *[1] * (x.dim() - 1)))
        return mixed, mix_labels(y, partners, shares, self.num_classes)
