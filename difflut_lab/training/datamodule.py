"""Batches as index selections from tensors in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import lightning as L
import torch
from torch import Tensor

from difflut_lab.augmentations import Augmentation
from difflut_lab.data import DataSet, Split
from difflut_lab.seeding import generator

DEVICE_SHARE = 0.5  # of the accelerator's free memory that the data may take


class Batches:
    """The batches of a split, in an order that is a function of (seed, epoch).

    Parameters
    ----------
    split : Split
        The samples.
    batch_size : int
        Samples per batch; the last batch of an epoch may be smaller.
    seed : int, optional
        Shuffles anew each epoch; None keeps the order.
    rank, world_size : int
        This process and the number of processes: each takes its share of every epoch. In training the shares are
        made equal by repeating the first samples, because all processes must take the same number of steps.
    augmentations : sequence of Augmentation
        Act on each batch, one after the other; what they draw is a function of (seed, epoch, batch, rank).
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        augmentations: Sequence[Augmentation] = (),
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.augmentations = augmentations
        self.epoch = 0
        self.sampler = self.batch_sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch."""
        return math.ceil(self._share / self.batch_size)

    @property
    def last_size(self) -> int:
        """Samples of an epoch's last batch."""
        return self._share - (len(self) - 1) * self.batch_size

    @property
    def _size(self) -> int:
        return len(self.split.y)

    @property
    def _share(self) -> int:
        """Samples of this process."""
        if self.seed is None:
            return len(range(self.rank, self._size, self.world_size))
        return math.ceil(self._size / self.world_size)

    def _order(self) -> Tensor:
        if self.seed is None:
            return torch.arange(self.rank, self._size, self.world_size)
        order = torch.randperm(self._size, generator=generator(self.seed, "order", self.epoch))
        padded = math.ceil(self._size / self.world_size) * self.world_size
        return order[torch.arange(padded) % self._size][self.rank :: self.world_size]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``x (B, *input_shape)`` in the data's own type and ``y (B,)``."""
        x, y = self.split.x, self.split.y
        for number, indices in enumerate(self._order().to(x.device).split(self.batch_size)):
            batch = x.index_select(0, indices), y.index_select(0, indices)
            if self.augmentations and self.seed is not None:
                draws = generator(self.seed, "augmentation", self.epoch, number, self.rank)
                for augmentation in self.augmentations:
                    batch = augmentation(*batch, draws)
            yield batch


class InMemoryData(L.LightningDataModule):
    """Training, validation and test batches of a data set, on the accelerator if it fits there.

    Parameters
    ----------
    data : DataSet
        The tensors.
    batch_size, eval_batch_size : int
        Samples per training step, and per forward of validation and test.
    seed : int
        The order of the training samples is a function of it and the epoch.
    augmentations : sequence of Augmentation
        Act on the batches of training.
    """

    def __init__(
        self,
        data: DataSet,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        augmentations: Sequence[Augmentation] = (),
    ) -> None:
        super().__init__()
        self.data = data
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.augmentations = augmentations

    def train_dataloader(self) -> Batches:
        """Shuffled batches of the training split."""
        return self._batches(self.data.train, self.batch_size, self.seed, self.augmentations)

    def val_dataloader(self) -> Batches:
        """Batches of the validation split, in order."""
        return self._batches(self.data.val, self.eval_batch_size)

    def test_dataloader(self) -> Batches:
        """Batches of the test split, in order."""
        return self._batches(self.data.test, self.eval_batch_size)

    def _batches(
        self, split: Split, batch_size: int, seed: int | None = None, augmentations: Sequence[Augmentation] = ()
    ) -> Batches:
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if split.x.nbytes < DEVICE_SHARE * free:
                split = Split(x=split.x.to(device), y=split.y.to(device))
        return Batches(
            split,
            batch_size,
            seed=seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            augmentations=augmentations,
        )
