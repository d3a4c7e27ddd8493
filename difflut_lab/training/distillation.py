"""A trained network as the teacher of another."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from difflut_lab.data import DataSet
from difflut_lab.errors import CheckpointError
from difflut_lab.training.checkpoint import KEY, load_network, read

CKPT = "distillation.ckpt"  # the configuration key


class Teacher:
    """What a student learns from a trained network's scores (Hinton et al., arXiv 1503.02531).

    It is no module: the teacher is no part of the student, of its checkpoints, or of what an optimizer sees.

    Parameters
    ----------
    path : str or Path
        The teacher's checkpoint.
    temperature : float
        Divides the scores of both, so that small ones count.

    Raises
    ------
    CheckpointError, ConfigError
        If the file is no checkpoint, or a part that it names is not registered.
    """

    def __init__(self, path: str | Path, temperature: float) -> None:
        self._path = path
        self._temperature = temperature
        self._input_shape = tuple(read(path, CKPT)[KEY]["input_shape"])
        self._network = load_network(path, CKPT).requires_grad_(False)

    def check(self, data: DataSet) -> None:
        """Refuse data that the teacher was not trained for.

        Raises
        ------
        CheckpointError
            Names what differs.
        """
        if self._network.class_names != list(data.class_names):
            raise CheckpointError(
                f"{CKPT}={self._path}: was trained on the classes {self._network.class_names}, the data has "
                f"{list(data.class_names)}."
            )
        if self._input_shape != tuple(data.input_shape):
            raise CheckpointError(
                f"{CKPT}={self._path}: was trained on samples of shape {self._input_shape}, the data has "
                f"{tuple(data.input_shape)}."
            )

    def to(self, device: torch.device) -> None:
        """Move the teacher to where the student is trained."""
        self._network.to(device)

    def loss(self, x: Tensor, scores: Tensor) -> Tensor:
        """``T^2 * KL(teacher || student)``, the mean over a batch.

        Parameters
        ----------
        x : Tensor
            Raw features, ``(B, *input_shape)``.
        scores : Tensor
            The student's scores of them, ``(B, C)``.
        """
        with torch.no_grad():
            target = F.log_softmax(self._network(x).float() / self._temperature, dim=1)
        found = F.log_softmax(scores.float() / self._temperature, dim=1)
        return self._temperature**2 * F.kl_div(found, target, reduction="batchmean", log_target=True)
