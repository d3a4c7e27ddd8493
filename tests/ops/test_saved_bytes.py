"""What the ops keep in memory from forward to backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from difflut_lab.ops import Flips, Wiring, efd_table, interpolate, lookup, route, use_kernels

INPUTS, NODES, FAN_IN = 1568, 2000, 6
MIB = 1 << 20
# the products that the two halves of the inputs leave behind in eager mode, at a batch of 128
EAGER = 48 * MIB


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    yield
    use_kernels("auto")


def saved(forward: Callable[[], Tensor], *apart: Tensor) -> int:
    """Bytes of the storages that a forward keeps, but those of some tensors, each counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward()
    assert y.requires_grad
    for tensor in apart:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


class Bank:
    """A layer's arguments."""

    def __init__(self, batch: int, flips: bool) -> None:
        self.x = torch.rand(INPUTS, batch).t().requires_grad_()
        self.table = torch.rand(NODES, 2**FAN_IN, requires_grad=True)
        self.slope = efd_table(self.table.detach())
        self.wiring = Wiring(torch.randint(INPUTS, (NODES, FAN_IN), dtype=torch.int32), INPUTS)
        self.flips = Flips(0.1, 1, torch.tensor(0)) if flips else None
        self.parameters = (self.table, self.wiring.indices, *self.wiring.inverse)

    def interpolate(self) -> Tensor:
        return interpolate(self.x, self.table, self.wiring, self.flips)

    def lookup(self) -> Tensor:
        return lookup(self.x, self.table, self.slope, self.wiring, self.flips)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("batch", [128, 1024])
def test_bytes_per_sample_and_node(kernels: str, flips: bool, batch: int) -> None:
    use_kernels(kernels)
    bank = Bank(batch, flips)
    samples = batch * NODES
    # the input is the output of the layer below, which is in memory anyway
    beside_input = saved(bank.interpolate, bank.x, *bank.parameters)
    assert beside_input == (samples * FAN_IN // 8 if flips else 0)
    assert saved(bank.interpolate, *bank.parameters) == beside_input + 4 * batch * INPUTS
    # an address, and nothing of the input
    assert saved(bank.lookup, bank.slope, *bank.parameters) == samples


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_a_twentieth_of_what_eager_products_take(kernels: str) -> None:
    use_kernels(kernels)
    bank = Bank(128, flips=True)
    assert saved(bank.interpolate) <= EAGER / 20
    # the table of input gradients does not grow with the batch
    assert saved(bank.lookup, bank.slope) <= EAGER / 20
    assert bank.slope.nbytes == 4 * NODES * FAN_IN * 2**FAN_IN


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_routing_keeps_its_input_only(kernels: str) -> None:
    use_kernels(kernels)
    x = torch.rand(INPUTS, 64).t().requires_grad_()
    scores = torch.randn(40, FAN_IN, 16, requires_grad=True)
    candidates = torch.randint(INPUTS, scores.shape, dtype=torch.int32)
    assert saved(lambda: route(x, scores, candidates), x, scores, candidates) == 0
