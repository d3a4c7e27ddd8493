"""The Lightning module: loss, hard and soft accuracy, optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from difflut_lab.errors import TrainingError
from difflut_lab.layers import has_relaxation, soft
from difflut_lab.nodes import LUTNodes
from difflut_lab.seeding import derive_seed
from difflut_lab.training.checkpoint import KEY
from difflut_lab.training.compose import DISTILLATION, instantiate
from difflut_lab.training.distillation import Teacher
from difflut_lab.training.network import Network
from difflut_lab.training.optim import decays_weights, parameter_groups

CHECK_EVERY = 50  # steps between looks at the loss: each is a wait for the accelerator

Batch = tuple[Tensor, Tensor]


class Classifier(L.LightningModule):
    """Trains a network with cross-entropy; measures it hard (as truth tables) and soft (as its relaxation).

    Logged once an epoch: ``train/loss``, ``train/acc``, ``val/loss``, ``val/acc`` (hard), ``lr``; of networks with LUT
    nodes ``val/acc_soft`` and ``val/gap`` (soft minus hard); where those are regularised ``train/regularization``; and
    with a teacher ``train/distillation``. Losses are the cross-entropy alone, in training with the labels smoothed as
    configured; what is minimised is its sum with ``train/regularization``, or of both losses, weighted. A sample that
    was mixed counts as its largest class in ``train/acc``.

    Parameters
    ----------
    network : Network
        Raw features to class scores.
    config : mapping
        The checked configuration.
    header : mapping
        What checkpoints say of themselves.
    teacher : Teacher, optional
        Whose scores are to be learned, too.
    """

    def __init__(
        self,
        network: Network,
        config: Mapping[str, Any],
        header: Mapping[str, Any],
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.header = header
        self.teacher = teacher
        self.relaxes = has_relaxation(network)
        num_classes = len(network.class_names)
        self.hard_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.soft_accuracy = MulticlassAccuracy(num_classes, average="micro")
        # a list, not modules of its own: they are the network's
        self._regularized = [
            bank for bank in network.modules() if isinstance(bank, LUTNodes) and bank.regularizer is not None
        ]
        self._last_x = torch.empty(0)
        self._count = 0
        self._loss_sum = torch.zeros(())
        self._regularization_sum = torch.zeros(())
        self._distillation_sum = torch.zeros(())
        self._correct = torch.zeros((), dtype=torch.int64)

    @property
    def regularizes(self) -> bool:
        """Whether ``train/regularization`` is logged."""
        return bool(self._regularized)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, C)`` of raw features ``(B, *input_shape)``."""
        scores: Tensor = self.network(x)
        return scores

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and scheduler that the configuration names by ``_target_``."""
        decays = decays_weights(self.config["optimizer"])
        parameters = parameter_groups(self.network) if decays else self.network.parameters()
        optimizer = instantiate(self.config["optimizer"], "optimizer", parameters)
        if not self.config["scheduler"]:
            return optimizer
        assert self.trainer.max_epochs is not None
        steps_per_epoch = math.ceil(self.trainer.estimated_stepping_batches / self.trainer.max_epochs)
        scheduler = instantiate(self.config["scheduler"], "scheduler", optimizer, steps_per_epoch=steps_per_epoch)
        interval = getattr(scheduler, "INTERVAL", "epoch")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "val/loss"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the header, and the scheduled values of the epoch; metrics in progress are no part of a checkpoint."""
        checkpoint[KEY] = dict(self.header) | {"scheduled": dict(self.network.scheduled)}

    def on_fit_start(self) -> None:
        """Move the teacher, which is no part of this module."""
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_train_start(self) -> None:
        """Refuse a batch of one sample where the network cannot be trained on it, before the first step."""
        batches: Any = self.trainer.train_dataloader
        if self.trainer.num_training_batches < len(batches) or batches.last_size > 1:
            return
        try:
            copy.deepcopy(self.network).train()(batches.split.x[:1].to(self.device))
        except ValueError as error:  # of batch normalisation
            raise TrainingError(
                f"batch_size={self.config['batch_size']}: leaves a batch of one sample, which batch normalisation "
                f"cannot take ({error}). Choose another batch size."
            ) from None

    def on_train_epoch_start(self) -> None:
        """Start the epoch's sums, and what draws from torch's global generators, such as dropout."""
        # a function of (seed, epoch): a training that is continued draws what it would have drawn
        torch.manual_seed(derive_seed(self.config["seed"], "epoch", self.current_epoch, self.global_rank))
        self._count = 0
        self._loss_sum = torch.zeros((), device=self.device)
        self._regularization_sum = torch.zeros((), device=self.device)
        self._distillation_sum = torch.zeros((), device=self.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self.device)
        # read here, because the scheduler steps before validation
        self._learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Cross-entropy of one batch, the teacher's loss, what the nodes' regularisers add; sums stay on the device."""
        x, y = batch
        scores = self(x)
        loss = F.cross_entropy(scores, y, label_smoothing=self.config["label_smoothing"])
        self._count += len(y)
        self._loss_sum += loss.detach() * len(y)
        classes = y.argmax(dim=1) if y.is_floating_point() else y
        self._correct += (scores.detach().argmax(dim=1) == classes).sum()
        self._last_x = x
        if batch_index % CHECK_EVERY == 0:
            self._check_finite()
        if self.teacher is not None:
            weight, lesson = self.config[DISTILLATION]["weight"], self.teacher.loss(x, scores)
            self._distillation_sum += lesson.detach() * len(y)
            loss = (1 - weight) * loss + weight * lesson
        if self._regularized:
            penalty = torch.stack([bank.regularization() for bank in self._regularized]).sum()
            self._regularization_sum += penalty.detach() * len(y)
            loss = loss + penalty
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Hard and soft accuracy of one batch of validation."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Hard and soft accuracy of one batch of test."""
        self._evaluate(batch)

    def on_validation_epoch_start(self) -> None:
        """Stop where the epoch left something that is not finite, before anything is saved; start the sums."""
        self._check_finite()
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        """Start the sums of test."""
        self._start_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's results on training and validation."""
        self.log_dict(
            {"train/loss": self._loss_sum / self._count, "train/acc": self._correct / self._count}, sync_dist=True
        )
        if self._regularized:
            self.log("train/regularization", self._regularization_sum / self._count, sync_dist=True)
        if self.teacher is not None:
            self.log("train/distillation", self._distillation_sum / self._count, sync_dist=True)
        self.log("lr", self._learning_rate)
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the results on test."""
        self._log_evaluation("test")

    def _start_evaluation(self) -> None:
        self._eval_count = 0
        self._eval_loss = torch.zeros((), device=self.device)

    def _evaluate(self, batch: Batch) -> None:
        x, y = batch
        scores = self(x)
        self._eval_count += len(y)
        self._eval_loss += F.cross_entropy(scores, y, reduction="sum")
        self.hard_accuracy.update(scores.argmax(dim=1), y)
        if self.relaxes:
            with soft(self.network):
                self.soft_accuracy.update(self(x).argmax(dim=1), y)

    def _log_evaluation(self, stage: str) -> None:
        hard = self.hard_accuracy.compute()
        self.hard_accuracy.reset()
        self.log(f"{stage}/acc", hard)
        if self.relaxes:
            relaxed = self.soft_accuracy.compute()
            self.soft_accuracy.reset()
            self.log_dict({f"{stage}/acc_soft": relaxed, f"{stage}/gap": relaxed - hard})
        self.log(f"{stage}/loss", self._eval_loss / self._eval_count, sync_dist=True)

    def _check_finite(self) -> None:
        # a bank of hard nodes gives bits whatever its table holds: look at the parameters, too
        total = self._loss_sum.detach() + sum(parameter.detach().sum() for parameter in self.network.parameters())
        if not torch.isfinite(total):
            raise TrainingError(
                f"Training stopped in epoch {self.current_epoch + 1}: {first_not_finite(self.network, self._last_x)}. "
                + (
                    "The checkpoints are those of the epoch before."
                    if self.current_epoch
                    else "No epoch was completed."
                )
            )


def first_not_finite(network: nn.Module, x: Tensor) -> str:
    """Say where a network first holds or computes something that is not finite.

    Parameters
    ----------
    network : nn.Module
        The network.
    x : Tensor
        A batch to look for it with, ``(B, *input_shape)``.
    """
    for name, module in network.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if not torch.isfinite(parameter).all():
                return f"'{parameter_name}' of {name} ({type(module).__name__}) is not finite"
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of {name} ({type(module).__name__}) is not finite")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules()]
    try:
        with torch.no_grad():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss is not finite"
