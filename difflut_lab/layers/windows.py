"""Windows that slide over planes whose batch is innermost.

Shape letters: B batch, C channels, H and W height and width of a plane, k side of a window, Y and X windows below and
beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from difflut_lab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Square windows over a plane.

    A tap is a place in a window. What one tap sees over all windows is a slice of planes ``(C, H, W, B)``, in
    contiguous runs.
    """

    height: int
    width: int
    # of the plane

    size: int
    # k

    stride: int
    # from one window to the next

    padding: int = 0
    # rows and columns of zeros around the plane

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise ConfigError(
                f"a window of {self.size} x {self.size} does not fit into a plane of {self.height} x {self.width} "
                f"with padding={self.padding}."
            )

    @property
    def rows(self) -> int:
        """Y, windows below each other."""
        return (self.height + 2 * self.padding - self.size) // self.stride + 1

    @property
    def columns(self) -> int:
        """X, windows beside each other."""
        return (self.width + 2 * self.padding - self.size) // self.stride + 1

    @property
    def positions(self) -> int:
        """Y * X, windows in all."""
        return self.rows * self.columns

    @cached_property
    def taps(self) -> list[tuple[int, int]]:
        """The places (dy, dx) in a window, row by row, but for those that see nothing except padding."""
        along_y, along_x = (
            [offset for offset in range(self.size) if self._along(offset, windows, pixels) is not None]
            for windows, pixels in ((self.rows, self.height), (self.columns, self.width))
        )
        return [(dy, dx) for dy in along_y for dx in along_x]

    def views(self) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """For every tap: the windows in which it sees a pixel, and the pixels that it sees there."""
        for dy, dx in self.taps:
            below = self._along(dy, self.rows, self.height)
            beside = self._along(dx, self.columns, self.width)
            if below is not None and beside is not None:
                yield (below[0], beside[0]), (below[1], beside[1])

    def unfold(self, planes: Tensor, fill: float = 0.0) -> Tensor:
        """What the taps see, ``(C, taps, Y, X, B)``, of planes ``(C, H, W, B)``; ``fill`` in the padding."""
        shape = (len(planes), len(self.taps), self.rows, self.columns, planes.shape[3])
        seen = planes.new_full(shape, fill) if self.padding else planes.new_empty(shape)
        for tap, ((rows, columns), (y, x)) in enumerate(self.views()):
            seen[:, tap, rows, columns] = planes[:, y, x]
        return seen

    def fold(self, seen: Tensor) -> Tensor:
        """The transpose of ``unfold``: what the taps hold, summed per pixel in the order of the taps."""
        planes = seen.new_zeros(len(seen), self.height, self.width, seen.shape[4])
        for tap, ((rows, columns), (y, x)) in enumerate(self.views()):
            planes[:, y, x] += seen[:, tap, rows, columns]
        return planes

    def _along(self, offset: int, windows: int, pixels: int) -> tuple[slice, slice] | None:
        """In one direction: the windows whose tap at ``offset`` sees a pixel, and those pixels."""
        first = max(0, -((offset - self.padding) // self.stride))
        last = min(windows - 1, (pixels - 1 + self.padding - offset) // self.stride)
        if first > last:
            return None
        start = first * self.stride + offset - self.padding
        return slice(first, last + 1), slice(start, start + (last - first) * self.stride + 1, self.stride)
