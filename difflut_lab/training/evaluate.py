"""The test accuracy of a checkpoint, from the checkpoint and the data alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from difflut_lab import schema
from difflut_lab.data import DataSet
from difflut_lab.errors import CheckpointError
from difflut_lab.layers import has_relaxation, soft
from difflut_lab.registry import REGISTRY
from difflut_lab.training.checkpoint import KEY, load_network, read
from difflut_lab.training.datamodule import Batches


def evaluate(path: str | Path, data: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Measure a checkpoint on the test split that it was meant for.

    Parameters
    ----------
    path : str or Path
        ``best.ckpt`` or ``last.ckpt``.
    data : mapping, optional
        Options of the data set that differ here, such as ``{"root": "elsewhere"}``.

    Returns
    -------
    dict
        ``test/acc`` (hard), ``test/loss``, and of networks with LUT nodes ``test/acc_soft`` and ``test/gap``.

    Raises
    ------
    UserError
        If the checkpoint or the data cannot be read, or do not belong together.
    """
    network = load_network(path)
    config = read(path)[KEY]["config"]
    options = schema.validate_part("data", config["data"] | dict(data or {}), "data")
    data_set: DataSet = REGISTRY.build("data", options).load()
    if list(data_set.class_names) != network.class_names:
        raise CheckpointError(
            f"ckpt={path}: was trained on the classes {network.class_names}, the data has {list(data_set.class_names)}."
        )
    relaxes = has_relaxation(network)
    count, hard, relaxed, loss = 0, 0, 0, 0.0
    with torch.no_grad():
        for x, y in Batches(data_set.test, config["eval_batch_size"]):
            scores = network(x)
            count += len(y)
            hard += int((scores.argmax(dim=1) == y).sum())
            loss += float(F.cross_entropy(scores, y, reduction="sum"))
            if relaxes:
                with soft(network):
                    relaxed += int((network(x).argmax(dim=1) == y).sum())
    results = {"test/acc": hard / count, "test/loss": loss / count}
    if relaxes:
        results |= {"test/acc_soft": relaxed / count, "test/gap": (relaxed - hard) / count}
    return results
