"""Augmentations: changes of training samples, drawn anew for every batch."""

from difflut_lab.augmentations.base import Augmentation
from difflut_lab.augmentations.random_crop import RandomCrop
from difflut_lab.augmentations.random_flip import RandomFlip

__all__ = ["Augmentation", "RandomCrop", "RandomFlip"]
