import pytest
import torch

from difflut_lab.data import Split
from difflut_lab.training.datamodule import Batches


def split(size):
    return Split(x=torch.arange(size, dtype=torch.uint8).unsqueeze(1), y=torch.arange(size))


def labels(batches, epoch=0):
    batches.set_epoch(epoch)
    return torch.cat([y for _, y in batches]).tolist()


def test_the_order_is_a_function_of_seed_and_epoch():
    first, second = Batches(split(20), 6, seed=1), Batches(split(20), 6, seed=1)
    assert labels(first, 3) == labels(second, 3), "whatever was drawn before"
    assert sorted(labels(first, 3)) == list(range(20))
    assert labels(first, 3) != labels(first, 4)
    assert labels(first, 3) != labels(Batches(split(20), 6, seed=2), 3)
    assert [len(y) for _, y in first] == [6, 6, 6, 2]
    assert len(first) == 4


def test_without_a_seed_the_order_is_kept():
    assert labels(Batches(split(5), 2)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_processes_share_an_epoch(size):
    shares = [Batches(split(size), 2, seed=0, rank=rank, world_size=3) for rank in range(3)]
    found = [labels(share) for share in shares]
    assert {label for share in found for label in share} == set(range(size))
    assert len({len(share) for share in found}) == 1, "all take the same number of steps"
    assert len({len(share) for share in shares}) == 1
    ordered = [Batches(split(size), 2, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(label for share in ordered if len(share) for label in labels(share)) == list(range(size))
    assert all(len(list(share)) == len(share) for share in ordered if len(share))
