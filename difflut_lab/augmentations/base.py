"""What the training loop may ask of an augmentation.

Shape letters: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor

from difflut_lab.errors import ConfigError


class Augmentation:
    """Base class of augmentations of whole batches, before anything is normalised.

    Its options are the annotated keyword parameters of its ``__init__``; beside them it may declare ``input_shape``,
    the shape of one sample, and refuse one that it does not fit with a ``ConfigError``, and ``num_classes``.
    """

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Changed samples and labels.

        Parameters
        ----------
        x : Tensor
            ``(B, *input_shape)``, in the data's own type, or in float32 where samples of integers were mixed before;
            not to be changed in place. What is returned is of the same type, or in float32 and in the same range of
            values, where it lies between integers.
        y : Tensor
            Labels: classes, int64 ``(B,)``; or how much of each class a sample is, floats ``(B, K)`` whose rows sum
            to 1, as what mixes samples returns them. An augmentation that mixes takes either, others pass them on.
        generator : Generator
            Source of randomness, on the CPU: a function of the run's seed, the epoch and the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply __call__(x, y, generator)")


def check_images(name: str, input_shape: Sequence[int]) -> None:
    """Refuse samples that are not images.

    Parameters
    ----------
    name : str
        Of the augmentation, for the message.
    input_shape : sequence of int
        Shape of a sample.

    Raises
    ------
    ConfigError
        If it is not ``(C, H, W)``.
    """
    if len(input_shape) != 3:
        raise ConfigError(f"{name}: needs images (channels, height, width); samples have shape {tuple(input_shape)}.")
