"""The check of augmentations.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from difflut_lab.augmentations import Augmentation
from difflut_lab.seeding import generator
from difflut_lab.testing import modules
from difflut_lab.testing.subject import Subject, shape_of, uniform

BATCH = 24
# the last batch of an epoch may be small
SMALL = (3, 1)
# what is drawn with a low probability shows in one of several batches
BATCHES = 5
# labels of a sample sum to 1, to rounding
SURE = 1e-4

Batch = tuple[Tensor, Tensor]


def check_augmentation(
    part: str | type[Augmentation], *, input_shape: Sequence[int] = (3, 32, 32), num_classes: int = 10, **options: Any
) -> None:
    """Check an augmentation: batches like those it is given, a function of them and of the generator.

    Parameters
    ----------
    part : str or type
        The registered name, or a subclass of ``Augmentation``.
    input_shape : sequence of int
        Shape of the samples that it is given, as uint8 from 0 to 255 and as float32 from 0 to 1.
    num_classes : int
        C, the classes of their labels.
    **options
        Options of the augmentation.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused, or the samples do not fit.
    """
    subject = Subject.of("augmentation", part, {}, options)
    handed = {"input_shape": tuple(input_shape), "num_classes": num_classes}
    subject = subject.providing(**{name: value for name, value in handed.items() if subject.asks_for(name)})
    subject.check_unknown_option()
    augmentation = subject.build()
    subject.require(
        isinstance(augmentation, Augmentation), "must be a subclass of difflut_lab.augmentations.Augmentation."
    )
    pixels = uniform(BATCH, *input_shape)
    labels = torch.arange(BATCH) % num_classes
    # as an augmentation before this one may leave them
    shares = functional.one_hot(labels, num_classes).float().lerp(torch.full((num_classes,), 1 / num_classes), 0.25)
    for x in ((256 * pixels).to(torch.uint8), pixels):
        drawn = [_augment(subject, augmentation, x, labels, seed, num_classes) for seed in range(BATCHES)]
        _check_draws(subject, augmentation, x, labels, drawn, num_classes)
        for batch in SMALL:
            _augment(subject, augmentation, x[:batch], labels[:batch], 0, num_classes)
        _, y = _augment(subject, augmentation, x, shares, 0, num_classes)
        subject.require(
            y.is_floating_point(), f"of labels that are parts of classes it makes classes, {y.dtype}. Pass them on."
        )
    for device in modules.devices():
        x, y = _augment(subject, augmentation, pixels.to(device), labels.to(device), 0, num_classes)
        subject.require(
            x.device.type == y.device.type == device,
            f"of a batch on {device} it gives samples on {x.device} and labels on {y.device}. Draw on the CPU, where "
            "the generator is, and move what was drawn to x.device.",
        )


def _augment(
    subject: Subject, augmentation: Augmentation, x: Tensor, labels: Tensor, seed: int, num_classes: int
) -> Batch:
    """An augmented batch, which must be one that can be trained on; what it was made of must be what it was."""
    kept, kept_labels = x.clone(), labels.clone()
    what = f"calling it with {x.dtype} samples {shape_of(x)}, labels and a generator"
    with subject.doing(what):
        batch = augmentation(x, labels, generator(seed, "augmentation"))
    subject.require(
        torch.equal(kept, x) and torch.equal(kept_labels, labels),
        "it changed the samples or the labels that it was given in place. Work on a copy.",
    )
    subject.require(
        isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch),
        f"{what} gave {type(batch).__name__}, not a tuple of two tensors, (x, y).",
    )
    samples, y = batch
    mixed = samples.dtype == torch.float32 and not x.is_floating_point()
    subject.require(
        samples.shape == x.shape and (samples.dtype == x.dtype or mixed),
        f"of samples {shape_of(x)} of {x.dtype} it gives {shape_of(samples)} of {samples.dtype}. Samples keep their "
        "shape and type, which encoders were fitted to; only what lies between integers is float32.",
    )
    lowest, highest = float(samples.min()), float(samples.max())
    subject.require(
        not mixed or (lowest >= float(x.min()) and 1 < highest <= float(x.max())),
        f"of samples of {x.dtype} from {float(x.min()):.4g} to {float(x.max()):.4g} it gives floats from {lowest:.4g} "
        f"to {highest:.4g}. Leave them in the range of the integers: they are scaled as those are.",
    )
    subject.require(bool(torch.isfinite(samples).all()), "its samples are not all finite.")
    _check_labels(subject, y, len(x), num_classes)
    return samples, y


def _check_labels(subject: Subject, y: Tensor, batch: int, num_classes: int) -> None:
    """Classes ``(B,)``, or how much of each class a sample is, ``(B, C)``."""
    said = f"of {batch} samples it gives labels {shape_of(y)} of {y.dtype}"
    if y.is_floating_point():
        subject.require(
            tuple(y.shape) == (batch, num_classes),
            f"{said}; parts of classes must have shape ({batch}, {num_classes}).",
        )
        subject.require(
            bool((y >= 0).all()) and bool(((y.sum(dim=1) - 1).abs() < SURE).all()),
            f"{said} whose rows are no parts of classes: they must be at least 0 and sum to 1; their sums reach from "
            f"{float(y.sum(dim=1).min()):.4g} to {float(y.sum(dim=1).max()):.4g}.",
        )
        return
    subject.require(
        tuple(y.shape) == (batch,) and y.dtype == torch.int64,
        f"{said}; they must be classes, int64 ({batch},), or parts of classes, floating ({batch}, {num_classes}).",
    )
    subject.require(bool(((y >= 0) & (y < num_classes)).all()), f"{said} that are not from 0 to {num_classes - 1}.")


def _check_draws(
    subject: Subject, augmentation: Augmentation, x: Tensor, labels: Tensor, drawn: Sequence[Batch], num_classes: int
) -> None:
    """What it gives is a function of the generator, and of nothing that it or another instance did before."""
    again = [(augmentation, seed) for seed in reversed(range(BATCHES))] + [(subject.build(), 0)]
    for instance, seed in again:
        subject.require(
            _equal(_augment(subject, instance, x, labels, seed, num_classes), drawn[seed]),
            "two calls with generators of one seed give different batches, so that no training could be repeated. "
            "Draw from generator only, and keep nothing from one call to the next.",
        )
    subject.require(
        not all(_equal(batch, drawn[0]) for batch in drawn[1:]),
        f"generators of {BATCHES} seeds give the same batch. Draw from generator.",
    )


def _equal(first: Batch, second: Batch) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))
