"""Class scores by counting bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from difflut_lab import schema
from difflut_lab.errors import ConfigError
from difflut_lab.registry import REGISTRY, register_head
from difflut_lab.schema import PositiveFloat


@register_head("group_sum")
class GroupSum(nn.Module):
    """The inputs are cut into one contiguous group per class; a class's score is the sum of its group over tau.

    Parameters
    ----------
    input_size : int
        N, the outputs of the last layer; a multiple of the classes.
    num_classes : int
        C.
    tau : float
        Temperature of the scores.
    learnable_tau : bool
        Whether the temperature is trained, from tau on. What is trained is its logarithm, ``log_tau``, so that it
        stays positive; no schedule can move it then.

    Raises
    ------
    ConfigError
        If input_size is not a multiple of num_classes.
    """

    SCHEDULABLE: tuple[str, ...] = ("tau",)

    def __init__(
        self, input_size: int, num_classes: int, *, tau: PositiveFloat = 1.0, learnable_tau: bool = False
    ) -> None:
        super().__init__()
        schema.validate(GroupSum, {"tau": tau}, "head", REGISTRY.provided("head"))
        if num_classes < 1 or input_size < 1 or input_size % num_classes:
            raise ConfigError(
                f"group_sum: input_size={input_size} must be a multiple of the {num_classes} classes, "
                "so that every class has as many bits as any other."
            )
        self.input_size = input_size
        self.num_classes = num_classes
        self.tau = tau
        self.learnable_tau = learnable_tau
        if learnable_tau:
            self.log_tau = nn.Parameter(torch.tensor(math.log(tau)))
            self.SCHEDULABLE = ()

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``(B, C)`` of bits ``(B, N)``.

        Raises
        ------
        ValueError
            If the shape of x is another.
        """
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"GroupSum expects inputs of shape (batch, {self.input_size}), got {tuple(x.shape)}.")
        # bfloat16 holds no count above 256
        dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.get_default_dtype()
        groups = x.t().reshape(self.num_classes, self.input_size // self.num_classes, len(x))
        return groups.sum(dim=1, dtype=dtype).t() / (self.log_tau.exp() if self.learnable_tau else self.tau)

    def extra_repr(self) -> str:
        tau = f"{self.log_tau.exp().item():.4g} (learnable)" if self.learnable_tau else self.tau
        return f"input_size={self.input_size}, num_classes={self.num_classes}, tau={tau}"
