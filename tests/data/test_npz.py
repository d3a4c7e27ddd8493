"""Arrays from .npz files: every form that is read, and everything that is refused."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difflut_lab.data import DataSet
from difflut_lab.errors import DataError
from difflut_lab.registry import REGISTRY

RNG = np.random.default_rng(0)


def table(samples: int, classes: int = 3, features: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A table whose first column is the row number, and labels that are the row number modulo the classes."""
    x = RNG.normal(size=(samples, features))
    x[:, 0] = np.arange(samples)
    return x, np.arange(samples) % classes


def arrays(**changes: Any) -> dict[str, Any]:
    """A file's worth of good arrays with a test set, then changed; None leaves an array out."""
    (x_train, y_train), (x_test, y_test) = table(60), table(12)
    good = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    return {name: array for name, array in (good | changes).items() if array is not None}


def load(folder: Path, content: dict[str, Any], **options: object) -> DataSet:
    """Write the arrays and read them back."""
    path = folder / "arrays.npz"
    np.savez(path, **content)
    data: DataSet = REGISTRY.build("data", {"name": "npz", "path": str(path), **options}).load()
    return data


def message(path: Path, **options: object) -> str:
    """The error of loading, which must be one line that names the key and the file."""
    with pytest.raises(DataError) as error:
        REGISTRY.build("data", {"name": "npz", "path": str(path), **options}).load()
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"data.path={path}: ")
    return str(error.value).removeprefix(f"data.path={path}: ")


def refused(folder: Path, content: dict[str, Any], **options: object) -> str:
    """The error of loading these arrays."""
    np.savez(folder / "arrays.npz", **content)
    return message(folder / "arrays.npz", **options)


def test_a_table_with_a_test_set(tmp_path: Path) -> None:
    data = load(tmp_path, arrays(), val_fraction=0.2)
    assert [tuple(part.x.shape) for part in (data.train, data.val, data.test)] == [(48, 4), (12, 4), (12, 4)]
    assert (data.name, data.input_shape, data.mean, data.std) == ("npz", (4,), [0.0], [1.0])
    assert data.class_names == ["0", "1", "2"]
    for part in (data.train, data.val, data.test):
        assert part.x.dtype == torch.float32 and part.y.dtype == torch.int64
        assert torch.equal(part.x[:, 0].long() % 3, part.y)
    assert torch.equal(data.test.x[:, 0], torch.arange(12.0))
    assert data.val.y.bincount().tolist() == [4, 4, 4]


def test_one_table_is_split_in_three(tmp_path: Path) -> None:
    x, y = table(100, classes=2)
    data = load(tmp_path, {"X": x, "y": y}, test_fraction=0.3)
    parts = [data.train, data.val, data.test]
    assert [len(part) for part in parts] == [63, 7, 30]
    rows = torch.cat([part.x[:, 0] for part in parts])
    assert torch.equal(rows.sort().values, torch.arange(100.0))
    assert data.test.y.bincount().tolist() == [15, 15]
    again, other = (load(tmp_path, {"X": x, "y": y}, test_fraction=0.3, split_seed=seed) for seed in (0, 1))
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(data, part).x, getattr(again, part).x)
        assert not torch.equal(getattr(data, part).x, getattr(other, part).x)


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        ((5, 7), (1, 5, 7)),
        ((5, 7, 3), (3, 5, 7)),
        ((5, 7, 4), (4, 5, 7)),
        ((7, 7, 1), (1, 7, 7)),
        ((3, 5, 7), (3, 5, 7)),
        ((12, 5, 7), (12, 5, 7)),
        ((1, 3, 3), (1, 3, 3)),
        ((3, 4, 4), (3, 4, 4)),
        ((4, 4, 1), (1, 4, 4)),
        ((3, 7, 1), (1, 3, 7)),
    ],
)
def test_bytes_are_images(tmp_path: Path, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
    images = RNG.integers(0, 256, (40, *stored), dtype=np.uint8)
    data = load(tmp_path, {"x_train": images, "y_train": table(40)[1], "x_test": images, "y_test": table(40)[1]})
    assert data.input_shape == shape
    assert data.test.x.dtype == torch.uint8 and data.test.x.is_contiguous()
    assert (data.mean, data.std) == ([0.0], [255.0])
    channels_first = images[:, None] if len(stored) == 2 else images.transpose(0, 3, 1, 2)
    expected = images if stored == shape else channels_first
    assert np.array_equal(data.test.x.numpy(), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_, np.float16, np.float64, ">f8"])
