"""Rectangles in images, one per image.

Shape letters: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inside(start: Tensor, lengths: Tensor, size: Sequence[int]) -> Tensor:
    """Which pixels lie in each image's rectangle, bool ``(B, 1, H, W)``; what reaches beyond the image is cut off.

    Parameters
    ----------
    start, lengths : Tensor
        First row and column, and height and width in pixels, int64 ``(B, 2)``.
    size : sequence of int
        H and W.
    """
    sides = []
    for dimension, length in enumerate(size):
        place = torch.arange(length, device=start.device)
        first = start[:, dimension, None]
        sides.append((place >= first) & (place < first + lengths[:, dimension, None]))
    rows, columns = sides
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
