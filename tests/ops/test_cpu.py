"""The CPU kernels against the reference in float64, and which backend is chosen when."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.ops import Flips, Wiring, dispatch, efd_table, flip_mask, interpolate, lookup, route, use_kernels

# largest error of a tensor, of its largest absolute value
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask for the CPU kernels, whatever the environment says; leave what was asked for before."""
    asked = dispatch._configured
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    use_kernels("cpu")
    yield
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    use_kernels(asked)


def check(got: Tensor, want: Tensor) -> None:
    """The error is within the tolerance, relative to the tensor."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    scale = float(want.abs().max())
    assert float((got.double() - want.double()).abs().max()) <= TOLERANCE * scale


def evaluate(op: str, kernels: str, dtype: torch.dtype, case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of x and the table, by one backend in one dtype."""
    use_kernels(kernels)
    x, table = (case[name].detach().to(dtype).requires_grad_() for name in ("x", "table"))
    if op == "lookup":
        y = lookup(x, table, case["slope"].to(dtype), case["wiring"], case["flips"])
    else:
        y = interpolate(x, table, case["wiring"], case["flips"])
    x_gradient, table_gradient = torch.autograd.grad(y, (x, table), case["gradient"].to(dtype))
    return y.detach(), x_gradient, table_gradient


def draw_case(n: int, batch: int, num_nodes: int, num_inputs: int, wired: bool, flipped: bool) -> dict[str, Any]:
    """A bank of nodes with constants and repeated inputs, and inputs on both sides of [0, 1], some minus infinity."""
    indices = torch.randint(-1, num_inputs, (num_nodes, n), dtype=torch.int32)
    indices[0] = num_inputs - 1
    x = torch.rand(batch, num_inputs if wired else num_nodes * n) * 1.4 - 0.2
    return {
        "x": x.masked_fill(torch.rand(x.shape) < 0.1, -torch.inf),
        "table": torch.randn(num_nodes, 2**n),
        "slope": torch.randn(num_nodes, n, 2**n),
        "wiring": Wiring(indices, num_inputs) if wired else None,
        "flips": Flips(0.3, 0x1234567_89ABCDEF, torch.tensor(2**32 + 4), 2, batch % 11) if flipped else None,
        "gradient": torch.randn(batch, num_nodes),
    }


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("op", ["interpolate", "lookup"])
def test_equals_the_reference(op: str, n: int) -> None:
    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(
        batch=st.integers(0, 300),
        num_nodes=st.integers(1, 40),
        num_inputs=st.integers(1, 50),
        # each is compiled on its own
        wired=st.booleans() if n in (1, 6, 8) else st.just(True),
        flipped=st.booleans(),
    )
    def run(batch: int, num_nodes: int, num_inputs: int, wired: bool, flipped: bool) -> None:
        case = draw_case(n, batch, num_nodes, num_inputs, wired, flipped)
        got = evaluate(op, "cpu", torch.float32, case)
        assert dispatch.chosen_kernels() == {op: "cpu"}
        for result, want in zip(got, evaluate(op, "reference", torch.float64, case), strict=True):
            check(result, want)
        if op == "lookup":
            assert torch.equal(got[0], evaluate(op, "reference", torch.float32, case)[0])

    run()


@pytest.mark.parametrize("n", range(1, 9))
def test_efd_equals_the_reference(n: int) -> None:
    table = torch.randn(13, 2**n)
    got = efd_table(table, 0.7, 0.4)
    assert dispatch.chosen_kernels() == {"efd": "cpu"}
    check(got, efd_table(table.double(), 0.7, 0.4))
    check(efd_table(table.t().contiguous().t()), efd_table(table.double()))


@pytest.mark.parametrize("count", [1, 3, 8, 21, None])
@pytest.mark.parametrize("batch", [0, 1, 77, 300])
@pytest.mark.parametrize("tau", [0.001, 0.5])
def test_route_equals_the_reference(count: int | None, batch: int, tau: float) -> None:
    scores = (torch.randn(11, 4, count or 37) * 0.003).mul(1000).round().div(1000)
    candidates = None if count is None else torch.randint(0, 37, scores.shape, dtype=torch.int32)
    x, gradient = torch.rand(batch, 37), torch.randn(batch, 44)
    results = []
    for kernels, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        use_kernels(kernels)
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, scores)]
        y = route(leaves[0], leaves[1], candidates, tau)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, gradient.to(dtype))))
    assert torch.equal(results[0][0].double(), results[1][0])
    for got, want in zip(*results, strict=True):
        check(got, want)


@pytest.mark.parametrize("count", [1, 7, 8, 21, 64, 100])
def test_route_chooses_as_argmax_does(count: int) -> None:
    scores = torch.randint(0, 5, (200, 1, count)).float()
    scores[:3] = -torch.inf
    scores[3:100][torch.rand(97, 1, count) < 0.02] = torch.nan
    places = torch.arange(count).float().expand(1, count)
    assert torch.equal(route(places, scores)[0].long(), scores.argmax(-1).flatten())
    assert dispatch.chosen_kernels() == {"route": "cpu"}


