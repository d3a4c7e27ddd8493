"""Layers whose wiring is drawn at random and fixed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.layers.base import BaseLUTLayer
from difflut_lab.registry import register_layer
from difflut_lab.seeding import generator


@register_layer("random_routing")
class RandomRouting(BaseLUTLayer):
    """Every node reads n distinct inputs; over the layer every input is used before any is used twice.

    Parameters
    ----------
    *args, **kwargs
        As of ``BaseLUTLayer``.

    Attributes
    ----------
    indices : Tensor
        The wiring, int32 ``(N, n)``, a buffer.

    Raises
    ------
    ConfigError
        If there are fewer inputs than a node reads.
    """

    indices: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        drawn = balanced_wiring(self.input_size, self.output_size, self.n, generator(self.seed, "wiring"))
        self.register_buffer("indices", drawn)
        self._refresh()

    def wiring(self) -> Tensor:
        return self.indices


def balanced_wiring(num_inputs: int, num_nodes: int, n: int, generator: Generator) -> Tensor:
    """Draw a wiring in which no node reads an input twice and no input is used more than once oftener than another.

    Parameters
    ----------
    num_inputs, num_nodes, n : int
        F, N and the inputs per node.
    generator : Generator
        Source of randomness.

    Returns
    -------
    Tensor
        int32 ``(N, n)``.

    Raises
    ------
    ConfigError
        If n is greater than F.
    """
    if n > num_inputs:
        raise ConfigError(
            f"random_routing: each node reads n={n} distinct inputs, but the layer has only {num_inputs}."
        )
    rounds = math.ceil(num_nodes * n / num_inputs)
    # every round is a permutation of all inputs; nodes take n after n from the rounds laid end to end
    draws = torch.rand(rounds, num_inputs, dtype=torch.float64, generator=generator)
    flat: list[int] = draws.argsort(dim=1).flatten().tolist()
    for start in range(num_inputs, num_nodes * n, num_inputs):
        # a node across two rounds may meet an input again: exchange it within the later round
        first = start - start % n
        end = first + n if first < start else start
        seen = set(flat[first:start])
        spare = end
        for slot in range(start, end):
            if flat[slot] in seen:
                while flat[spare] in seen:
                    spare += 1
                flat[slot], flat[spare] = flat[spare], flat[slot]
                spare += 1
    return torch.tensor(flat[: num_nodes * n], dtype=torch.int32).view(num_nodes, n)
