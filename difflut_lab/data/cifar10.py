"""CIFAR-10, from torchvision's files or one npz."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch

from difflut_lab.data.base import DataSet, Split, one_line, stratified_split
from difflut_lab.data.npz import UNREADABLE
from difflut_lab.data.vision import socket_timeout
from difflut_lab.errors import DataError
from difflut_lab.registry import register_data
from difflut_lab.schema import Fraction, Seed

log = logging.getLogger(__name__)

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SIDE = 32
FOLDER = "cifar-10-batches-py"  # where torchvision keeps it


@register_data("cifar10")
class Cifar10:
    """CIFAR-10: 50,000 training and 10,000 test images of 10 classes, 3 x 32 x 32 (Krizhevsky 2009).

    Read from ``root/cifar10/*.npz`` where there is one, else through torchvision from ``root/cifar-10-batches-py``,
    which is downloaded if it is not there. The npz holds ``x_train (50000, 32, 32, 3)`` uint8, ``y_train``, ``x_test``
    and ``y_test``; or packed, ``strips`` and ``sizes``: lossless WebP images one after the other and their lengths in
    bytes, each a column of images, training before test, and ``y_train``; test labels are then 0 to 9 in turn, or
    ``y_test``.

    Parameters
    ----------
    root : str
        The folder of data sets.
    val_fraction : float
        The part of the training samples that is the validation set; stratified.
    split_seed : int
        The seed of that draw, apart from the run's seed.
    """

    def __init__(self, *, root: str = "data", val_fraction: Fraction = 0.1, split_seed: Seed = 0) -> None:
        self.root = root
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def load(self) -> DataSet:
        """Read and split the data, downloading it first where it is missing; images are (S, 3, 32, 32) uint8.

        Raises
        ------
        DataError
            If the data is missing and cannot be downloaded, or cannot be read.
        """
        folder = Path(self.root).expanduser()
        files = sorted(folder.glob("cifar10/*.npz"))
        x_train, y_train, x_test, y_test = self._from_npz(files[0]) if files else self._from_torchvision(folder)
        training, test = _split(x_train, y_train), _split(x_test, y_test)
        train, val = stratified_split(training, self.val_fraction, self.split_seed, key="data.val_fraction")
        # in float64, a channel at a time: the whole in one go would be 2.4 GB
        channels = [train.x[:, channel].to(torch.float64) for channel in range(train.x.shape[1])]
        return DataSet(
            name="cifar10",
            train=train,
            val=val,
            test=test,
            input_shape=tuple(train.x.shape[1:]),
            class_names=CLASSES,
            mean=[float(values.mean()) for values in channels],
            std=[float(values.std()) for values in channels],
        )

    def _from_npz(self, path: Path) -> list[np.ndarray]:
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            if "strips" in arrays:
                arrays |= _unpacked(arrays)
            found = [arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")]
        except (*UNREADABLE, KeyError) as error:
            raise DataError(
                f"data.root={self.root}: {path.name} cannot be read as CIFAR-10 ({one_line(error)}); it must hold "
                "x_train, y_train, x_test and y_test."
            ) from None
        for x, y in (found[:2], found[2:]):
            if x.shape != (len(y), SIDE, SIDE, 3) or x.dtype != np.uint8 or len(y) == 0 or y.max() >= len(CLASSES):
                raise DataError(
                    f"data.root={self.root}: {path.name} holds images of shape {x.shape}, {x.dtype}, for {len(y)} "
                    f"labels; must be ({len(y)}, {SIDE}, {SIDE}, 3), uint8, with labels 0 to {len(CLASSES) - 1}."
                )
        return found

    def _from_torchvision(self, folder: Path) -> list[Any]:
        from torchvision.datasets import CIFAR10  # takes two seconds to import

        if not (folder / FOLDER).is_dir():
            self._download(CIFAR10, folder)
        try:
            train, test = CIFAR10(str(folder), train=True), CIFAR10(str(folder), train=False)
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            raise DataError(
                f"data.root={self.root}: {FOLDER} cannot be read ({one_line(error)}); delete it to have it downloaded "
                "anew."
            ) from None
        return [train.data, train.targets, test.data, test.targets]

    def _download(self, source: Any, folder: Path) -> None:
        """Download into a folder of its own and move it when complete, so that a failure leaves nothing behind."""
        created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        log.info("Downloading CIFAR-10 to %s", folder / FOLDER)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".cifar10-", dir=folder) as temporary, socket_timeout():
                source(temporary, download=True)
                os.replace(Path(temporary, FOLDER), folder / FOLDER)
        except (OSError, RuntimeError, HTTPException) as error:
            if (folder / FOLDER).is_dir():  # another process, such as a job of the same sweep, has downloaded it
                return
            raise DataError(
                f"data.root={self.root}: CIFAR-10 is not there and cannot be downloaded ({one_line(error)}); set "
                f"data.root to the folder that holds {FOLDER} or cifar10/*.npz, or connect to the network."
            ) from None
        finally:
            for path in created:
                with contextlib.suppress(OSError):  # not empty: the download succeeded
                    path.rmdir()


def _unpacked(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    from PIL import Image

    content, ends = arrays["strips"].tobytes(), np.cumsum(arrays["sizes"])
    columns = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        column = np.asarray(Image.open(io.BytesIO(content[start:end])).convert("RGB"))
        columns.append(column.reshape(-1, SIDE, SIDE, 3))
    images, count = np.concatenate(columns), len(arrays["y_train"])
    labels = arrays.get("y_test")
    if labels is None:
        labels = np.arange(len(images) - count) % len(CLASSES)
    return {"x_train": images[:count], "x_test": images[count:], "y_test": labels}


def _split(x: np.ndarray, y: Any) -> Split:
    images = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).contiguous()
    return Split(x=images, y=torch.as_tensor(np.asarray(y).astype(np.int64)))