@pytest.mark.parametrize("op", ["interpolate", "lookup"])
def test_in_blocks_of_the_batch_and_runs_of_nodes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module(f"difflut_lab.ops.{op}.cpu"), "block_width", lambda length: 32)
    monkeypatch.setattr(import_module("difflut_lab.ops.threads.cpu"), "SHARE", 1)
    case = draw_case(6, 1000, 127, 60, wired=True, flipped=True)
    for got, want in zip(
        evaluate(op, "cpu", torch.float32, case), evaluate(op, "reference", torch.float64, case), strict=True
    ):
        check(got, want)


@pytest.mark.parametrize("op", ["interpolate", "lookup"])
def test_threads_change_nothing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("difflut_lab.ops.threads.cpu"), "SHARE", 1)
    case = draw_case(6, 77, 300, 40, wired=True, flipped=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(evaluate(op, "cpu", torch.float32, case))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


@pytest.mark.parametrize("sample_offset", [0, 3, 8, 2**33 - 16 + 5])
@pytest.mark.parametrize("probability", [0.0, 0.05, 1.0])
def test_flips_are_those_of_the_mask(sample_offset: int, probability: float) -> None:
    # node j of one input shows its input: the output is the mask
    flips = Flips(probability, 0x1234567_89ABCDEF, torch.tensor(7), 3, sample_offset)
    mask = flip_mask(flips, 9, 1, 141)[:, 0].t().float()
    assert torch.equal(lookup(torch.zeros(141, 9), torch.tensor([[0.0, 1.0]]).repeat(9, 1), flips=flips), mask)
    assert torch.equal(interpolate(torch.zeros(141, 9), torch.tensor([[0.0, 1.0]]).repeat(9, 1), flips=flips), mask)


def test_a_backward_may_be_computed_by_another_backend() -> None:
    case = draw_case(5, 45, 11, 20, wired=True, flipped=True)
    x, table = case["x"].requires_grad_(), case["table"].requires_grad_()
    gradients = []
    for first, second in (("cpu", "reference"), ("reference", "cpu")):
        use_kernels(first)
        y = interpolate(x, table, case["wiring"], case["flips"])
        use_kernels(second)
        gradients.append(torch.autograd.grad(y, (x, table), case["gradient"]))
    for got, want in zip(*gradients, strict=True):
        check(got, want)


def layouts(x: Tensor) -> list[Tensor]:
    """The same values batch-major, feature-major, as every other column, and as a slice of feature-major storage."""
    wide = torch.zeros(x.shape[0], 2 * x.shape[1], dtype=x.dtype)
    wide[:, ::2] = x
    tall = torch.zeros(x.shape[1] + 3, x.shape[0], dtype=x.dtype)
    tall[2:-1] = x.t()
    return [x.contiguous(), x.t().contiguous().t(), wide[:, ::2], tall[2:-1].t()]


@pytest.mark.parametrize("op", ["interpolate", "lookup"])
@pytest.mark.parametrize("batch", [20, 64])
def test_any_layout(op: str, batch: int) -> None:
    case = draw_case(6, batch, 7, 10, wired=True, flipped=False)
    results = []
    for x in layouts(case["x"]):
        for gradient in layouts(case["gradient"]):
            results.append(evaluate(op, "cpu", torch.float32, {**case, "x": x, "gradient": gradient}))
    for stored in (case["table"].t().contiguous().t(), case["table"].repeat(1, 2)[:, :64]):
        results.append(evaluate(op, "cpu", torch.float32, {**case, "table": stored}))
    assert results[0][0].t().is_contiguous() and results[0][1].t().is_contiguous()
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0], strict=True))


def test_strange_values() -> None:
    table = torch.randn(1, 4, requires_grad=True)
    x = torch.tensor([[0.0, 1.0], [-0.1, 1.1], [-torch.inf, torch.inf], [torch.nan, 0.5]], requires_grad=True)
    y = interpolate(x, table)
    assert torch.equal(y[:3, 0], table[0, 2].expand(3)) and y[3, 0].isnan()
    (gradient,) = torch.autograd.grad(y[:3].sum(), x)
    torch.testing.assert_close(gradient[0], torch.stack([table[0, 3] - table[0, 2], table[0, 2] - table[0, 0]]))
    assert torch.equal(gradient[1:3], torch.zeros(2, 2))
    assert torch.equal(lookup(x, table)[:, 0], table[0, 2].expand(4))


