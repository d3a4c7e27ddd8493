"""Any arrays in a numpy ``.npz`` file, images or tables.

Shape letters: S samples, C channels, H height, W width, F features.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from difflut_lab.data.base import DataSet, Split, one_line, stratified_split
from difflut_lab.errors import DataError
from difflut_lab.registry import register_data
from difflut_lab.schema import Fraction, Seed

log = logging.getLogger(__name__)

WITH_TEST = ("x_train", "y_train", "x_test", "y_test")
WITHOUT_TEST = ("X", "y")
DEFAULT_TEST_FRACTION = 0.2

# what numpy and zipfile raise on files that are cut short, damaged, encrypted or something else
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
)


@register_data("npz")
class Npz:
    """Arrays ``x_train, y_train, x_test, y_test``, or ``X, y``, from a file written by ``numpy.savez``.

    uint8 arrays of 3 or 4 dimensions are images, scaled by 255: (S, H, W), (S, H, W, C) with 1, 3 or 4 channels, or
    (S, C, H, W); where both fit, a square image decides, else (S, H, W, C). Every other array is taken as float32,
    its shape and values as they are; a table is (S, F). Labels are 0 to one less than the number of classes.

    Parameters
    ----------
    path : str
        The file.
    val_fraction : float
        The part of the training samples that is the validation set; stratified.
    test_fraction : float
        For ``X, y``: the part of all samples that is the test set; stratified.
    split_seed : int
        The seed of both draws, apart from the run's seed.
    """

    def __init__(
        self,
        *,
        path: str,
        val_fraction: Fraction = 0.1,
        test_fraction: Fraction = DEFAULT_TEST_FRACTION,
        split_seed: Seed = 0,
    ) -> None:
        self.path = path
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    def load(self) -> DataSet:
        """Read, check and split the data.

        Raises
        ------
        DataError
            If the file or an array of it cannot be used; says which and what to do.
        """
        arrays = self._arrays()
        if set(arrays) == set(WITH_TEST):
            if self.test_fraction != DEFAULT_TEST_FRACTION:
                raise DataError(
                    f"data.test_fraction={self.test_fraction}: {self.path} has a test set of its own (x_test, y_test); "
                    "leave data.test_fraction out."
                )
            self._check_alike(arrays["x_train"], arrays["x_test"])
            training = self._split(arrays, "x_train", "y_train")
            classes = self._classes("y_train", training.y)
            test = self._split(arrays, "x_test", "y_test")
            unknown = [label for label in test.y.unique().tolist() if label >= classes]
            if unknown:
                raise self._error(
                    f"y_test holds labels that y_train does not ({_some(unknown)}); remove those samples or add "
                    "training samples of those classes"
                )
        else:
            samples = self._split(arrays, "X", "y")
            classes = self._classes("y", samples.y)
            training, test = stratified_split(
                samples, self.test_fraction, self.split_seed, key=f"data.path={self.path}: data.test_fraction"
            )
        train, val = stratified_split(
            training, self.val_fraction, self.split_seed, key=f"data.path={self.path}: data.val_fraction"
        )
        is_image = training.x.dtype == torch.uint8
        return DataSet(
            name="npz",
            train=train,
            val=val,
            test=test,
            input_shape=tuple(training.x.shape[1:]),
            class_names=[str(label) for label in range(classes)],
            mean=[0.0],
            std=[255.0 if is_image else 1.0],
        )

    def _error(self, problem: str) -> DataError:
        return DataError(f"data.path={self.path}: {problem}.")

    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays of one of the two forms, by name."""
        path = Path(self.path).expanduser()
        if not path.exists():
            where = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise self._error(f"there is no such file{where}; set data.path to an .npz file")
        try:
            # never unpickles: a data file must not be able to run code
            file = np.load(path, allow_pickle=False)
        except UNREADABLE as error:
            raise self._error(f"is not an .npz file ({one_line(error)}); write one with numpy.savez") from None
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise self._error(
                f"is not an .npz file but a single array; write one with numpy.savez({', '.join(WITHOUT_TEST)})"
            )
        with file:
            there = list(file.files)
            wanted = next((form for form in (WITH_TEST, WITHOUT_TEST) if set(form) <= set(there)), None)
            if wanted is None:
                nearest = next((form for form in (WITH_TEST, WITHOUT_TEST) if set(form) & set(there)), ())
                missing = [name for name in nearest if name not in there]
                raise self._error(
                    (f"{', '.join(missing)} missing; " if missing else "")
                    + f"it holds {', '.join(there) or 'no arrays'}, needed are {', '.join(WITH_TEST)}, or "
                    + f"{', '.join(WITHOUT_TEST)}"
                )
            unused = [name for name in there if name not in wanted]
            if unused:
                log.info("data.path=%s: arrays not used: %s", self.path, ", ".join(unused))
            return {name: self._array(file, name) for name in wanted}

    def _array(self, file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
        try:
            array = file[name]
        except UNREADABLE as error:
            raise self._error(f"{name} cannot be read ({one_line(error)}); save it again, as numbers") from None
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            kind = array.dtype if isinstance(array, np.ndarray) else "not an array"
            raise self._error(f"{name} must hold numbers, it is {kind}; save it as integers or floats")
        return array

    def _check_alike(self, train: np.ndarray, test: np.ndarray) -> None:
        if train.shape[1:] != test.shape[1:]:
            raise self._error(
                f"x_train has samples of shape {train.shape[1:]} and x_test of shape {test.shape[1:]}; they must be "
                "the same"
            )
        if _is_image(train) != _is_image(test):
            raise self._error(
                f"x_train is {train.dtype} and x_test {test.dtype}; only uint8 images are scaled by 255, "
                "save both alike"
            )

    def _split(self, arrays: dict[str, np.ndarray], x: str, y: str) -> Split:
        samples, labels = arrays[x], arrays[y]
        if samples.ndim < 2:
            raise self._error(f"{x} has shape {samples.shape}; it must be (samples, features) or images")
        if samples.size == 0 or labels.size == 0:
            empty, shape = (x, samples.shape) if samples.size == 0 else (y, labels.shape)
            raise self._error(f"{empty} is empty, shape {shape}; there must be at least one sample and one feature")
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1:
            raise self._error(f"{y} has shape {labels.shape}; it must be ({len(samples)},), one class index per sample")
        if len(samples) != len(labels):
            raise self._error(f"{x} has {len(samples)} samples and {y} {len(labels)} labels; they must be as many")
        return Split(x=self._samples(x, samples), y=self._labels(y, labels))

    def _samples(self, name: str, array: np.ndarray) -> Tensor:
        """Images as uint8 (S, C, H, W), everything else as float32."""
        if _is_image(array):
            images = torch.from_numpy(array)
            if images.ndim == 3:
                return images.unsqueeze(1)
            return images.permute(0, 3, 1, 2).contiguous() if _channels_last(array.shape) else images
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported as such
            numbers = np.ascontiguousarray(array, dtype=np.float32)
        self._check_finite(name, numbers)
        return torch.from_numpy(numbers)

    def _labels(self, name: str, array: np.ndarray) -> Tensor:
        if array.dtype.kind == "f":
            self._check_finite(name, array)
            broken = array[array != np.floor(array)]
            if broken.size:
                raise self._error(
                    f"{name} holds {broken.size} labels that are not whole numbers (such as {broken[0]}); labels must "
                    "be class indices 0, 1, 2, ..."
                )
        if array.min() < 0:
            raise self._error(
                f"{name} holds {int((array < 0).sum())} negative labels (such as {array.min()}); labels must be class "
                "indices 0, 1, 2, ..."
            )
        # beyond int64 a label would wrap around
        if int(array.max()) >= 2**31:
            raise self._error(
                f"{name} holds labels out of range (such as {array.max()}); labels must be class indices 0, 1, 2, ..."
            )
        return torch.from_numpy(array.astype(np.int64))

    def _classes(self, name: str, labels: Tensor) -> int:
        """The number of classes; every one of 0, 1, ... must have a sample."""
        distinct = labels.unique().tolist()
        if len(distinct) < 2:
            raise self._error(f"{name} holds only the label {distinct[0]}; there must be at least two classes")
        gap = next((k for k, label in enumerate(distinct) if k != label), None)
        if gap is not None:
            raise self._error(
                f"{name} holds labels out of range: {len(distinct)} classes must be labelled 0 to {len(distinct) - 1}, "
                f"but label {gap} is missing and the largest is {distinct[-1]}; renumber them"
            )
        return len(distinct)

    def _check_finite(self, name: str, array: np.ndarray) -> None:
        missing, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        if missing or infinite:
            counts = [f"{missing} NaN"] * (missing > 0) + [f"{infinite} infinite (in float32)"] * (infinite > 0)
            raise self._error(
                f"{name} holds {' and '.join(counts)} of {array.size} values; remove or replace them before saving"
            )


def _is_image(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim in (3, 4)


def _channels_last(shape: tuple[int, ...]) -> bool:
    """Whether four dimensions are (S, H, W, C) rather than (S, C, H, W)."""
    colours = (1, 3, 4)
    if shape[3] not in colours:
        return False
    channels_first_is_square = shape[1] in colours and shape[2] == shape[3] and shape[1] != shape[2]
    return not channels_first_is_square


def _some(values: list[int]) -> str:
    return ", ".join(str(value) for value in values[:5]) + (", ..." if len(values) > 5 else "")
