"""Learning rates over the steps of a training, where torch has none that fits."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from difflut_lab.errors import ConfigError
from difflut_lab.schema import NonNegativeFloat, PositiveInt


class WarmupCosine(LRScheduler):
    """A linear rise to the optimizer's learning rate, then half a cosine (Goyal et al., arXiv 1706.02677).

    With W steps of warm-up and T steps altogether, step t = 0, 1, ... has ``lr * (t + 1) / W`` for t < W, and then
    ``eta_min + (lr - eta_min) * (1 + cos(pi * (t - W) / (T - W))) / 2``.

    Parameters
    ----------
    optimizer : Optimizer
        Its learning rates are the highest ones.
    warmup_epochs : float
        Length of the rise.
    epochs : int
        Length of the training.
    eta_min : float
        Where the cosine ends.
    steps_per_epoch : int
        Supplied by the training.

    Raises
    ------
    ConfigError
        If the warm-up is longer than the training.
    """

    # what one call of ``step`` stands for
    INTERVAL: ClassVar[Literal["step", "epoch"]] = "step"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_epochs: NonNegativeFloat = 1.0,
        epochs: PositiveInt,
        eta_min: NonNegativeFloat = 0.0,
        steps_per_epoch: int,
    ) -> None:
        if warmup_epochs > epochs:
            raise ConfigError(f"warmup_epochs={warmup_epochs}: must be at most the epochs, {epochs}.")
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)
        self.steps = epochs * steps_per_epoch
        self.eta_min = eta_min
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the step that is next."""
        step = self.last_epoch
        if step < self.warmup_steps:
            return [highest * (step + 1) / self.warmup_steps for highest in self.base_lrs]
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        share = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (highest - self.eta_min) * share for highest in self.base_lrs]
