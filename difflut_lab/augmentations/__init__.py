"""Augmentations: changes of training samples, drawn anew for every batch."""

from difflut_lab.augmentations.base import Augmentation
from difflut_lab.augmentations.cutmix import CutMix
from difflut_lab.augmentations.mixup import Mixup
from difflut_lab.augmentations.rand_augment import RandAugment
from difflut_lab.augmentations.random_crop import RandomCrop
from difflut_lab.augmentations.random_erasing import RandomErasing
from difflut_lab.augmentations.random_flip import RandomFlip

__all__ = ["Augmentation", "CutMix", "Mixup", "RandAugment", "RandomCrop", "RandomErasing", "RandomFlip"]
