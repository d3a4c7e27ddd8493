"""Pooling of bits: a window is 1 where any of its bits is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from difflut_lab.errors import ConfigError
from difflut_lab.layers.windows import Windows


class OrPool(nn.Module):
    """The greatest value in each window of a plane: the OR of bits (Petersen et al., arXiv 2411.04732).

    The gradient goes to the inputs that hold that value, in equal parts where there are several. Pixels beyond the
    last whole window are not read.

    Parameters
    ----------
    input_shape : tuple of int
        (C, H, W).
    window : int
        Side of a window.
    stride : int, optional
        Step from one window to the next; None for ``window``.

    Attributes
    ----------
    output_shape : tuple of int
        (C, height, width).

    Raises
    ------
    ConfigError
        If the window does not fit the planes.
    """

    def __init__(self, input_shape: tuple[int, int, int], window: int = 2, stride: int | None = None) -> None:
        super().__init__()
        for name, size in (("window", window), ("stride", window if stride is None else stride)):
            if size < 1:
                raise ConfigError(f"or_pool: {name}={size}: must be at least 1.")
        channels, height, width = input_shape
        try:
            self.windows = Windows(height=height, width=width, size=window, stride=stride or window)
        except ConfigError as error:
            raise ConfigError(f"or_pool: {error}") from None
        self.input_shape = input_shape
        self.output_shape = (channels, self.windows.rows, self.windows.columns)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(B, C * height * width)``, a transposed view, of inputs ``(B, C * H * W)``.

        Raises
        ------
        ValueError
            If the shape of x is another.
        """
        if x.dim() != 2 or x.shape[1] != math.prod(self.input_shape):
            raise ValueError(
                f"OrPool expects inputs of shape (batch, {math.prod(self.input_shape)}), got {tuple(x.shape)}."
            )
        pooled: Tensor = _Greatest.apply(x.t().contiguous().view(*self.input_shape, len(x)), self.windows)
        return pooled.flatten(0, 2).t()

    def extra_repr(self) -> str:
        return (
            f"input_shape={self.input_shape}, output_shape={self.output_shape}, window={self.windows.size}, "
            f"stride={self.windows.stride}"
        )


class _Greatest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, planes: Tensor, windows: Windows) -> Tensor:
        taps = [planes[:, y, x] for _, (y, x) in windows.views()]
        greatest = taps[0].clone(memory_format=torch.contiguous_format)
        for tap in taps[1:]:
            torch.maximum(greatest, tap, out=greatest)
        ctx.windows = windows
        ctx.save_for_backward(planes, greatest)
        return greatest

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        planes, greatest = ctx.saved_tensors
        views = [view for _, view in ctx.windows.views()]
        # in place and without bools: three times as fast
        holders, holds = torch.zeros_like(greatest), torch.empty_like(greatest)
        for y, x in views:
            holders += torch.eq(planes[:, y, x], greatest, out=holds)
        share = gradient / holders
        result = torch.zeros_like(planes)
        for y, x in views:
            torch.eq(planes[:, y, x], greatest, out=holds)
            result[:, y, x].addcmul_(share, holds)
        return result, None
