"""What the augmentations that mix samples have in common.

Shape letters: B batch, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional


def draw_partners(batch: int, generator: Generator, device: torch.device) -> Tensor:
    """Who each sample is mixed with: a permutation of the batch, int64 ``(B,)``."""
    return torch.randperm(batch, generator=generator).to(device)


def draw_shares(alpha: float, probability: float, batch: int, generator: Generator) -> Tensor:
    """What each sample keeps of itself, float32 ``(B,)`` on the CPU: 1, or with a probability Beta(alpha, alpha)."""
    # torch's sampler takes no generator
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    shares = torch.from_numpy(rng.beta(alpha, alpha, batch)).to(torch.float32)
    return torch.where(torch.rand(batch, generator=generator) < probability, shares, 1.0)


def mix_labels(y: Tensor, partners: Tensor, shares: Tensor, num_classes: int) -> Tensor:
    """Labels of mixed samples, float32 ``(B, K)``: how much of each class a sample is.

    Parameters
    ----------
    y : Tensor
        Classes, int64 ``(B,)``, or how much of each class a sample is, floats ``(B, K)``.
    partners : Tensor
        int64 ``(B,)``
    shares : Tensor
        What each sample has kept of itself, ``(B,)``.
    num_classes : int
        K.
    """
    labels = y if y.is_floating_point() else functional.one_hot(y, num_classes).to(torch.float32)
    return torch.lerp(labels[partners], labels, shares.to(labels).unsqueeze(1))
