"""A way around a layer, for bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Shortcut(nn.Module):
    """A layer's outputs, and its inputs behind them, as further channels: bits stay bits.

    Parameters
    ----------
    layer : nn.Module
        Maps ``(B, C * H * W)`` to ``(B, T * H * W)``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(B, (T + C) * H * W)``, a transposed view, of inputs ``(B, C * H * W)``."""
        return torch.cat([self.layer(x).t(), x.t()]).t()
