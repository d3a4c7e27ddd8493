"""scikit-learn's digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from difflut_lab.data import DataSet
from difflut_lab.registry import REGISTRY


def load(**options: object) -> DataSet:
    """The data set with the given options."""
    data: DataSet = REGISTRY.build("data", {"name": "digits", **options}).load()
    return data


def test_sizes_types_and_names() -> None:
    data = load()
    assert [len(part) for part in (data.train, data.val, data.test)] == [1293, 144, 360]
    assert data.input_shape == (1, 8, 8)
    assert data.class_names == list("0123456789")
    assert (data.name, data.mean, data.std) == ("digits", [0.0], [16.0])
    for part in (data.train, data.val, data.test):
        assert part.x.dtype == torch.uint8 and part.x.max() == 16
        assert part.y.dtype == torch.int64


def test_the_parts_are_all_of_the_samples() -> None:
    data = load()
    parts = (data.train, data.val, data.test)

    def rows(x: torch.Tensor, y: torch.Tensor) -> list[list[int]]:
        return sorted(torch.cat([x.flatten(1).long(), y[:, None]], dim=1).tolist())

    everything = load_digits()
    assert rows(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])) == rows(
        torch.from_numpy(everything.data), torch.from_numpy(everything.target)
    )
    shares = torch.from_numpy(everything.target).bincount()
    for part in parts:
        assert (part.y.bincount() - shares * len(part) / 1797).abs().max() < 2


def test_split_seed_and_fractions() -> None:
    first, again, other, larger = load(), load(), load(split_seed=1), load(val_fraction=0.3)
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(first, name).x, getattr(again, name).x)
        assert not torch.equal(getattr(first, name).x[:100], getattr(other, name).x[:100])
    # another validation part leaves the test set as it is
    assert torch.equal(first.test.x, larger.test.x)
    assert len(load(test_fraction=0.5).test) == 899
