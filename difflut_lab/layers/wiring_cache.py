"""Keeps what the ops derive from a wiring, for as long as the wiring stays what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflut_lab.ops import Wiring


class WiringCache:
    """The ops' form of an index tensor, whose inverse is made once and not in every backward.

    A change of the tensor is noticed by its identity and by its version: assignment, ``.to(device)``,
    ``load_state_dict`` and writing in place. Code compiled by ``torch.compile`` sees identity only. Copies and pickles
    start empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[Wiring, Tensor, int] | None = None

    def get(self, indices: Tensor, num_inputs: int) -> Wiring:
        """The wiring of an index tensor.

        Parameters
        ----------
        indices : Tensor
            int32 ``(N, n)``, or with more leading dimensions, which are flattened.
        num_inputs : int
            F, the number of inputs there are.

        Raises
        ------
        ValueError
            If an index is out of range or the dtype is another.
        """
        if self._kept is not None:
            wiring, source, version = self._kept
            if torch.compiler.is_compiling():
                unchanged = source is indices
            else:
                unchanged = source._version == version and (source is indices or _same(source, indices))
            if unchanged and wiring.num_inputs == num_inputs:
                return wiring
        if torch.compiler.is_compiling():
            return Wiring(indices.flatten(0, -2), num_inputs)
        if indices.is_inference():
            # what is kept must also serve a later forward that is differentiated
            with torch.inference_mode(False):
                indices = indices.clone()
        wiring = Wiring(indices.flatten(0, -2), num_inputs)
        self._kept = (wiring, indices, indices._version)
        return wiring

    def __reduce__(self) -> tuple[Any, ...]:
        return WiringCache, ()


def _same(first: Tensor, second: Tensor) -> bool:
    return first.device == second.device and torch.equal(first, second)
