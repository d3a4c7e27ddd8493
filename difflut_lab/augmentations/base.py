"""What the training loop may ask of an augmentation."""

from __future__ import annotations

from torch import Generator, Tensor


class Augmentation:
    """Base class of augmentations of whole batches, before anything is normalised.

    Its options are the annotated keyword parameters of its ``__init__``; beside them it may declare ``input_shape``,
    the shape of one sample, and refuse one that it does not fit with a ``ConfigError``.
    """

    def __call__(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Changed samples and labels.

        Parameters
        ----------
        x : Tensor
            ``(B, *input_shape)``, in the data's own type; not to be changed in place.
        y : Tensor
            Labels, int64 ``(B,)``.
        generator : Generator
            Source of randomness, on the CPU: a function of the run's seed, the epoch and the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must supply __call__(x, y, generator)")