@pytest.mark.parametrize("op", ["interpolate", "lookup"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(op: str, dtype: torch.dtype) -> None:
    case = draw_case(4, 20, 7, 10, wired=True, flipped=False)
    case = {name: value.to(dtype).float() if isinstance(value, Tensor) else value for name, value in case.items()}
    narrow, wide = evaluate(op, "cpu", dtype, case), evaluate(op, "cpu", torch.float32, case)
    assert dispatch.chosen_kernels()[op] == "cpu"
    for got, want in zip(narrow, wide, strict=True):
        assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("wired", [False, True])
def test_opcheck(wired: bool, flipped: bool) -> None:
    case = draw_case(3, 9, 7, 10, wired, flipped)
    x, table, slope = case["x"].requires_grad_(), case["table"].requires_grad_(), case["slope"]
    wiring = case["wiring"]
    wires = (wiring.indices, True, *wiring.inverse) if wired else (None, False, None, None)
    rest = (*wires, torch.tensor(2) if flipped else None, 6000, 5, 1, 3)
    torch.library.opcheck(torch.ops.difflut_lab.interpolate.default, (x, table, *rest))
    torch.library.opcheck(torch.ops.difflut_lab.lookup.default, (x, table, slope, *rest))
    assert dispatch.chosen_kernels() == {"interpolate": "cpu", "lookup": "cpu"}


def test_auto_takes_the_kernels_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "difflut_lab.ops.dispatch")
    use_kernels("auto")
    x, table = torch.rand(5, 8), torch.rand(4, 4)
    for _ in range(2):
        interpolate(x, table)
    assert [record.getMessage() for record in caplog.records] == ["kernels of interpolate: cpu"]
    assert dispatch.chosen_kernels() == {"interpolate": "cpu"}


@pytest.mark.parametrize(
    ("x", "table", "why"),
    [
        (torch.rand(5, 8).double(), torch.rand(4, 4), "computes in float64"),
        (torch.rand(5, 36), torch.rand(4, 512), "n = 9 is more than 8"),
    ],
)
def test_declines_with_a_reason(x: Tensor, table: Tensor, why: str, caplog: pytest.LogCaptureFixture) -> None:
    for asked, level in (("auto", logging.INFO), ("cpu", logging.WARNING)):
        caplog.clear()
        caplog.set_level(logging.INFO, "difflut_lab.ops.dispatch")
        use_kernels(asked)
        for _ in range(2):
            interpolate(x, table)
        assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
            (level, f"kernels of interpolate: reference ({why})")
        ]
        assert dispatch.chosen_kernels() == {"interpolate": f"reference ({why})"}


def test_declines_other_devices_and_a_missing_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.cpu_declines(6, "cuda", torch.float32) == "tensors are on cuda"
    assert dispatch.cpu_declines(6, "cpu", torch.float32) == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dispatch.cpu_declines(6, "cpu", torch.float32) == "numba is not installed"


def test_the_reference_can_be_asked_for() -> None:
    use_kernels("reference")
    interpolate(torch.rand(5, 8), torch.rand(4, 4))
    assert dispatch.chosen_kernels() == {"interpolate": "reference"}


def test_the_environment_decides_where_the_configuration_says_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.kernels() == "cpu"
    use_kernels("auto")
    assert dispatch.kernels() == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "quick")
    with pytest.raises(ConfigError, match=r"DIFFLUT_LAB_KERNELS=quick.*auto, reference, cpu"):
        use_kernels("auto")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernels=quick.*auto, reference, cpu"):
        use_kernels("quick")
    assert dispatch.kernels() == "cpu"


SCRIPT = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from difflut_lab.ops.lookup import cpu
cpu.forward(torch.rand(9, 6), torch.rand(3, 4), 2, None, False, None)
"""


def test_compiles_once_per_machine(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = []
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        said.append(result.stderr.count("compiling CPU kernels"))
    assert said == [1, 0]
    assert list(tmp_path.rglob("*.nbc"))


def test_works_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shared = import_module("difflut_lab.ops.kernel.cpu")

    def refuse(function: Any) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(shared, "_Cache", refuse)
    shared._warn.cache_clear()

    def fill(begin, end, out):
        for i in range(begin, end):
            out[i] = i

    out = torch.zeros(9)
    for _ in range(2):
        import_module("difflut_lab.ops.threads.cpu").run(shared.kernel(fill), 9, 0, out.numpy())
    assert out.tolist() == list(range(9))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_errors_of_any_thread_reach_the_caller() -> None:
    shared = import_module("difflut_lab.ops.kernel.cpu")
    threads = torch.get_num_threads()

    def fail(begin, end, last):
        if end > last:
            raise ZeroDivisionError

    kernel = shared.kernel(fail)
    try:
        torch.set_num_threads(2)
        import_module("difflut_lab.ops.threads.cpu").run(kernel, 10, 10**9, 10)
        with pytest.raises(ZeroDivisionError):
            import_module("difflut_lab.ops.threads.cpu").run(kernel, 10, 10**9, 5)
    finally:
        torch.set_num_threads(threads)
