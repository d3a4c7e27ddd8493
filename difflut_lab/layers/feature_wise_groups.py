"""Layers whose nodes each read one group of neighbouring inputs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import Generator, Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.layers.base import BaseLUTLayer
from difflut_lab.registry import register_layer
from difflut_lab.seeding import generator


def _check_num_groups(value: Any) -> Any:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is not None and value != "features" and not is_count:
        raise ValueError("must be a number of at least 1, features, or null")
    return value


NumGroups = Annotated[int | Literal["features"] | None, BeforeValidator(_check_num_groups)]


@register_layer("feature_wise_groups")
class FeatureWiseGroups(BaseLUTLayer):
    """The inputs are cut into groups of neighbours; a node reads inputs of one group only.

    Node j takes group j mod G, and there the (j div G)-th window of n inputs of a random permutation, wrapping. Groups
    with fewer than n inputs are padded with constant zeros.

    Parameters
    ----------
    *args, **kwargs
        As of ``BaseLUTLayer``.
    num_groups : int, "features" or None
        G; sizes differ by at most one. ``"features"`` makes one group of the bits of every raw feature. None stands
        for max(1, F // n).
    bits_per_feature : int, optional
        Bits that the encoder makes of a feature; known to the first layer of a network only.

    Attributes
    ----------
    indices : Tensor
        The wiring, int32 ``(N, n)``, a buffer.

    Raises
    ------
    ConfigError
        If there are more groups than inputs, or the features are not known here.
    """

    indices: Tensor

    def __init__(
        self, *args: Any, num_groups: NumGroups = None, bits_per_feature: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.num_groups = self._count_groups(num_groups, bits_per_feature)
        drawn = grouped_wiring(
            self.input_size, self.output_size, self.n, self.num_groups, generator(self.seed, "wiring")
        )
        self.register_buffer("indices", drawn)
        self._refresh()

    def wiring(self) -> Tensor:
        return self.indices

    def groups(self) -> Tensor:
        """The group of each input, int64 ``(F,)``, 0 to G - 1."""
        return group_of_inputs(self.input_size, self.num_groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"

    def _count_groups(self, num_groups: int | str | None, bits_per_feature: int | None) -> int:
        if num_groups is None:
            return max(1, self.input_size // self.n)
        if isinstance(num_groups, str):
            if num_groups != "features":
                raise ConfigError(f"num_groups={num_groups}: must be a number of at least 1, features, or null.")
            if bits_per_feature is None:
                raise ConfigError(
                    "num_groups=features: only the layer after the encoder knows which inputs are bits of one feature."
                )
            if bits_per_feature < 1 or self.input_size % bits_per_feature:
                raise ConfigError(
                    f"num_groups=features: {self.input_size} inputs are no multiple of {bits_per_feature} bits per "
                    "feature."
                )
            return self.input_size // bits_per_feature
        if not 1 <= num_groups <= self.input_size:
            raise ConfigError(f"num_groups={num_groups}: must be at least 1 and at most {self.input_size}, the inputs.")
        return num_groups


def group_of_inputs(num_inputs: int, num_groups: int) -> Tensor:
    """The group of each input, int64 ``(F,)``: neighbours, in groups whose sizes differ by at most one."""
    return torch.arange(num_inputs) * num_groups // num_inputs


def grouped_wiring(num_inputs: int, num_nodes: int, n: int, num_groups: int, generator: Generator) -> Tensor:
    """Draw a wiring in which every node reads one group of neighbouring inputs.

    Parameters
    ----------
    num_inputs, num_nodes, n, num_groups : int
        F, N, the inputs per node, and G.
    generator : Generator
        Source of randomness.

    Returns
    -------
    Tensor
        int32 ``(N, n)``, -1 for a constant 0.
    """
    group_of_input = group_of_inputs(num_inputs, num_groups)
    sizes = torch.bincount(group_of_input, minlength=num_groups)
    starts = sizes.cumsum(0) - sizes
    # sorting by group with random ties permutes every group by itself
    shuffled = torch.randperm(num_inputs, generator=generator)
    permuted = shuffled[group_of_input[shuffled].argsort(stable=True)]
    node = torch.arange(num_nodes)[:, None]
    slot = torch.arange(n)
    group, window = node % num_groups, node // num_groups
    size = sizes[group]
    indices = permuted[starts[group] + (window * n + slot) % size]
    return indices.masked_fill(slot >= size, -1).to(torch.int32)
