"""How a value of a part, such as a temperature, moves over the epochs of a training.

Epochs count from 0 here; E is the number of epochs that a schedule takes.
"""

from __future__ import annotations

import math

from difflut_lab.errors import ConfigError
from difflut_lab.registry import register_schedule
from difflut_lab.schema import NonNegativeFloat, PositiveFloat, PositiveInt


class Schedule:
    """A value that goes from ``start``, in the first epoch, to ``end``, in epoch E and all that follow.

    It changes between epochs and is a function of the epoch alone, so that a continued training goes on as if it had
    not stopped. A subclass supplies ``between``.

    Parameters
    ----------
    end : float
        The last value, at least 0.
    start : float, optional
        The first value, at least 0; None for the one that the part is configured with.
    epochs : int, optional
        E; None for all epochs of the training. With one epoch the value is ``end`` at once.
    """

    def __init__(
        self, *, end: NonNegativeFloat, start: NonNegativeFloat | None = None, epochs: PositiveInt | None = None
    ) -> None:
        self.end = end
        self.start = start
        self.epochs = epochs

    def between(self, start: float, end: float, progress: float) -> float:
        """The value at a progress of 0 (``start``) to 1 (``end``)."""
        raise NotImplementedError(f"{type(self).__name__} must supply between(start, end, progress)")

    def value(self, epoch: int, *, start: float, epochs: int) -> float:
        """The value during an epoch.

        Parameters
        ----------
        epoch : int
            The epoch, from 0.
        start : float
            Taken where the schedule has no start of its own.
        epochs : int
            E, taken where the schedule has none of its own.
        """
        start = start if self.start is None else self.start
        epochs = epochs if self.epochs is None else self.epochs
        if epoch >= epochs - 1:
            return self.end
        return self.between(start, self.end, epoch / (epochs - 1))


@register_schedule("linear")
class Linear(Schedule):
    """Equal steps: start + (end - start) * p at progress p."""

    def between(self, start: float, end: float, progress: float) -> float:
        return start + (end - start) * progress


@register_schedule("cosine")
class Cosine(Schedule):
    """Half a cosine, slow at both ends: end + (start - end) * (1 + cos(pi p)) / 2 at progress p.

    The form of Loshchilov and Hutter, SGDR (arXiv 1608.03983), without restarts.
    """

    def between(self, start: float, end: float, progress: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@register_schedule("exponential")
class Exponential(Schedule):
    """Equal factors: start * (end / start)^p at progress p, as temperatures are usually annealed.

    Parameters
    ----------
    end, start, epochs
        As of ``Schedule``; values are greater than 0.
    """

    def __init__(
        self, *, end: PositiveFloat, start: PositiveFloat | None = None, epochs: PositiveInt | None = None
    ) -> None:
        super().__init__(end=end, start=start, epochs=epochs)

    def between(self, start: float, end: float, progress: float) -> float:
        if start <= 0:
            raise ConfigError(f"exponential: a schedule cannot start at {start:g}, which no factor leads away from.")
        return start * (end / start) ** progress
