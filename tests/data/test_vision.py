"""MNIST and FashionMNIST: from files, from a download that works, and from one that does not."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from difflut_lab.data import DataSet
from difflut_lab.errors import DataError
from difflut_lab.registry import REGISTRY

SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
PREFIXES = {"train": 60, "t10k": 20}  # samples


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array in the format of MNIST's files."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_set(raw: Path) -> None:
    """Write a tiny set of images; image i of a part has i in its first pixel."""
    raw.mkdir(parents=True, exist_ok=True)
    for prefix, samples in PREFIXES.items():
        images = np.random.default_rng(0).integers(0, 256, (samples, 28, 28))
        images[:, 0, 0] = np.arange(samples)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(samples) % 10)


def load(name: str, root: Path, **options: object) -> DataSet:
    """The data set with the given options."""
    data: DataSet = REGISTRY.build("data", {"name": name, "root": str(root), **options}).load()
    return data


def message(name: str, root: Path) -> str:
    """The error of loading, which must be one line."""
    with pytest.raises(DataError) as error:
        load(name, root)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"data.root={root}: ")
    return str(error.value)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download begins, writes a part and fails."""

    def download(self: datasets.MNIST) -> None:
        os.makedirs(self.raw_folder, exist_ok=True)
        Path(self.raw_folder, "train-images-idx3-ubyte").write_bytes(b"half a file")
        raise URLError("no\nnetwork")

    monkeypatch.setattr(datasets.MNIST, "download", download)


@pytest.mark.parametrize("name", SETS)
def test_reads_files_that_are_there(name: str, tmp_path: Path) -> None:
    write_set(tmp_path / SETS[name] / "raw")
    data = load(name, tmp_path, val_fraction=0.25)
    assert [tuple(part.x.shape) for part in (data.train, data.val, data.test)] == [
        (45, 1, 28, 28),
        (15, 1, 28, 28),
        (20, 1, 28, 28),
    ]
    assert (data.name, data.input_shape, data.mean, data.std) == (name, (1, 28, 28), [0.0], [255.0])
    for part in (data.train, data.val, data.test):
        assert part.x.dtype == torch.uint8 and part.y.dtype == torch.int64
        assert torch.equal(part.x[:, 0, 0, 0].long() % 10, part.y)
    train, val = (set(part.x[:, 0, 0, 0].tolist()) for part in (data.train, data.val))
    assert train | val == set(range(60)) and not train & val
    assert (data.val.y.bincount(minlength=10) - 1.5).abs().max() <= 0.5


def test_class_names(tmp_path: Path) -> None:
    for folder in SETS.values():
        write_set(tmp_path / folder / "raw")
    assert load("mnist", tmp_path, val_fraction=0.5).class_names == list("0123456789")
    assert load("fashion_mnist", tmp_path, val_fraction=0.5).class_names[::9] == ["T-shirt/top", "Ankle boot"]


def test_split_seed(tmp_path: Path) -> None:
    write_set(tmp_path / "MNIST" / "raw")
    first, again, other = (load("mnist", tmp_path, val_fraction=0.5, split_seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.val.x, again.val.x)
    assert not torch.equal(first.val.x, other.val.x)


def test_reads_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_set(raw)
    before = sorted(tmp_path.rglob("*"))
    folders = [raw, raw.parent, tmp_path]
    try:
        for folder in folders:
            folder.chmod(0o555)
        load("mnist", tmp_path, val_fraction=0.5)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", SETS)
def test_a_failed_download_says_so_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    said = message(name, tmp_path / "not" / "there")
    assert f"{SETS[name]} is not there and cannot be downloaded (<urlopen error no network>)" in said
    assert f"set data.root to the folder that holds {SETS[name]}/raw/train-images-idx3-ubyte" in said
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_keeps_what_was_there(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_set(raw)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "holds MNIST/raw/t10k-labels-idx1-ubyte" in message("mnist", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    assert "cannot be downloaded" in message("mnist", tmp_path / "data")
    assert (tmp_path / "data").exists()


def test_the_next_start_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    message("fashion_mnist", root)
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: write_set(Path(self.raw_folder)))
    assert len(load("fashion_mnist", root, val_fraction=0.5).test) == 20
    assert sorted(path.name for path in (root / "FashionMNIST" / "raw").iterdir()) == [
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]
    assert [path.name for path in root.iterdir()] == ["FashionMNIST"]


def test_archives_put_there_by_hand_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"archive")
    found: list[str] = []

    def download(self: datasets.MNIST) -> None:
        found.extend(path.name for path in Path(self.raw_folder).iterdir())
        write_set(Path(self.raw_folder))

    monkeypatch.setattr(datasets.MNIST, "download", download)
    load("mnist", tmp_path, val_fraction=0.5)
    assert found == ["train-images-idx3-ubyte.gz"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    for name, content in {
        "train-images-idx3-ubyte": b"",
        "train-labels-idx1-ubyte": b"<html>not found</html>",
        "t10k-images-idx3-ubyte": struct.pack(">BBBBIII", 0, 0, 8, 3, 20, 28, 28) + bytes(100),
    }.items():
        write_set(raw)
        (raw / name).write_bytes(content)
        assert f"MNIST/raw/{name.split('-')[0]}-* cannot be read" in message("mnist", tmp_path)
    write_set(raw)
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(19) % 10)
    assert "MNIST/raw/t10k-* hold 20 images and 19 labels" in message("mnist", tmp_path)
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(20))
    assert "20 labels, the largest 19; there must be a label, 0 to 9" in message("mnist", tmp_path)


@pytest.mark.skipif("DIFFLUT_LAB_DATA" not in os.environ, reason="DIFFLUT_LAB_DATA does not point at the real files")
@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fashion_mnist", 0.2860)])
def test_the_real_files(name: str, mean: float) -> None:
    data = load(name, Path(os.environ["DIFFLUT_LAB_DATA"]))
    assert [len(part) for part in (data.train, data.val, data.test)] == [54000, 6000, 10000]
    # the mean over all 60,000 training images is the one that the literature normalises with
    training = torch.cat([data.train.x, data.val.x])
    assert training.sum(dtype=torch.int64).item() / training.numel() / 255 == pytest.approx(mean, abs=1e-4)
    per_class = torch.cat([data.train.y, data.val.y]).bincount()
    assert (data.val.y.bincount() - per_class / 10).abs().max() < 1
