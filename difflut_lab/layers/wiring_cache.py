"""Keeps what the ops derive from a wiring, for as long as the wiring stays what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflut_lab.ops import Wiring


class WiringCache:
    """The ops' form of an index tensor, whose inverse is made once and not in every backward.

    A change of the tensor is noticed by its identity and its version, and then by its content: assignment,
    ``.to(device)``, ``load_state_dict`` and writing in place. Code compiled by ``torch.compile`` sees identity only.
    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[Wiring, Tensor, int | None] | None = None

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
        rows = indices.flatten(0, -2)
        if torch.compiler.is_compiling():
            if self._kept is not None and self._kept[1] is indices:
                return self._kept[0]
            return Wiring(rows, num_inputs)
        # a tensor made in inference mode has no version
        version = None if indices.is_inference() else indices._version
        if self._kept is not None:
            wiring, source, known = self._kept
            if source is indices and version is not None and version == known:
                return wiring
            # distributed training writes every buffer anew in every step, mostly with what it was
            if wiring.indices.device == rows.device and torch.equal(wiring.indices, rows):
                self._kept = (wiring, indices, version)
                return wiring
        # what is kept must also serve a later forward that is differentiated
        with torch.inference_mode(False):
            wiring = Wiring(rows.clone(), num_inputs)
        self._kept = (wiring, indices, version)
        return wiring

    def __reduce__(self) -> tuple[Any, ...]:
        return WiringCache, ()
