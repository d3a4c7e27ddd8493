"""scikit-learn's handwritten digits: small, and there without a download."""

from __future__ import annotations

import numpy as np
import torch

from difflut_lab.data.base import DataSet, Split, stratified_split
from difflut_lab.registry import register_data
from difflut_lab.schema import Fraction, Seed


@register_data("digits")
class Digits:
    """1,797 images of 8 x 8 pixels in 17 grey levels, 10 classes (UCI Optical Recognition of Handwritten Digits).

    Parameters
    ----------
    test_fraction : float
        The part of all samples that is the test set; stratified.
    val_fraction : float
        The part of the rest that is the validation set; stratified.
    split_seed : int
        The seed of both draws, apart from the run's seed.
    """

    def __init__(self, *, test_fraction: Fraction = 0.2, val_fraction: Fraction = 0.1, split_seed: Seed = 0) -> None:
        self.test_fraction = test_fraction
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def load(self) -> DataSet:
        """Read and split the data; images are (S, 1, 8, 8) uint8, 0 to 16."""
        from sklearn.datasets import load_digits  # scikit-learn takes a second to import

        digits = load_digits()
        samples = Split(
            x=torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1),
            y=torch.from_numpy(digits.target.astype(np.int64)),
        )
        rest, test = stratified_split(samples, self.test_fraction, self.split_seed, key="data.test_fraction")
        train, val = stratified_split(rest, self.val_fraction, self.split_seed, key="data.val_fraction")
        return DataSet(
            name="digits",
            train=train,
            val=val,
            test=test,
            input_shape=(1, 8, 8),
            class_names=[str(digit) for digit in range(10)],
            mean=[0.0],
            std=[16.0],
        )
