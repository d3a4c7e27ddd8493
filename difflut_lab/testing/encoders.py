"""The check of encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflut_lab.encoders import Encoder
from difflut_lab.testing import modules
from difflut_lab.testing.subject import Subject, bits, normal, only_bits, shape_of

SAMPLES = 200


def check_encoder(part: str | type[Encoder], *, input_size: int = 12, **options: Any) -> None:
    """Check an encoder: fitted on training data it gives bits, the same after a checkpoint, alike in every mode.

    Parameters
    ----------
    part : str or type
        The registered name, or a subclass of ``Encoder``.
    input_size : int
        F, the features of the data that it is fitted to.
    **options
        Options of the encoder.

    Raises
    ------
    AssertionError
        Says which contract is broken, where, and how to mend it.
    ConfigError
        If an option is refused.
    """
    subject = Subject.of("encoder", part, {"input_size": input_size}, options)
    if subject.asks_for("input_shape"):
        # two channels, where the features can be shared out
        subject = subject.providing(input_shape=(2, input_size // 2) if input_size % 2 == 0 else (input_size,))
    subject.check_unknown_option()
    encoder = subject.build()
    subject.require(isinstance(encoder, Encoder), "must be a subclass of difflut_lab.encoders.Encoder.")
    data = _data(input_size)
    x = data[:40]
    before = _before_fit(subject, encoder, x)
    _fit(subject, encoder, data)
    y = modules.run(subject, "a forward", encoder, x).detach()
    _check_bits(subject, encoder, x, y)
    subject.require(
        before is None or torch.equal(before, y),
        "before fit(x) it gave bits that mean nothing. Raise a RuntimeError there, as "
        "difflut_lab.encoders.ThresholdEncoder does, until thresholds were fitted or loaded.",
    )
    shaped = modules.run(subject, "a forward of images, (B, 1, F),", encoder, x.unsqueeze(1))
    subject.require(
        torch.equal(shaped, y),
        "features of shape (B, 1, F) give other bits than features (B, F). Begin with x.flatten(1).",
    )
    modules.check_registered_tensors(subject, encoder)
    trained = modules.run(subject, "a forward in training mode", encoder.train(), x).detach()
    evaluated = modules.check_evaluates(subject, encoder, x)
    subject.require(torch.equal(trained, evaluated), "its bits are others in training mode than in eval mode.")
    again = subject.build()
    _fit(subject, again, data)
    subject.require(
        torch.equal(modules.run(subject, "a forward", again, x), y),
        "fitted twice to the same data, it gives other bits. Draw everything random from a generator of its own, "
        'difflut_lab.seeding.generator(seed, "purpose"), with an option seed.',
    )
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        modules.train(subject, encoder, x, reaches_input=False)
        _check_bits(subject, encoder, x, modules.run(subject, "a forward in eval mode", encoder.eval(), x).detach())
    modules.check_schedulable(subject, encoder)
    modules.check_round_trip(subject, encoder, subject.build().eval(), x, {"in eval mode": modules.call})
    modules.check_moves(subject, encoder, x, trains=False)


def _data(features: int) -> Tensor:
    """Training data ``(S, F)`` such as there is: features of all sizes, one of few values, one that never changes."""
    x = normal(SAMPLES, features) * torch.logspace(-1, 1, features)
    if features > 1:
        x[:, 1] = bits(SAMPLES)
    if features > 2:
        x[:, 2] = 0
    return x


def _before_fit(subject: Subject, encoder: Encoder, x: Tensor) -> Tensor | None:
    """Bits of an encoder that was not fitted; None where it refuses to give any, as it should if it needs to be."""
    try:
        output: Tensor = encoder(x)
    except Exception as error:
        subject.require(
            isinstance(error, RuntimeError) and "fit" in str(error),
            f"a forward before fit(x) raised {type(error).__name__}: {error}. Raise a RuntimeError that says to call "
            "fit(x) or load a state_dict, as difflut_lab.encoders.ThresholdEncoder does.",
        )
        return None
    return output


def _fit(subject: Subject, encoder: Encoder, data: Tensor) -> None:
    before = data.clone()
    with subject.doing("fit(x)"):
        encoder.fit(data)
    subject.require(torch.equal(before, data), "fit(x) changed the training data in place. Work on a copy.")


def _check_bits(subject: Subject, encoder: Encoder, x: Tensor, y: Tensor) -> None:
    subject.require(
        tuple(y.shape) == (len(x), encoder.output_size),
        f"of features {shape_of(x)} its bits have shape {shape_of(y)}; its output_size says "
        f"({len(x)}, {encoder.output_size}). Layers are built from output_size.",
    )
    subject.require(
        encoder.output_size == encoder.input_size * encoder.bits_per_feature,
        f"output_size is {encoder.output_size}, but {encoder.input_size} features of {encoder.bits_per_feature} bits "
        f"each (bits_per_feature) make {encoder.input_size * encoder.bits_per_feature}.",
    )
    subject.require(
        only_bits(y),
        f"its outputs are no bits, they reach from {float(y.min()):.4g} to {float(y.max()):.4g}. Compare with "
        "thresholds: (x > threshold).to(x.dtype).",
    )
    subject.require(y.dtype == x.dtype, f"its bits are {y.dtype} for features of {x.dtype}. Finish with .to(x.dtype).")
    subject.require(
        bool((y != y[:1]).any()),
        "every sample gives the same bits, so that nothing of the features is left. Fit thresholds in fit(x).",
    )
