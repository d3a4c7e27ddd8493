"""Stratified splits: sizes, shares, seeds, and what cannot be split."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from difflut_lab.data import DataSet, Split, stratified_indices, stratified_split
from difflut_lab.errors import DataError
from difflut_lab.registry import REGISTRY

KEY = "data.val_fraction"


def labels(*counts: int) -> Tensor:
    """Labels with the given number of samples per class, shuffled."""
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]


def seed_globally(seed: int) -> None:
    """Seed everything that has a global random state."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def global_states() -> tuple[Any, ...]:
    """The global random states, comparable."""
    numpy_state = np.random.get_state(legacy=False)
    return torch.get_rng_state().tolist(), str(numpy_state), random.getstate()


@pytest.mark.parametrize("fraction", [0.05, 0.1, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("counts", [(100, 100), (1000, 37, 211), (20, 30, 40, 50, 60)])
def test_parts_are_disjoint_complete_and_stratified(counts: tuple[int, ...], fraction: float) -> None:
    y = labels(*counts)
    kept, held = stratified_indices(y, fraction, 0, key=KEY)
    assert len(held) == int(np.ceil(fraction * len(y)))
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(len(y)))
    assert torch.equal(kept, kept.sort().values) and torch.equal(held, held.sort().values)
    shares = y[held].bincount(minlength=len(counts)) - fraction * torch.tensor(counts)
    assert shares.abs().max() <= 1


def test_a_seed_is_a_split() -> None:
    y = labels(100, 200)
    first, again, other = (stratified_indices(y, 0.1, seed, key=KEY)[1] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_states_do_not_matter_and_are_left_alone() -> None:
    y = labels(100, 200)
    seed_globally(1)
    first = stratified_indices(y, 0.1, 0, key=KEY)[1]
    states = global_states()
    seed_globally(2)
    assert torch.equal(first, stratified_indices(y, 0.1, 0, key=KEY)[1])
    seed_globally(1)
    REGISTRY.build("data", "digits").load()
    assert states == global_states()


def test_samples_keep_their_labels() -> None:
    y = labels(30, 50)
    for part in stratified_split(Split(x=100 * y[:, None] + torch.arange(80)[:, None], y=y), 0.2, 0, key=KEY):
        assert torch.equal(part.x[:, 0] // 100, part.y)


@pytest.mark.parametrize(
    ("counts", "fraction", "said"),
    [
        ((50, 1), 0.1, "data.val_fraction=0.1: class 1 has 1 sample"),
        ((9, 9, 9), 0.05, "data.val_fraction=0.05: would hold out 2 of 27 samples and keep 25; each part needs at"),
        ((9, 9, 9), 0.95, "data.val_fraction=0.95: would hold out 26 of 27"),
        ((500, 2), 0.9, "data.val_fraction=0.9: leaves no sample of class 1"),
        ((50, 50), 1.5, "data.val_fraction=1.5: must be greater than 0 and less than 1"),
    ],
)
def test_what_cannot_be_split_is_said(counts: tuple[int, ...], fraction: float, said: str) -> None:
    with pytest.raises(DataError) as error:
        stratified_indices(labels(*counts), fraction, 0, key=KEY)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_data_set_must_be_whole() -> None:
    part = Split(x=torch.zeros(4, 3), y=torch.tensor([0, 1, 0, 1]))
    whole: dict[str, Any] = {
        "name": "mine",
        "train": part,
        "val": part,
        "test": part,
        "input_shape": (3,),
        "class_names": ["a", "b"],
    }
    DataSet(**whole, mean=[0.0], std=[1.0, 2.0, 3.0])
    empty = Split(x=torch.zeros(0, 3), y=torch.zeros(0, dtype=torch.int64))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"val": empty}, "val: is empty"),
        ({"input_shape": (4,)}, "samples of shape"),
        ({"class_names": ["a"]}, "labels 0 to 1, but 1 classes"),
        ({"std": [1.0, 2.0]}, "std has 2 values"),
    ]
    for change, said in changes:
        with pytest.raises(DataError, match=said):
            DataSet(**{"mean": [0.0], "std": [1.0], **whole, **change})
    with pytest.raises(DataError, match="one int64 label per sample"):
        Split(x=torch.zeros(4, 3), y=torch.zeros(3, dtype=torch.int64))
