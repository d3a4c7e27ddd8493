"""Weights averaged over the steps of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights(Callback):
    """Keeps an exponential moving average of the weights, which stands in for them in validation and in checkpoints.

    After optimizer step s, counted from 0, ``average = d * average + (1 - d) * weight`` with
    ``d = min(decay, (1 + s) / (10 + s))``, so that the first weights are soon forgotten. Parameters are averaged as
    they are trained: latent weights, of which a network that is evaluated makes its codes or tables anew, scales and
    normalisation. Batch normalisation's running statistics are averaged alike, because they are to describe what the
    averaged weights compute. All other buffers, such as counters, are the network's own.

    It belongs before callbacks that look at the trained weights at the end of a validation, as ``TernaryHealth`` does.

    Parameters
    ----------
    network : nn.Module
        What is trained.
    decay : float
        Share of the average that one step leaves, between 0 and 1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = network
        self._decay = decay
        self._steps = 0
        # the average while the network holds what is trained, and the reverse
        self._other: dict[str, Tensor] = {}
        self._is_applied = False

    def state_dict(self) -> dict[str, Any]:
        """The half that the network does not hold; it holds the average where ``is_applied``."""
        return {"other": dict(self._other), "is_applied": self._is_applied}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the half that the network, whose weights are restored as well, does not hold."""
        self._other, self._is_applied = dict(state_dict["other"]), state_dict["is_applied"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the average, or go on with it."""
        self._steps = trainer.global_step
        if self._other:
            self._other = {name: self._other[name].to(tensor.device) for name, tensor in self._tensors()}
            self._apply(False)
        else:
            self._other = {name: tensor.clone() for name, tensor in self._tensors()}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average the weights after a step of the optimizer, which several batches may share."""
        if trainer.global_step == self._steps:
            return
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        average = get_ema_multi_avg_fn(decay)
        average(list(self._other.values()), [tensor for _, tensor in self._tensors()], self._steps)
        self._steps = trainer.global_step

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the average be validated."""
        self._apply(True)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with what is trained."""
        self._apply(False)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network holds the average, for example while it is saved."""
        self._apply(True)
        try:
            yield
        finally:
            self._apply(False)

    @torch.no_grad()
    def _apply(self, average: bool) -> None:
        if average == self._is_applied or not self._other:
            return
        for name, tensor in self._tensors():
            held = tensor.clone()
            tensor.copy_(self._other[name])
            self._other[name].copy_(held)
        self._is_applied = average

    def _tensors(self) -> list[tuple[str, Tensor]]:
        """What is averaged, without its history of computation."""
        found = [(name, parameter.detach()) for name, parameter in self._network.named_parameters()]
        for prefix, module in self._network.named_modules():
            if isinstance(module, _BatchNorm):
                found += [
                    (f"{prefix}.{name}", buffer)
                    for name, buffer in module.named_buffers(recurse=False)
                    if buffer.is_floating_point()
                ]
        return found
