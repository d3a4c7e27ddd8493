from __future__ import annotations

import time

import pytest
import torch

from difflut_lab.errors import ConfigError
from difflut_lab.layers import RandomRouting
from difflut_lab.layers.random_routing import balanced_wiring
from difflut_lab.seeding import generator

SHAPES = [(6, 10, 6), (7, 500, 6), (10, 33, 4), (13, 40, 12), (100, 10, 6), (64, 64, 1), (5, 7, 3), (1568, 2000, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_are_distinct_and_evenly_used(shape: tuple[int, int, int]) -> None:
    inputs, nodes, n = shape
    for seed in range(3):
        wiring = balanced_wiring(inputs, nodes, n, generator(seed))
        assert wiring.dtype == torch.int32 and wiring.shape == (nodes, n)
        ordered = wiring.sort(dim=1).values
        assert (ordered[:, 1:] != ordered[:, :-1]).all()
        used = torch.bincount(wiring.flatten(), minlength=inputs)
        assert len(used) == inputs and used.max() - used.min() <= 1
        # before any input is used twice, every one was used once
        first_round = wiring.flatten()[:inputs]
        assert len(first_round.unique()) == len(first_round)


def test_any_input_goes_anywhere() -> None:
    """Repairing nodes across two rounds leaves no input out of any place."""
    wirings = torch.stack([balanced_wiring(7, 3, 5, generator(seed)) for seed in range(3000)])
    counts = torch.stack([torch.bincount(place, minlength=7) for place in wirings.flatten(1).t()])
    # five standard deviations of a binomial count, and a little for the repair
    assert (counts - 3000 / 7).abs().max() < 110


def test_more_slots_than_inputs() -> None:
    with pytest.raises(ConfigError, match="each node reads n=6 distinct inputs, but the layer has only 4"):
        RandomRouting(4, 10)


def test_wiring_is_a_buffer() -> None:
    layer = RandomRouting(20, 10, n=3)
    assert torch.equal(layer.state_dict()["indices"], layer.wiring())
    state = layer.state_dict()
    assert layer.to("meta").wiring().device.type == "meta"
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer.wiring(), state["indices"])


def test_large_layers_are_drawn_quickly() -> None:
    for inputs in (16, 1000, 100_000):
        start = time.perf_counter()
        balanced_wiring(inputs, 100_000, 6, generator(0))
        # about 0.5 s where nothing else runs
        assert time.perf_counter() - start < 20
