"""Drawn sizes, wirings, layouts and dtypes: the Triton kernels behind the public ops, against the reference in float64.

On a machine with a GPU, TRITON_INTERPRET=0 runs the same tests on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from difflut_lab.ops import Flips, Wiring, chosen_kernels, efd_table, interpolate, lookup, use_kernels
from difflut_lab.ops.interpolate import triton as soft
from difflut_lab.ops.lookup import triton as hard

INTERPRETED = os.environ["TRITON_INTERPRET"] != "0"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LAYOUTS = ("batch-major", "feature-major", "sliced", "expanded")

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True, scope="module")
def _no_trials() -> Iterator[None]:
    """On a GPU every size would be tuned: one block for all. The kernels are asked for by name, and no longer after."""
    kernels = [getattr(module, name) for module in (soft, hard) for name in vars(module) if _is_tuned(module, name)]
    before = [tuned.configs for tuned in kernels]
    for tuned in kernels:
        tuned.configs = tuned.configs[:1]
    yield
    for tuned, configs in zip(kernels, before, strict=True):
        tuned.configs = configs
    use_kernels("auto")


def _is_tuned(module: object, name: str) -> bool:
    return hasattr(getattr(module, name), "limits")


class Case(NamedTuple):
    n: int
    num_nodes: int
    batch: int
    num_inputs: int
    wiring: str
    flips: Flips | None
    layouts: tuple[str, str]
    dtype: torch.dtype
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    flips = None
    if draw(st.booleans()):
        offset = draw(st.sampled_from([0, 3, 8, 2**33 + 7]))
        flips = Flips(draw(st.sampled_from([0.0, 0.3, 1.0])), 2**63 - 5, torch.tensor(9, device=DEVICE), 1, offset)
    return Case(
        n=draw(st.integers(1, 8)),
        num_nodes=draw(st.integers(1, 40)),
        batch=draw(st.integers(1, 140)),
        num_inputs=draw(st.integers(1, 12)),
        wiring=draw(st.sampled_from(["any", "padded", "one input", "routed"])),
        flips=flips,
        layouts=(draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))),
        dtype=draw(st.sampled_from(list(TOLERANCES))),
        seed=draw(st.integers(0, 2**31)),
    )


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values ``(B, F)`` in another layout; expanded is the first sample for all."""
    if layout == "feature-major":
        return values.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((2 * values.shape[0], 3 * values.shape[1]), torch.nan, dtype=values.dtype, device=DEVICE)
        wide[1::2, ::3] = values
        return wide[1::2, ::3]
    return values[:1].expand_as(values) if layout == "expanded" else values


class Arguments:
    """What a case says, drawn."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        lowest = -1 if case.wiring == "padded" else 0
        shape = (case.num_nodes, case.n)
        indices = torch.randint(lowest, case.num_inputs, shape, dtype=torch.int32, device=DEVICE)
        if case.wiring == "one input":
            indices[:] = case.num_inputs - 1
        routed = case.wiring == "routed"
        self.wiring = None if routed else Wiring(indices, case.num_inputs)
        features = case.num_nodes * case.n if routed else case.num_inputs
        x = torch.rand(case.batch, features, device=DEVICE) * 1.4 - 0.2
        gradient = torch.randn(case.batch, case.num_nodes, device=DEVICE)
        self.x = laid_out(x.to(case.dtype), case.layouts[0])
        self.gradient = laid_out(gradient.to(case.dtype), case.layouts[1])
        self.table = torch.randn(case.num_nodes, 2**case.n, device=DEVICE)
        self.slope = efd_table(self.table)
        self.flips = case.flips

    def differentiate(self, op: Callable[[Tensor, Tensor], Tensor], kernels: str, double: bool) -> tuple[Tensor, ...]:
        """Output and gradients of ``op(x, table)``."""
        use_kernels(kernels)
        x, table, gradient = self.x, self.table, self.gradient
        if double:
            x, table, gradient = x.double(), table.double(), gradient.double()
        x, table = x.detach().requires_grad_(), table.detach().requires_grad_()
        y = op(x, table)
        return y.detach(), *torch.autograd.grad(y, (x, table), gradient)

    def soft(self, x: Tensor, table: Tensor) -> Tensor:
        return interpolate(x, table, self.wiring, self.flips)

    def hard(self, x: Tensor, table: Tensor) -> Tensor:
        return lookup(x, table, self.slope.to(table.dtype), self.wiring, self.flips)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())


fast = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@fast
@given(cases())
def test_interpolate_is_near_the_reference(case: Case) -> None:
    arguments = Arguments(case)
    found = arguments.differentiate(arguments.soft, "triton", double=False)
    assert chosen_kernels()["interpolate"] == "triton"
    assert [tensor.dtype for tensor in found] == [case.dtype, case.dtype, torch.float32]
    for got, want in zip(found, arguments.differentiate(arguments.soft, "reference", double=True), strict=True):
        assert_near(got, want, TOLERANCES[case.dtype])


@fast
@given(cases())
def test_lookup_is_near_the_reference_and_its_forward_is_equal(case: Case) -> None:
    arguments = Arguments(case)
    found = arguments.differentiate(arguments.hard, "triton", double=False)
    assert chosen_kernels()["lookup"] == "triton"
    wanted = arguments.differentiate(arguments.hard, "reference", double=True)
    assert torch.equal(found[0], wanted[0].to(case.dtype))
    for got, want in zip(found[1:], wanted[1:], strict=True):
        assert_near(got, want, TOLERANCES[case.dtype])


@fast
@given(cases())
def test_hard_nodes_and_flips_are_the_same_on_every_backend(case: Case) -> None:
    arguments = Arguments(case)
    # entries that are their own addresses: they show every bit, flipped or not
    addresses = torch.arange(2**case.n, dtype=torch.float32, device=DEVICE).expand(case.num_nodes, -1)
    results = []
    for kernels in ("triton", "reference", "cpu") if INTERPRETED else ("triton", "reference"):
        use_kernels(kernels)
        results.append(
            [
                lookup(arguments.x, table, None, arguments.wiring, case.flips)
                for table in (addresses, (arguments.table >= 0).float())
            ]
        )
    for others in results[1:]:
        for got, want in zip(others, results[0], strict=True):
            assert torch.equal(got, want)
