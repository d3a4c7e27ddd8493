"""The check of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from difflut_lab import schema
from difflut_lab.layers import LayerConfig
from difflut_lab.models import Model
from difflut_lab.registry import REGISTRY
from difflut_lab.testing import modules
from difflut_lab.testing.nodes import relaxed
from difflut_lab.testing.subject import Subject, shape_of, uniform

BATCH = 32
# parts of the groups that a model asks for, where none are given
GROUPS: Mapping[str, Mapping[str, Any]] = {
    "encoder": {"name": "thermometer"},
    "layer": {"name": "random_routing"},
    "node": {"name": "probabilistic"},
    "head": {"name": "group_sum"},
}


def check_model(
    part: str | type[Model],
    *,
    input_shape: tuple[int, ...] = (8, 8),
    num_classes: int = 10,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Check a model: raw features to class scores; it trains, repeats, and a checkpoint holds all of it.

    Parameters
    ----------
    part : str or type
        The registered name, or a subclass of ``Model``.
    input_shape, num_classes : tuple of int, int
        Shape of a sample, and C.
    groups : mapping, optional
        Parts that it is assembled from, by group: ``{"layer": {"name": "random_routing"}}``; simple ones are taken for
        groups that it asks for and that are not given.
    **options
        Options of the model.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused.
    """
    target = REGISTRY.get("model", part) if isinstance(part, str) else part
    declared = schema.options(target)
    provided: dict[str, Any] = {"input_shape": input_shape, "num_classes": num_classes, "seed": 42}
    for kind in (*GROUPS, *(groups or {})):
        if kind in declared and kind != "layer_config":
            provided[kind] = schema.validate_part(kind, (groups or {}).get(kind, GROUPS.get(kind, {})), kind)
    provided["layer_config"] = schema.validate(LayerConfig, (groups or {}).get("layer_config", {}), "layer_config")
    provided = {name: value for name, value in provided.items() if name in declared}
    subject = Subject.of("model", part, provided, options)
    subject.check_unknown_option()
    x = uniform(BATCH, *input_shape)

    def calibrated() -> Model:
        model: Model = subject.build()
        subject.require(isinstance(model, Model), "must be a subclass of difflut_lab.models.Model.")
        with subject.doing("calibrate(x)"):
            model.calibrate(x)
        return model

    def loss(scores: Tensor, step: int) -> Tensor:
        return nn.functional.cross_entropy(scores, (torch.arange(BATCH) + step) % num_classes)

    model = calibrated()
    scores = modules.run(subject, "a forward", model, x)
    subject.require(
        tuple(scores.shape) == (BATCH, num_classes),
        f"of features {shape_of(x)} its scores have shape {shape_of(scores)}; they must be ({BATCH}, {num_classes}).",
    )
    modules.train(subject, model, x, loss=loss, reaches_input=False)
    modules.check_registered_tensors(subject, model)
    modules.check_evaluates(subject, model, x)
    modules.check_repeats(subject, calibrated, x, loss=loss, reaches_input=False)
    settled = {"in eval mode": modules.call, "evaluated softly": relaxed}
    # neither calibrated nor of the same seed: what a checkpoint holds must do
    fresh = subject.build(**({"seed": 43} if "seed" in provided else {}))
    modules.check_round_trip(subject, model.eval(), fresh.eval(), x, settled, " with another seed")
