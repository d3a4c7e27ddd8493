"""Which of several ways that give the same bits is taken: the one that was the fastest when it was tried."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# seconds that trying a way again may take, and how often it is tried at most
PATIENCE = 0.02
REPETITIONS = 5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was tried for calls of a kind."""

    what: str
    """The calls, such as ``"linear 1024 -> 1024, 17 to 32 tokens, 2 threads"``."""
    way: str
    """What computes them from now on."""
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    """The least that each way took; empty where there was nothing to choose."""

    def __str__(self) -> str:
        times = ", ".join(f"{way} {value:.3g} ms" for way, value in self.milliseconds.items())
        return f"{self.what}: {self.way}" + (f" ({times})" if times else "")


_trials: dict[Hashable, Trial] = {}


def explain() -> list[Trial]:
    """Which way computed packed layers so far in this process, for which shapes, and the times that decided it.

    Ways that were tried give the same bits: times decide how long a result takes, never what it is.

    Returns
    -------
    list of Trial
        One for each kind of call. ``for trial in explain(): print(trial)`` shows them.
    """
    return list(_trials.values())


def forget() -> None:
    """Try all ways again."""
    _trials.clear()


def tried(key: Hashable) -> str | None:
    """The way that was the fastest for calls of a kind, if any has been tried."""
    trial = _trials.get(key)
    return None if trial is None else trial.way


def attempt(key: Hashable, what: str, ways: Mapping[str, Callable[[], Tensor]]) -> str:
    """Try ways that give the same bits, and name the fastest from now on.

    Parameters
    ----------
    key : hashable
        What the fastest way depends on.
    what : str
        Of ``Trial``.
    ways : mapping
        Functions by name.
    """
    if len(ways) == 1:
        _trials[key] = Trial(what=what, way=next(iter(ways)))
        return _trials[key].way
    # the first call of a way compiles it, finds its memory, and is not counted
    for way in ways.values():
        way()
    seconds = {name: _measure(way) for name, way in ways.items()}
    for _ in range(REPETITIONS - 1):
        for name, way in ways.items():
            if seconds[name] < PATIENCE:
                seconds[name] = min(seconds[name], _measure(way))
    times = {name: 1e3 * value for name, value in seconds.items()}
    _trials[key] = Trial(what=what, way=min(times, key=times.__getitem__), milliseconds=times)
    return _trials[key].way


def _measure(way: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start
