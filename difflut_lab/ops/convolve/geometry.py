"""Where bytes lie in the images, panels and outputs of ``convolve``.

Shape letters: G groups of 16 pixels of a sample's output.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from difflut_lab.ops.ternary_linear import output_size
from difflut_lab.ops.ternary_linear.codes import WORD

# codes whose digits 64 bytes of words hold, four registers of them
CODES = 4 * 64


class Geometry(NamedTuple):
    """Where everything lies in images and outputs of a convolution."""

    planes: tuple[int, int]
    """Height and width of a part of a channel."""
    size: int
    """Bytes of an image."""
    offsets: np.ndarray
    """int32 ``(rows, 4)``: where what a code multiplies for the first pixel lies."""
    places: np.ndarray
    """int32 ``(rows,)``: where the bytes of four codes go in a panel."""
    valid: np.ndarray
    """int64 ``(G,)``: bits of the pixels of a group that are written."""
    start: np.ndarray
    """int64 ``(G,)``: the first of them."""


@functools.lru_cache(maxsize=1000)
def geometry(
    channels: int, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Geometry:
    """The geometry of a convolution of ``(C, *size)``."""
    planes = tuple(-(-(length + 2 * pad) // step) for length, pad, step in zip(size, padding, stride, strict=True))
    height, width = output_size(size, kernel, stride, padding)
    groups = -(-((height - 1) * planes[1] + width) // 16)
    end = channels * math.prod(stride) * math.prod(planes)
    codes = channels * math.prod(kernel)
    channel, i, j = np.unravel_index(np.arange(codes), (channels, *kernel))
    part = (channel * stride[0] + i % stride[0]) * stride[1] + j % stride[1]
    # behind the image there are zeros, for codes beyond the last
    offsets = np.full(-(-codes // CODES) * CODES, end, np.int32)
    offsets[:codes] = (part * planes[0] + i // stride[0]) * planes[1] + j // stride[1]
    # a register's code 16 g + 4 i + s is byte 4 g + i of shift s
    order = np.arange(len(offsets)).reshape(-1, 16, 4, 4).transpose(0, 3, 1, 2).reshape(-1, 4)
    # words' last codes have digits, too, while those of words that there are not are 0, whatever they multiply
    used = np.flatnonzero(order[:, 0] < -(-codes // WORD) * WORD)
    pixels = np.arange(16 * groups)
    inside = (pixels % planes[1] < width) & (pixels // planes[1] < height)
    valid = (inside.reshape(groups, 16) << np.arange(16)).sum(axis=1)
    start = np.cumsum(inside.reshape(groups, 16).sum(axis=1))
    return Geometry(
        planes=(planes[0], planes[1]),
        size=end + 16 * groups,
        offsets=offsets[order[used]],
        places=(64 * used).astype(np.int32),
        valid=valid,
        start=np.concatenate([[0], start[:-1]]),
    )
