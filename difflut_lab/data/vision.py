"""MNIST and FashionMNIST, through torchvision's classes."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

from difflut_lab.data.base import DataSet, Split, one_line, stratified_split
from difflut_lab.errors import DataError
from difflut_lab.registry import register_data
from difflut_lab.schema import Fraction, Seed

log = logging.getLogger(__name__)

TIMEOUT = 20.0
# seconds without an answer after which a download gives up; torchvision itself waits for as long as the system does


class IdxImages:
    """Base of the sets that torchvision keeps as idx files in ``root/<its class>/raw``.

    Parameters
    ----------
    root : str
        The folder of data sets. Files that are there are read, also where the folder is read-only; files that are
        missing are downloaded into it.
    val_fraction : float
        The part of the training samples that is the validation set; stratified.
    split_seed : int
        The seed of that draw, apart from the run's seed.
    """

    name: ClassVar[str]
    source: ClassVar[str]  # the name of torchvision's class

    def __init__(self, *, root: str = "data", val_fraction: Fraction = 0.1, split_seed: Seed = 0) -> None:
        self.root = root
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def load(self) -> DataSet:
        """Read and split the data, downloading it first where files are missing; images are (S, 1, 28, 28) uint8.

        Raises
        ------
        DataError
            If files are missing and cannot be downloaded, or cannot be read.
        """
        from torchvision import datasets  # takes two seconds to import

        source = getattr(datasets, self.source)
        if self._missing(source):
            self._download(source)
        training, test = self._read(source, train=True), self._read(source, train=False)
        train, val = stratified_split(training, self.val_fraction, self.split_seed, key="data.val_fraction")
        return DataSet(
            name=self.name,
            train=train,
            val=val,
            test=test,
            input_shape=tuple(training.x.shape[1:]),
            # torchvision calls MNIST's classes "0 - zero", "1 - one", ...
            class_names=[name.split(" - ")[0] for name in source.classes],
            mean=[0.0],
            std=[255.0],
        )

    @property
    def _folder(self) -> Path:
        return Path(self.root).expanduser()

    def _missing(self, source: Any) -> list[Path]:
        names = [Path(archive).stem for archive, _ in source.resources]
        raw = self._folder / self.source / "raw"
        return [raw / name for name in names if not os.path.isfile(raw / name)]

    def _download(self, source: Any) -> None:
        """Download into a folder of its own and move complete files only, so that a failure leaves nothing behind."""
        folder = self._folder
        created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        raw = folder / self.source / "raw"
        log.info("Downloading %s to %s", self.source, raw)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{self.source}-", dir=folder) as temporary, socket_timeout():
                # archives that were put there by hand spare the network
                fetched = Path(temporary, self.source, "raw")
                fetched.mkdir(parents=True)
                for archive, _ in source.resources:
                    if os.path.isfile(raw / archive):
                        shutil.copy(raw / archive, fetched)
                # torchvision checks the sums of the archives; constructing reads the images once, which checks them too
                source(temporary, download=True)
                raw.mkdir(parents=True, exist_ok=True)
                for missing in self._missing(source):
                    os.replace(fetched / missing.name, missing)
        except (OSError, RuntimeError, HTTPException) as error:
            missing_files = self._missing(source)
            if not missing_files:  # another process, such as a job of the same sweep, has downloaded them
                return
            raise DataError(
                f"data.root={self.root}: {self.source} is not there and cannot be downloaded ({one_line(error)}); set "
                f"data.root to the folder that holds {missing_files[0].relative_to(folder)}, or connect to the network."
            ) from None
        finally:
            for path in created:
                with contextlib.suppress(OSError):  # not empty: the download succeeded
                    path.rmdir()

    def _read(self, source: Any, *, train: bool) -> Split:
        files = f"{self.source}/raw/{'train' if train else 't10k'}-*"
        try:
            loaded = source(self._folder, train=train)
        # what torchvision's reader raises on files that are cut short or are something else
        except (OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
            raise DataError(
                f"data.root={self.root}: {files} cannot be read ({one_line(error)}); delete them to have them "
                "downloaded anew."
            ) from None
        images, labels = loaded.data, loaded.targets
        if len(images) == 0 or len(images) != len(labels) or int(labels.max()) >= len(source.classes):
            raise DataError(
                f"data.root={self.root}: {files} hold {len(images)} images and {len(labels)} labels, the largest "
                f"{int(labels.max()) if len(labels) else 'none'}; there must be a label, 0 to "
                f"{len(source.classes) - 1}, for each image: delete them to have them downloaded anew."
            )
        return Split(x=images.unsqueeze(1), y=labels)


@register_data("mnist")
class Mnist(IdxImages):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits (LeCun et al. 1998)."""

    name = "mnist"
    source = "MNIST"


@register_data("fashion_mnist")
class FashionMnist(IdxImages):
    """FashionMNIST: 60,000 training and 10,000 test images of clothes, 10 classes (arXiv 1708.07747)."""

    name = "fashion_mnist"
    source = "FashionMNIST"


@contextlib.contextmanager
def socket_timeout() -> Iterator[None]:
    """Within this context a download that gets no answer gives up."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