def test_other_tables_are_floats_as_they_are(tmp_path: Path, dtype: Any) -> None:
    x = RNG.integers(0, 2, (40, 6)).astype(dtype)
    data = load(tmp_path, {"x_train": x, "y_train": table(40)[1], "x_test": x, "y_test": table(40)[1]})
    assert data.test.x.dtype == torch.float32 and data.std == [1.0]
    assert np.array_equal(data.test.x.numpy(), x.astype(np.float32))


def test_float_arrays_keep_their_shape(tmp_path: Path) -> None:
    data = load(tmp_path, {"X": RNG.random((40, 5, 7, 3)), "y": table(40)[1]}, val_fraction=0.25)
    assert data.input_shape == (5, 7, 3) and data.train.x.dtype == torch.float32


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint64, np.int32, np.float16, np.float64])
@pytest.mark.parametrize("column", [False, True])
def test_labels_of_any_number_type(tmp_path: Path, dtype: Any, column: bool) -> None:
    x, y = table(40)
    data = load(tmp_path, {"X": x, "y": y.astype(dtype)[:, None] if column else y.astype(dtype)}, val_fraction=0.25)
    assert torch.equal(data.train.x[:, 0].long() % 3, data.train.y)


def test_boolean_labels(tmp_path: Path) -> None:
    x, y = table(40, classes=2)
    assert load(tmp_path, {"X": x, "y": y.astype(bool)}).class_names == ["0", "1"]


def test_a_test_set_in_the_file_comes_first_and_the_rest_is_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="difflut_lab"):
        data = load(tmp_path, arrays(X=np.zeros((5, 4)), y=np.zeros(5), note=np.array("hello")), val_fraction=0.2)
    assert len(data.test) == 12
    assert "arrays not used: X, y, note" in caplog.text


def test_test_fraction_is_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data.test_fraction=0.5: .* has a test set of its own"):
        load(tmp_path, arrays(), test_fraction=0.5)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "arrays.npz", **arrays())
    assert REGISTRY.build("data", {"name": "npz", "path": "~/arrays.npz"}).load().input_shape == (4,)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    assert message(tmp_path / "none.npz").startswith("there is no such file")
    assert message(tmp_path).startswith("is not an .npz file")
    path = tmp_path / "file.npz"
    for content in (b"", b"hello", b"PK\x03\x04 cut short", b"\x80\x04pickle"):
        path.write_bytes(content)
        assert message(path).startswith("is not an .npz file")
    np.save(tmp_path / "single.npy", np.zeros(3))
    assert message(tmp_path / "single.npy").startswith("is not an .npz file but a single array")


def test_a_relative_path_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"there is no such file in {tmp_path}" in message(Path("none.npz"))


