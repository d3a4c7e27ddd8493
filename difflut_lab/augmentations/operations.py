"""The operations of RandAugment, on several images at once.

Each maps images ``(B, C, H, W)``, float32 with values from 0 to 255, and strengths ``(B,)`` from -1 to 1 to images. At
a strength of 1 they do what torchvision's RandAugment does at its largest magnitude, 30 of 30, and what the paper
(Cubuk et al., arXiv 1909.13719) does at 10.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

WHITE = 255.0
# of red, green and blue (ITU-R BT.601)
LUMA = (0.2989, 0.587, 0.114)
# what a pixel and each of its neighbours weigh where an image is smoothed
SMOOTH = (5 / 13, 1 / 13)
MAX_ANGLE, MAX_SHEAR, MAX_SHIFT = math.radians(30), 0.3, 150 / 331
MAX_BLEND = 0.9
MAX_BITS = 4


def identity(x: Tensor, strength: Tensor) -> Tensor:
    """The images as they are."""
    return x


def rotate(x: Tensor, strength: Tensor) -> Tensor:
    """Turned around the centre by up to 30 degrees."""
    sine, cosine = torch.sin(MAX_ANGLE * strength), torch.cos(MAX_ANGLE * strength)
    return _warp(x, [[cosine, -sine, 0], [sine, cosine, 0]])


def shear_x(x: Tensor, strength: Tensor) -> Tensor:
    """Rows shifted by up to 0.3 of their distance from the middle."""
    return _warp(x, [[1, MAX_SHEAR * strength, 0], [0, 1, 0]])


def shear_y(x: Tensor, strength: Tensor) -> Tensor:
    """Columns shifted by up to 0.3 of their distance from the middle."""
    return _warp(x, [[1, 0, 0], [MAX_SHEAR * strength, 1, 0]])


def translate_x(x: Tensor, strength: Tensor) -> Tensor:
    """Shifted to the side by up to 0.45 of the width."""
    return _warp(x, [[1, 0, MAX_SHIFT * strength * x.shape[3]], [0, 1, 0]])


def translate_y(x: Tensor, strength: Tensor) -> Tensor:
    """Shifted up or down by up to 0.45 of the height."""
    return _warp(x, [[1, 0, 0], [0, 1, MAX_SHIFT * strength * x.shape[2]]])


def brightness(x: Tensor, strength: Tensor) -> Tensor:
    """From a tenth of the brightness to nearly twice as bright."""
    return _blend(torch.zeros_like(x), x, strength)


def color(x: Tensor, strength: Tensor) -> Tensor:
    """From nearly grey to nearly twice as colourful; images of one channel stay as they are."""
    return _blend(_grey(x), x, strength)


def contrast(x: Tensor, strength: Tensor) -> Tensor:
    """From nearly even to nearly twice the contrast."""
    return _blend(_grey(x).mean(dim=(2, 3), keepdim=True), x, strength)


def sharpness(x: Tensor, strength: Tensor) -> Tensor:
    """From smoothed to sharpened; pixels at the border stay as they are."""
    if min(x.shape[2:]) < 3:
        return x
    kernel = x.new_full((1, 1, 3, 3), SMOOTH[1])
    kernel[0, 0, 1, 1] = SMOOTH[0]
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = (
        functional.conv2d(x.flatten(0, 1).unsqueeze(1), kernel).squeeze(1).unflatten(0, x.shape[:2])
    )
    return _blend(smooth, x, strength)


def posterize(x: Tensor, strength: Tensor) -> Tensor:
    """With 8 to 4 bits per value, the lower ones cut off."""
    step = 2.0 ** (MAX_BITS * strength.abs()).round().view(-1, 1, 1, 1)
    return torch.floor(x / step) * step


def solarize(x: Tensor, strength: Tensor) -> Tensor:
    """Inverted where values are above a threshold, the lower the stronger."""
    threshold = WHITE * (1 - strength.abs()).view(-1, 1, 1, 1)
    return torch.where(x >= threshold, WHITE - x, x)


def autocontrast(x: Tensor, strength: Tensor) -> Tensor:
    """Each channel stretched to the whole range, whatever the strength."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * (WHITE / (high - low).clamp(min=1e-3)), x).clamp(max=WHITE)


def equalize(x: Tensor, strength: Tensor) -> Tensor:
    """Each channel's values spread so that all are about as frequent, whatever the strength."""
    channels = x.flatten(0, 1).flatten(1)
    levels = channels.round().clamp(0, WHITE).to(torch.int64)
    counts = torch.zeros(len(levels), int(WHITE) + 1, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    # as in PIL: pixels per level of the result, those of the highest level left out
    step = ((counts.sum(dim=1) - counts.gather(1, levels.amax(dim=1, keepdim=True)).squeeze(1)) // 255).unsqueeze(1)
    below = counts.cumsum(dim=1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(1, levels).to(x.dtype), channels).view_as(x)


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    *(identity, rotate, shear_x, shear_y, translate_x, translate_y),
    *(brightness, color, contrast, sharpness, posterize, solarize, autocontrast, equalize),
)


def _warp(x: Tensor, rows: list[list[Tensor | float]]) -> Tensor:
    """Images whose pixels are read at other places, between pixels linearly, 0 outside.

    The rows say where from, in pixels from the centre: ``(x', y') = rows @ (x, y, 1)``.
    """
    height, width = x.shape[2:]
    # affine_grid measures both dimensions from -1 to 1
    units = x.new_tensor([[1, height / width, 2 / width], [width / height, 1, 2 / height]])
    theta = units.repeat(len(x), 1, 1)
    for index, row in enumerate(rows):
        for column, entry in enumerate(row):
            theta[:, index, column] *= entry
    grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False)


def _blend(base: Tensor, x: Tensor, strength: Tensor) -> Tensor:
    """From nearly the base, at -1, to nearly as much beyond the images, at 1."""
    share = (1 + MAX_BLEND * strength).view(-1, 1, 1, 1)
    return torch.lerp(base.expand_as(x), x, share).clamp(0, WHITE)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != len(LUMA):
        return x.mean(dim=1, keepdim=True)
    return (x * x.new_tensor(LUMA).view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
