"""What a data set is, and the one way in which all of them are split.

Shape letters: S samples, C channels, H height, W width, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from difflut_lab.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Samples and their labels."""

    x: Tensor
    # (S, *input_shape), in the type it is stored in: uint8 images (S, C, H, W), float32 tables (S, F)

    y: Tensor
    # (S,) int64 class indices

    def __post_init__(self) -> None:
        if self.y.dtype != torch.int64 or self.y.ndim != 1 or len(self.x) != len(self.y):
            raise DataError(
                f"A split needs one int64 label per sample: it has x of shape {tuple(self.x.shape)} and y of shape "
                f"{tuple(self.y.shape)}, {self.y.dtype}."
            )

    def __len__(self) -> int:
        return len(self.y)

    def select(self, indices: Tensor) -> Split:
        """The samples at the given indices (int64, one dimension), copied."""
        return Split(x=self.x[indices], y=self.y[indices])


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """A classification data set. A network is fed ``(x - mean) / std`` as float32."""

    name: str
    # the registered name

    train: Split
    # what the encoder and the network are fitted on

    val: Split
    # held out of the training part: picks the best epoch

    test: Split
    # looked at once, at the end

    input_shape: tuple[int, ...]
    # the shape of one sample: (C, H, W) or (F,)

    class_names: list[str]
    # one per class; label k is class_names[k]

    mean: list[float]
    # subtracted from x; one value, or one per channel or feature (dimension 1 of x)

    std: list[float]
    # what x is then divided by; one value, or one per channel or feature

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            where = f"Data set '{self.name}', {part}"
            if len(split) == 0:
                raise DataError(f"{where}: is empty.")
            if tuple(split.x.shape[1:]) != tuple(self.input_shape):
                raise DataError(f"{where}: samples of shape {tuple(split.x.shape[1:])}, not {self.input_shape}.")
            lowest, highest = int(split.y.min()), int(split.y.max())
            if lowest < 0 or highest >= len(self.class_names):
                raise DataError(f"{where}: labels {lowest} to {highest}, but {len(self.class_names)} classes.")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.input_shape[0]):
                raise DataError(
                    f"Data set '{self.name}': {key} has {len(values)} values, must have 1 or {self.input_shape[0]}."
                )


class DataSource(Protocol):
    """What is registered as a data set: options in the constructor, the work in ``load``."""

    def load(self) -> DataSet:
        """Read and split the data."""
        ...


def stratified_indices(y: Tensor, fraction: float, seed: int, *, key: str) -> tuple[Tensor, Tensor]:
    """Draw a stratified part of the samples.

    The draw depends on its arguments alone and leaves the global random states as they are.

    Parameters
    ----------
    y : Tensor
        (S,) int64 labels.
    fraction : float
        The part to hold out, between 0 and 1; rounded up to whole samples.
    seed : int
        Same seed, same draw.
    key : str
        The configuration key of ``fraction``, for messages.

    Returns
    -------
    kept, held : Tensor
        int64 indices, ascending, disjoint, together all of ``range(S)``.

    Raises
    ------
    DataError
        If a class has too few samples, or a part would have fewer samples than there are classes.
    """
    from sklearn.model_selection import train_test_split  # scikit-learn takes a second to import

    if not 0 < fraction < 1:
        raise DataError(f"{key}={fraction}: must be greater than 0 and less than 1.")
    classes, counts = torch.unique(y, return_counts=True)
    rarest = int(counts.argmin())
    if counts[rarest] < 2:
        raise DataError(
            f"{key}={fraction}: class {int(classes[rarest])} has 1 sample to split, a stratified split needs at "
            "least 2 of each class; add samples of it or leave the class out."
        )
    num_held = math.ceil(fraction * len(y))
    if min(num_held, len(y) - num_held) < len(classes):
        raise DataError(
            f"{key}={fraction}: would hold out {num_held} of {len(y)} samples and keep {len(y) - num_held}; each part "
            f"needs at least {len(classes)}, one per class."
        )
    kept, held = train_test_split(
        torch.arange(len(y)).numpy(), test_size=num_held, random_state=seed, stratify=y.numpy()
    )
    kept, held = torch.from_numpy(kept).sort().values, torch.from_numpy(held).sort().values
    lost = set(classes.tolist()) - set(y[kept].tolist())
    if lost:
        raise DataError(
            f"{key}={fraction}: leaves no sample of class {min(lost)} to train on; lower it or add samples of it."
        )
    return kept, held


def stratified_split(split: Split, fraction: float, seed: int, *, key: str) -> tuple[Split, Split]:
    """Divide a split in two, ``(kept, held)``; see `stratified_indices` for the parameters and errors."""
    kept, held = stratified_indices(split.y, fraction, seed, key=key)
    return split.select(kept), split.select(held)


def one_line(error: Exception) -> str:
    """An error's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