def test_a_damaged_array(tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    np.savez(path, **arrays())
    content = bytearray(path.read_bytes())
    content[1000:1100] = bytes(100)
    path.write_bytes(content)
    assert message(path).startswith("x_train cannot be read")


def test_missing_arrays(tmp_path: Path) -> None:
    said = refused(tmp_path, arrays(y_test=None))
    assert said.startswith("y_test missing; it holds x_train, y_train, x_test, needed are x_train, y_train, x_test")
    assert refused(tmp_path, {"X": np.zeros((5, 2))}).startswith("y missing; it holds X,")
    assert refused(tmp_path, {"a": np.zeros(5)}).startswith("it holds a, needed are")
    assert refused(tmp_path, {}).startswith("it holds no arrays")


@pytest.mark.parametrize("name", ["x_train", "x_test"])
def test_nan_and_infinity(tmp_path: Path, name: str) -> None:
    content = arrays()
    content[name][3, 1:] = [np.nan, np.inf, -np.inf]
    samples = content[name].size
    assert refused(tmp_path, content).startswith(f"{name} holds 1 NaN and 2 infinite (in float32) of {samples} values")
    content[name][3, 1:] = [0, 0, 1e300]
    assert refused(tmp_path, content).startswith(f"{name} holds 1 infinite")
    labels = content["y_train"].astype(float)
    labels[:2] = np.nan
    assert refused(tmp_path, arrays(y_train=labels)).startswith("y_train holds 2 NaN of 60 values")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y + 0.5, "y_train holds 60 labels that are not whole numbers (such as 0.5)"),
        (lambda y: y - 1, "y_train holds 20 negative labels (such as -1)"),
        (lambda y: y + 1, "y_train holds labels out of range: 3 classes must be labelled 0 to 2, but label 0 is miss"),
        (lambda y: np.where(y == 2, 255, y), "y_train holds labels out of range: 3 classes must be labelled 0 to 2"),
        (lambda y: y.astype(np.uint64) + np.uint64(2**63), "y_train holds labels out of range (such as 922337203685"),
        (lambda y: y * 1e300, "y_train holds labels out of range (such as 2e+300)"),
        (lambda y: y * 0, "y_train holds only the label 0"),
        (lambda y: y.astype(str), "y_train must hold numbers, it is <U"),
        (lambda y: y.astype(complex), "y_train must hold numbers, it is complex128"),
        (lambda y: y.astype(object), "y_train cannot be read (Object arrays cannot be loaded"),
        (lambda y: np.eye(3)[y], "y_train has shape (60, 3); it must be (60,), one class index per sample"),
        (lambda y: y[:-1], "x_train has 60 samples and y_train 59 labels"),
        (lambda y: y[:0], "y_train is empty"),
        (lambda y: np.float64(1), "y_train has shape ()"),
    ],
)
def test_bad_labels(tmp_path: Path, change: Any, said: str) -> None:
    assert refused(tmp_path, arrays(y_train=change(arrays()["y_train"]))).startswith(said)


def test_labels_of_the_test_set(tmp_path: Path) -> None:
    y = arrays()["y_test"]
    said = refused(tmp_path, arrays(y_test=y + 2))
    assert said.startswith("y_test holds labels that y_train does not (3, 4)")
    assert refused(tmp_path, arrays(y_test=y - 1)).startswith("y_test holds 4 negative labels")
    assert load(tmp_path, arrays(y_test=y * 0)).class_names == ["0", "1", "2"]


def test_bad_samples(tmp_path: Path) -> None:
    x = arrays()["x_train"]
    assert refused(tmp_path, arrays(x_test=np.zeros((12, 5)))).startswith(
        "x_train has samples of shape (4,) and x_test of shape (5,)"
    )
    for empty in (x[:0], x[:, :0]):
        content = arrays(x_train=empty, x_test=np.zeros((12, *empty.shape[1:])))
        assert refused(tmp_path, content).startswith(f"x_train is empty, shape {empty.shape}")
    assert refused(tmp_path, {"X": x[:, 0], "y": arrays()["y_train"]}).startswith("X has shape (60,)")
    assert refused(tmp_path, {"X": x.astype(str), "y": arrays()["y_train"]}).startswith("X must hold numbers")
    images = arrays(x_train=np.zeros((60, 4, 4), np.uint8), x_test=np.zeros((12, 4, 4)))
    assert refused(tmp_path, images).startswith("x_train is uint8 and x_test float64")


def test_too_few_samples_to_stratify(tmp_path: Path) -> None:
    x, y = table(60)
    lonely = np.where(np.arange(60) == 7, 3, y)
    content = arrays(x_train=x, y_train=lonely)
    assert refused(tmp_path, content).startswith("data.val_fraction=0.1: class 3 has 1 sample")
    assert refused(tmp_path, {"X": x, "y": lonely}).startswith("data.test_fraction=0.2: class 3 has 1 sample")
    assert refused(tmp_path, arrays(), val_fraction=0.01).startswith("data.val_fraction=0.01: would hold out 1 of 60")


def test_a_member_that_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "arrays.npz"
    np.savez(path, X=table(60)[0])
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("y", "0 1 2")
    assert message(path).startswith("y must hold numbers, it is not an array")
