"""Gradient stabilisation: the identity forward, a standardised gradient backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from difflut_lab.layers.layer_config import LayerConfig


def stabilized(gradient: Tensor, config: LayerConfig, feature_dim: int = 1) -> Tensor:
    """Standardise a gradient group by group: (g - m) * s / (std(g) + eps).

    A group is all elements (``layerwise``), one node, feature or channel over the batch and all positions
    (``nodewise``) or one sample (``batch``); m is its mean if ``grad_subtract_mean``, else 0; s is
    ``grad_target_std``; std is the population standard deviation. Groups of one element, and groups where
    std <= eps + 1e-6 * abs(mean), are left alone: what little they spread is rounding.

    Parameters
    ----------
    gradient : Tensor
        ``(B, N)``, or any shape that begins with the batch.
    config : LayerConfig
        The layer's configuration.
    feature_dim : int
        The dimension of nodes, features or channels.

    Returns
    -------
    Tensor
        The same shape, of the same dtype; statistics are computed in float32 at least.
    """
    alone = {"layerwise": None, "nodewise": feature_dim % gradient.dim(), "batch": 0}[config.grad_stabilization]
    dims = [dim for dim in range(gradient.dim()) if dim != alone]
    size = math.prod([gradient.shape[dim] for dim in dims])
    if size <= 1:
        return gradient
    values = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    mean = values.mean(dim=dims, keepdim=True)
    centred = values - mean
    # a norm is 15 times as fast as torch.std_mean on 256,000 elements, one thread
    std = torch.linalg.vector_norm(centred, dim=dims, keepdim=True) / math.sqrt(size)
    level = std <= config.grad_epsilon + 1e-6 * mean.abs()
    scale = torch.where(level, 1.0, config.grad_target_std / (std + config.grad_epsilon))
    if config.grad_subtract_mean:
        values = values - mean.masked_fill(level, 0)
    return (values * scale).to(gradient.dtype)


class _Stabilize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, config: LayerConfig, feature_dim: int) -> Tensor:
        ctx.config, ctx.feature_dim = config, feature_dim
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return stabilized(gradient, ctx.config, ctx.feature_dim), None, None


def stabilize(y: Tensor, config: LayerConfig, feature_dim: int = 1) -> Tensor:
    """The identity on a layer's output ``(B, N)``, or any that begins with B, whose gradient is ``stabilized``."""
    if config.grad_stabilization == "none" or not y.requires_grad:
        return y
    output: Tensor = _Stabilize.apply(y, config, feature_dim)
    return output
