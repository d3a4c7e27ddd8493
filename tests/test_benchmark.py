"""The benchmark: what it writes, what its shares of the machine's limits rest on, and how it refuses."""

from __future__ import annotations

import csv
import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TINY = ["--inputs", "64", "--nodes", "40", "--batch", "8", "--fan-in", "3", "--runs", "3"]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The script, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import benchmark

        return benchmark


class Dense(nn.Linear):
    """What torchlogix has, as far as the benchmark calls it."""

    def __init__(self, inputs: int, outputs: int, *, device: str, lut_rank: int, parametrization: str) -> None:
        super().__init__(inputs, outputs, device=device)


def refuse(*sizes: int, n: int) -> nn.Module:
    raise RuntimeError("not on this machine")


@pytest.fixture(scope="module")
def results(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of everything on tiny sizes, with two libraries to compare with, one of which fails."""
    peers = {"torchlogix": ModuleType("torchlogix"), "torch_dwn": ModuleType("torch_dwn")}
    layers = ModuleType("torchlogix.layers")
    vars(layers)["LogicDense"] = Dense
    vars(peers["torch_dwn"])["LUTLayer"] = refuse
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("benchmark"))
        patch.setitem(sys.modules, "torchlogix.layers", layers)
        patch.setattr(sys.modules["benchmark_cases"], "PACKED", ((2, 48, 32),))
        patch.setattr(benchmark, "find_peers", lambda: (peers, ["difflogic: not installed"]))
        patch.setenv("DIFFLUT_LAB_KERNELS", "cpu")
        threads = torch.get_num_threads()
        directory = Path(benchmark.main(TINY)).resolve()
        assert os.environ["DIFFLUT_LAB_KERNELS"] == "cpu"
        assert torch.get_num_threads() == threads
    return directory


@pytest.fixture(scope="module")
def rows(results: Path) -> list[dict[str, str]]:
    with open(results / "benchmark.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_variant_of_every_case_is_measured(rows: list[dict[str, str]]) -> None:
    found = {(row["group"], row["what"], row["backend"], row["part"]) for row in rows}
    assert len(found) == len(rows)
    own = {
        ("ops", "interpolate"),
        ("ops", "lookup + EFD table"),
        ("ops", "route, 32 candidates"),
        ("ops", "route, all inputs"),
        ("layers", "random_routing, probabilistic"),
        ("layers", "random_routing, dwn"),
        ("layers", "learnable_routing, dwn"),
        ("steps", "lut_mlp, probabilistic"),
        ("steps", "lut_mlp, probabilistic, flips 5%"),
        ("steps", "lut_mlp, dwn"),
        ("steps", "lut_mlp, dwn, flips 5%"),
    }
    wanted = {(*case, backend) for case in own for backend in ("reference", "cpu")}
    wanted |= {
        ("layers", "random_routing, probabilistic", other)
        for other in ("nn.Linear", "torchlogix light", "torchlogix warp")
    }
    for name in ("W1.58A8", "W1.58"):
        what = f"packed linear, {name}, 48 -> 32, 1 / 9.8 of the memory"
        wanted |= {("packed", what, backend) for backend in ("reference", "cpu", "nn.Linear")}
    assert found == {(*variant, part) for variant in wanted for part in ("forward", "backward", "full")}


def test_rows_hold_quantiles_ratios_and_memory(rows: list[dict[str, str]]) -> None:
    medians = {(row["what"], row["backend"], row["part"]): float(row["median ms"]) for row in rows}
    for row in rows:
        packed = row["group"] == "packed"
        assert (row["n"], row["batch"], row["runs"]) == (("0", "2", "3") if packed else ("3", "8", "3"))
        if packed and row["part"] == "backward":
            continue
        assert 0 < float(row["20 % ms"]) <= float(row["median ms"]) <= float(row["80 % ms"])
        reference, cpu = (medians[row["what"], backend, row["part"]] for backend in ("reference", "cpu"))
        # medians are written with four places
        assert float(row["speed-up"]) == pytest.approx(reference / float(row["median ms"]), rel=0.05)
        assert float(row["slow-down"]) == pytest.approx(float(row["median ms"]) / cpu, rel=0.05)
        assert float(row["peak MiB"]) >= 0
        assert (row["backend"] in row["kernels"]) is (row["backend"] in ("reference", "cpu"))
        for limit, count in (("multiply-adds", "operations"), ("copy", "bytes")):
            share = row[f"share of {limit}"]
            assert bool(share) is (row[count] not in ("", "0"))
            assert not share or 0 <= float(share) < 1.5


def test_shares_are_of_the_limits_in_the_record(results: Path, rows: list[dict[str, str]]) -> None:
    limits = json.loads((results / "machine.json").read_text())["limits"]
    shares = []
    for row in rows:
        if row["what"] == "interpolate":
            seconds = 1e-3 * float(row["median ms"])
            expected = float(row["operations"]) / seconds / limits["multiply_adds"]
            assert float(row["share of multiply-adds"]) == pytest.approx(expected, rel=0.01, abs=1e-4)
            shares.append(float(row["bytes"]) / seconds / limits["copy_bandwidth"])
    assert shares
    assert all(0 < share < 1.5 for share in shares)


def test_the_record_says_what_was_measured_on_what(results: Path) -> None:
    machine = json.loads((results / "machine.json").read_text())
    assert {"processor", "cores", "torch", "triton", "numba", "revision"} <= set(machine)
    assert (machine["threads"], machine["clock"]) == (1, "CPU time")
    assert machine["torch"] == torch.__version__
    assert machine["options"]["fan_in"] == [3]
    notes = "\n".join(machine["notes"])
    assert "not compared with difflogic: not installed" in notes
    assert "random_routing, dwn, n = 3, batch 8: without torch_dwn: RuntimeError: not on this machine" in notes


def test_the_plot_is_an_image(results: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (results / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_memory_of_a_known_step(benchmark: Any) -> None:
    from benchmark_cases import Step
    from benchmark_measure import remember

    # 1 MiB each: exp keeps its result, the product both of its factors
    x = torch.rand(1 << 18, requires_grad=True)
    step = Step(forward=lambda: (x.exp() * x).sum(), backward=lambda y: y.backward(), leaves=(x,))
    measured = remember("torch", step, "", "cpu")
    assert measured.saved == pytest.approx(2, abs=0.01)
    # the exponential and the product; then the product is gone
    assert measured.peak["forward"] == pytest.approx(2, abs=0.01)
    assert measured.peak["full"] == max(measured.peak["forward"], measured.peak["backward"])
    assert 3 <= measured.peak["backward"] < 5
    assert x.grad is None


class Counting:
    """A number that counts the operations that made it."""

    total = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __mul__(self, other: Counting) -> Counting:
        Counting.total += 1
        return Counting(self.value * other.value)

    def __add__(self, other: Counting) -> Counting:
        Counting.total += 1
        return Counting(self.value + other.value)

    def __sub__(self, other: Counting) -> Counting:
        Counting.total += 1
        return Counting(self.value - other.value)

    def fused(self, factor: Counting, addend: Counting | None) -> Counting:
        """One multiply-add; a multiplication where nothing is added to."""
        Counting.total += 1
        return Counting(self.value * factor.value + (addend.value if addend else 0))


def dot(left: list[Counting], right: list[Counting]) -> Counting:
    total = None
    for a, b in zip(left, right, strict=True):
        total = a.fused(b, total)
    assert total is not None
    return total


def products(inputs: list[Counting]) -> list[list[Counting]]:
    """The products of the first 0, 1, ... inputs."""
    found = [[Counting(1)]]
    for k, x in enumerate(inputs):
        high = [product * x for product in found[-1]] if k else [x]
        found.append([a - b for a, b in zip(found[-1], high, strict=True)] + high)
    return found


def fold(gradient: list[Counting], inputs: list[Counting]) -> list[Counting]:
    """Gradients of the inputs from those of their products."""
    levels, found = products(inputs), []
    # made once, with the products of the forward that the backward repeats
    Counting.total -= 2 * len(gradient) - 3
    for k in reversed(range(len(inputs))):
        low, high = gradient[: 1 << k], gradient[1 << k :]
        difference = [b - a for a, b in zip(low, high, strict=True)]
        found.append(dot(levels[k], difference) if k else difference[0])
        gradient = [d.fused(inputs[k], a) for d, a in zip(difference, low, strict=True)] if k else []
    return found[::-1]


@pytest.mark.parametrize(("n", "published"), [(2, (8, 22)), (3, None), (4, (30, 84)), (5, None), (6, (98, 278))])
def test_operations_of_interpolation_are_those_of_the_split_form(
    benchmark: Any, n: int, published: tuple[int, int] | None
) -> None:
    from benchmark_cases import Sizes, _interpolate_counts

    counts = _interpolate_counts(Sizes(batch=1, inputs=n, nodes=1, n=n, device="cpu")).operations
    values = torch.rand(n + 2**n + 1, dtype=torch.float64)
    x, table, output = values[:n], values[n:-1], values[-1]
    inputs, entries = [Counting(float(v)) for v in x], [Counting(float(v)) for v in table]
    half, g = n // 2, Counting(float(output))
    rows = [entries[start : start + (1 << half)] for start in range(0, 1 << n, 1 << half)]

    Counting.total = 0
    lower, upper = products(inputs[:half])[-1], products(inputs[half:])[-1]
    y = dot([dot(row, lower) for row in rows], upper)
    forward = Counting.total

    Counting.total = 0
    lower, upper = products(inputs[:half])[-1], products(inputs[half:])[-1]
    weighted = [product * g for product in upper]
    table_gradient = [a.fused(b, Counting(0)) for b in weighted for a in lower]
    columns = [dot(list(column), weighted) for column in zip(*rows, strict=True)]
    joined = [dot(row, lower) * g for row in rows]
    found = [value + Counting(0) for value in fold(columns, inputs[:half]) + fold(joined, inputs[half:])]
    backward = Counting.total

    # what was counted is an interpolation and its gradients
    corners = torch.tensor([[(a >> k) & 1 for k in range(n)] for a in range(2**n)], dtype=torch.float64)
    leaf, weights = x.clone().requires_grad_(), table.clone().requires_grad_()
    expected = (weights * (corners * leaf + (1 - corners) * (1 - leaf)).prod(dim=1)).sum()
    (expected * output).backward()
    assert y.value == pytest.approx(expected.item())
    assert [value.value for value in found] == pytest.approx(leaf.grad.tolist())  # type: ignore[union-attr]
    assert [value.value for value in table_gradient] == pytest.approx(weights.grad.tolist())  # type: ignore[union-attr]
    assert counts == (forward, backward)
    assert published is None or counts == published


def test_limits_are_plausible(benchmark: Any) -> None:
    limits = benchmark.measure_limits("cpu")
    assert 1e8 < limits.copy_bandwidth < 1e13
    assert 1e8 < limits.matrix_product < 1.5 * limits.multiply_adds < 1e15


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "opps"], "'opps'"),
        (["--batch", "0"], "--batch: must be at least 1."),
        (["--inputs", "63"], "--inputs 63: must be even"),
        (["--fan-in", "6", "16"], "--fan-in 6 16: must be from 1 to 15."),
        (["--device", "tpu"], "'tpu'"),
        (["--fast"], "--fast"),
    ],
)
def test_what_is_unknown_or_out_of_range_is_told_in_one_line(
    benchmark: Any, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark.main(words)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("Error: ") and told.count("\n") == 1
    assert message in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cuda"])
    assert capsys.readouterr().err == "Error: --device cuda: torch finds no GPU.\n"


def test_sizes_double_the_work_of_what_is_proportional(benchmark: Any) -> None:
    from benchmark_cases import Sizes, cases

    work = [
        [case.counts for case in cases(Sizes(batch=b, inputs=64, nodes=20, n=4, device="cpu"), ["ops"], {}, False)]
        for b in (8, 16, 32)
    ]
    for less, more in pairwise(work):
        for one, two in zip(less, more, strict=True):
            assert one.operations is None or two.operations == tuple(2 * count for count in one.operations)
            assert (
                one.traffic
                and two.traffic
                and all(a < b < 2 * a for a, b in zip(one.traffic, two.traffic, strict=True))
            )
