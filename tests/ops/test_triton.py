"""The Triton kernels, in the interpreter, against the reference in float64.

On a machine with a GPU, TRITON_INTERPRET=0 runs the same tests on it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from difflut_lab.ops import Flips, Wiring, efd_table, interpolate, lookup
from difflut_lab.ops.flips import Draw
from difflut_lab.ops.interpolate import reference as soft_reference
from difflut_lab.ops.interpolate import triton as soft
from difflut_lab.ops.kernel.triton import declines
from difflut_lab.ops.lookup import reference as hard_reference
from difflut_lab.ops.lookup import triton as hard

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
INPUTS = 10

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU")

# n, N, B, offset of the first sample or None for no flips, routed
CASES = [
    (1, 1, 1, None, False),
    (1, 33, 3, 7, False),
    (2, 33, 127, 13, False),
    (3, 5, 3, None, True),
    (4, 5, 127, 0, False),
    (5, 1, 127, None, False),
    (6, 33, 127, None, False),
    (6, 33, 3, 2**33 + 5, True),
    (7, 5, 1, 3, False),
    (8, 5, 127, None, False),
    (8, 1, 3, 6, True),
]
THRESHOLD = 20000


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Bank:
    """Arguments of both backends, in float32, and the same values in float64."""

    def __init__(
        self, n: int, num_nodes: int, batch: int, offset: int | None, routed: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        self.n = n
        indices = torch.randint(-1, INPUTS, (num_nodes, n), dtype=torch.int32, device=DEVICE)
        indices[0] = 3
        wiring = Wiring(indices, INPUTS)
        self.padded = wiring.padded and not routed
        self.indices = None if routed else indices
        self.inverse = None if routed else wiring.inverse
        x = torch.rand(batch, num_nodes * n if routed else INPUTS, device=DEVICE) * 1.4 - 0.2
        self.x = x.masked_fill(torch.rand(x.shape, device=DEVICE) < 0.1, -torch.inf).to(dtype)
        self.table = torch.randn(num_nodes, 2**n, device=DEVICE)
        self.gradient = torch.randn(batch, num_nodes, device=DEVICE).to(dtype)
        self.slope = efd_table(self.table)
        step = torch.tensor(2**40 + 4, device=DEVICE)
        # words of the key with and without the highest bit
        self.draw = None if offset is None else Draw(step, THRESHOLD, 0x71234567_FEDCBA98, 2, offset)
        self.packed: Any = None
        if self.draw is not None:
            self.packed = self.draw.packed(num_nodes, n, batch, DEVICE)

    def soft(self, module: ModuleType, dtype: torch.dtype) -> tuple[Any, ...]:
        """Output and gradients of interpolate."""
        x, table, gradient = (t.to(dtype) for t in (self.x, self.table, self.gradient))
        y, packed = module.forward(x, table, self.n, self.indices, self.padded, self.draw)
        if self.draw is not None:
            assert torch.equal(packed, self.packed)
        offset = 0 if self.draw is None else self.draw.sample_offset
        return y, *module.backward(
            gradient, x, table, self.n, self.indices, self.padded, self.inverse, packed, offset, True, True
        )

    def hard(self, module: ModuleType, dtype: torch.dtype) -> tuple[Any, ...]:
        """Output, addresses and gradients of lookup."""
        table, slope, gradient = (t.to(dtype) for t in (self.table, self.slope, self.gradient))
        y, address = module.forward(self.x, table, self.n, self.indices, self.padded, self.draw)
        return y, address, *module.backward(gradient, address, table.shape[1], slope, self.inverse, True, True)


def assert_near(got: Tensor | None, want: Tensor | None, tolerance: float) -> None:
    """The largest error is a fraction of the largest value."""
    assert got is not None and want is not None
    assert got.shape == want.shape
    assert float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_interpolate_equals_the_reference(case: Any) -> None:
    bank = Bank(*case)
    for got, want in zip(bank.soft(soft, torch.float32), bank.soft(soft_reference, torch.float64), strict=True):
        assert_near(got, want, 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_lookup_equals_the_reference(case: Any) -> None:
    bank = Bank(*case)
    y, address, *gradients = bank.hard(hard, torch.float32)
    wanted_y, wanted_address, *wanted = bank.hard(hard_reference, torch.float64)
    assert torch.equal(y.double(), wanted_y)
    assert torch.equal(address, wanted_address)
    for got, want in zip(gradients, wanted, strict=True):
        assert_near(got, want, 1e-5)


def test_one_node_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import Config

    for module in (soft, hard):
        for name in ("evaluate", "differentiate_inputs", "differentiate_table", "sum_inputs"):
            if hasattr(module, name):
                monkeypatch.setattr(getattr(module, name), "configs", [Config({"NODES": 1, "GROUPS": 4})])
    bank = Bank(4, 3, 35, 3, False)
    for got, want in zip(bank.soft(soft, torch.float32), bank.soft(soft_reference, torch.float64), strict=True):
        assert_near(got, want, 1e-5)
    for got, want in zip(bank.hard(hard, torch.float32), bank.hard(hard_reference, torch.float64), strict=True):
        assert_near(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    bank = Bank(6, 33, 127, 5, False, dtype)
    x, gradient = bank.x, bank.gradient
    y, packed = soft.forward(x, bank.table, 6, bank.indices, bank.padded, bank.draw)
    gradients = soft.backward(
        gradient, x, bank.table, 6, bank.indices, bank.padded, bank.inverse, packed, 5, True, True
    )
    for got, want in zip((y, *gradients), bank.soft(soft_reference, torch.float64), strict=True):
        assert_near(got, want, 1e-2)
    y, address = hard.forward(x, bank.table, 6, bank.indices, bank.padded, bank.draw)
    wanted_y, wanted_address, *wanted = bank.hard(hard_reference, torch.float64)
    assert torch.equal(y.to(dtype), wanted_y.float().to(dtype))
    assert torch.equal(address, wanted_address)
    gradients = hard.backward(gradient, address, 64, bank.slope, bank.inverse, True, True)
    for got, want in zip(gradients, wanted, strict=True):
        assert_near(got, want, 1e-2)


def test_any_layout_gives_the_same() -> None:
    bank = Bank(4, 5, 20, None, False)
    first = (*bank.soft(soft, torch.float32), *bank.hard(hard, torch.float32))
    wide = torch.zeros(20, 2 * INPUTS, device=DEVICE)
    wide[:, ::2] = bank.x
    for x, gradient in (
        (bank.x.t().contiguous().t(), bank.gradient.t().contiguous().t()),
        (wide[:, ::2], bank.gradient.flip(0).flip(0)),
    ):
        bank.x, bank.gradient = x, gradient
        for got, want in zip((*bank.soft(soft, torch.float32), *bank.hard(hard, torch.float32)), first, strict=True):
            assert torch.equal(got, want)
    expanded = torch.ones((), device=DEVICE).expand(20, 5)
    bank.gradient = expanded
    summed = bank.soft(soft, torch.float32)
    bank.gradient = expanded.contiguous()
    for got, want in zip(summed, bank.soft(soft, torch.float32), strict=True):
        assert torch.equal(got, want)


def test_is_deterministic() -> None:
    bank = Bank(3, 33, 300, 5, False)
    for run in (lambda: bank.soft(soft, torch.float32), lambda: bank.hard(hard, torch.float32)):
        for got, want in zip(run(), run(), strict=True):
            assert torch.equal(got, want)


def test_takes_bits() -> None:
    bank = Bank(3, 5, 20, None, False)
    for bits in (bank.x >= 0.5, (bank.x >= 0.5).long()):
        for module in (soft, hard):
            got, _ = module.forward(bits, bank.table, 3, bank.indices, bank.padded, None)
            want, _ = module.forward(bits.float(), bank.table, 3, bank.indices, bank.padded, None)
            assert got.dtype == torch.float32
            assert torch.equal(got, want)


def test_strange_values() -> None:
    table = torch.randn(1, 4, device=DEVICE)
    x = torch.tensor([[0.0, 1.0], [-0.1, 1.1], [-torch.inf, torch.inf], [torch.nan, 0.5]], device=DEVICE)
    y, _ = soft.forward(x, table, 2, None, False, None)
    assert torch.equal(y[0, :3], table[0, 2].expand(3))
    assert y[0, 3].isnan()
    gradient = torch.ones(4, 1, device=DEVICE)
    x_gradient, _ = soft.backward(gradient, x, table, 2, None, False, None, None, 0, True, False)
    assert x_gradient is not None
    # the edges are inside
    want = torch.stack([table[0, 3] - table[0, 2], table[0, 2] - table[0, 0]])
    torch.testing.assert_close(x_gradient[:, 0], want)
    assert torch.equal(x_gradient[:, 1:3], torch.zeros(2, 2, device=DEVICE))
    _, address = hard.forward(x, table, 2, None, False, None)
    assert address.tolist() == [[2, 2, 2, 2]]


@pytest.mark.parametrize(("num_nodes", "batch"), [(0, 3), (3, 0)])
def test_nothing_to_do(num_nodes: int, batch: int) -> None:
    table = torch.randn(num_nodes, 8, device=DEVICE)
    indices = torch.zeros(num_nodes, 3, dtype=torch.int32, device=DEVICE)
    wiring = Wiring(indices, INPUTS)
    x, gradient = torch.rand(batch, INPUTS, device=DEVICE), torch.rand(batch, num_nodes, device=DEVICE)
    y, packed = soft.forward(x, table, 3, indices, False, None)
    x_gradient, table_gradient = soft.backward(
        gradient, x, table, 3, indices, False, wiring.inverse, packed, 0, True, True
    )
    assert y.shape == (num_nodes, batch)
    assert x_gradient is not None and torch.equal(x_gradient, torch.zeros(INPUTS, batch, device=DEVICE))
    assert table_gradient is not None and torch.equal(table_gradient, torch.zeros_like(table))
    y, address = hard.forward(x, table, 3, indices, False, None)
    x_gradient, table_gradient = hard.backward(
        gradient, address, 8, torch.zeros(num_nodes, 3, 8, device=DEVICE), wiring.inverse, True, True
    )
    assert y.shape == address.shape == (num_nodes, batch)
    assert x_gradient is not None and torch.equal(x_gradient, torch.zeros(INPUTS, batch, device=DEVICE))
    assert table_gradient is not None and torch.equal(table_gradient, torch.zeros_like(table))


@pytest.mark.parametrize("op", ["interpolate", "lookup"])
def test_behind_the_public_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module(f"difflut_lab.ops.{op}")
    bank = Bank(3, 5, 20, None, False)
    assert bank.indices is not None
    wiring = Wiring(bank.indices, INPUTS)
    flips = Flips(0.3, 5, torch.tensor(2, device=DEVICE))

    def run(x: Tensor, table: Tensor) -> Tensor:
        if op == "lookup":
            return lookup(x * 0.9, table, efd_table(table), wiring, flips)
        return interpolate(x * 0.9, table, wiring, flips)

    results = []
    for backend in (soft if op == "interpolate" else hard, soft_reference if op == "interpolate" else hard_reference):
        monkeypatch.setattr(package, "choose", lambda *arguments, backend=backend: backend)
        x, table = bank.x.clone().requires_grad_(), bank.table.clone().requires_grad_()
        y = torch.compile(run, fullgraph=True, backend="aot_eager")(x, table)
        assert y.t().is_contiguous()
        results.append((y.detach(), *torch.autograd.grad(y, (x, table), bank.gradient)))
    for got, want in zip(*results, strict=True):
        assert_near(got, want.double(), 1e-5)


def test_only_the_wanted_gradients() -> None:
    bank = Bank(3, 5, 20, None, False)
    arguments = (bank.gradient, bank.x, bank.table, 3, bank.indices, bank.padded, bank.inverse, None, 0)
    assert soft.backward(*arguments, False, True)[0] is None
    assert soft.backward(*arguments, True, False)[1] is None
    _, address = hard.forward(bank.x, bank.table, 3, bank.indices, bank.padded, None)
    assert hard.backward(bank.gradient, address, 8, bank.slope, bank.inverse, False, True)[0] is None
    assert hard.backward(bank.gradient, address, 8, None, bank.inverse, True, True)[0] is None
    assert hard.backward(bank.gradient, address, 8, bank.slope, bank.inverse, True, False)[1] is None


def test_declines_with_a_reason() -> None:
    device = DEVICE.type
    assert declines(8, device, torch.float32) == ""
    assert declines(9, device, torch.float32) == "n = 9 is more than 8"
    assert declines(6, device, torch.float64) == "computes in float64"
    assert declines(6, "meta", torch.float32) == "tensors are on meta"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiles_without_a_gpu(target: str) -> None:
    script = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"
    command = [sys.executable, str(script), "--fan-in", "6", "--targets", target]
    # the script turns the interpreter off
    done = subprocess.run([*command, "--kernels", "interpolate.differentiate_inputs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpolate.differentiate_inputs" in done.stdout
