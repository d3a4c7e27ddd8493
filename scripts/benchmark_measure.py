"""Times and memory of one case of ``benchmark.py``, whose variants take turns."""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmark_cases import Case, Sizes, Step
from benchmark_limits import Limits
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from difflut_lab.ops import chosen_kernels, use_kernels
from difflut_lab.ops.dispatch import VARIABLE

# the reference first, what is compared with it last
BACKENDS = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton")}
PARTS = ("forward", "backward", "full")
QUANTILES = {"median ms": 0.5, "20 % ms": 0.2, "80 % ms": 0.8}
# a kind of work, and the limit that its rate is a share of
LIMITS = {"operations": "multiply-adds", "bytes": "copy"}
LEAST_RUNS = 3
MIB = 1 << 20

Row = dict[str, Any]


@dataclass(kw_only=True)
class Variant:
    """One of those that take turns."""

    name: str
    step: Step
    kernels: str
    """What computed each op of this package."""
    peak: dict[str, float]
    saved: float


def measure(case: Case, sizes: Sizes, runs: int, seconds: float, limits: Limits, notes: list[str]) -> list[Row]:
    """Rows of forward, backward and both, of all variants of a case, in ``seconds`` or not much more."""
    end = time.perf_counter() + seconds
    variants = list(prepare(case, sizes, notes))
    milliseconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    timer = Timer(sizes.device)
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for done in range(runs):
            for variant in variants:
                choose(variant.name)
                forward, backward = timer(variant.step)
                for part, value in zip(PARTS, (forward, backward, forward + backward), strict=True):
                    milliseconds[variant.name, part].append(value)
            now = time.perf_counter()
            if done + 1 >= LEAST_RUNS and now + (now - begin) / (done + 1) > end:
                break
    finally:
        gc.enable()
    reference, fast = BACKENDS[sizes.device]
    rows = []
    for variant in variants:
        for part in PARTS:
            values = milliseconds[variant.name, part]
            median = quantile(values, 0.5)
            own = variant.name in (reference, fast)
            row: Row = {"group": case.group, "what": case.what, "n": sizes.n, "batch": sizes.batch}
            row |= {"backend": variant.name, "part": part, "runs": len(values)}
            row |= {name: round(quantile(values, share), 4) for name, share in QUANTILES.items()}
            row["speed-up"] = ratio(milliseconds.get((reference, part)), values)
            row["slow-down"] = ratio(values, milliseconds.get((fast, part)))
            work = case.counts.operations, case.counts.traffic
            rates = limits.multiply_adds, limits.copy_bandwidth
            for name, count, rate in zip(("operations", "bytes"), work, rates, strict=True):
                least = of_part(count, part) if own else None
                row[name] = least
                row[f"share of {LIMITS[name]}"] = round(1e3 * least / median / rate, 4) if least else None
            row |= {"peak MiB": round(variant.peak[part], 2), "saved MiB": round(variant.saved, 2)}
            rows.append(row | {"kernels": variant.kernels})
    return rows


def of_part(count: tuple[int, int] | None, part: str) -> int | None:
    """A count of forward and backward, of one of the parts."""
    if count is None:
        return None
    return dict(zip(PARTS, (*count, sum(count)), strict=True))[part]


def ratio(values: list[float] | None, others: list[float] | None) -> float | None:
    """Of medians; None where one of them was not measured, or took no time."""
    if values is None or others is None or not quantile(others, 0.5):
        return None
    return round(quantile(values, 0.5) / quantile(others, 0.5), 3)


def quantile(values: list[float], share: float) -> float:
    """The value that a share of them does not exceed."""
    return sorted(values)[round(share * (len(values) - 1))]


def choose(name: str) -> None:
    """Compute this package's ops with a backend from now on; for other names, nothing of it is called."""
    # not use_kernels: it forgets what was decided, and deciding again would be in the next run's time
    os.environ[VARIABLE] = name if name in ("reference", "cpu", "triton") else "auto"


def prepare(case: Case, sizes: Sizes, notes: list[str]) -> list[Variant]:
    """Make all variants of a case and run each twice: once to compile and warm up, once for its memory."""
    size = f"{case.what}, {sizes}"
    step = case.own()
    variants = []
    for name in BACKENDS[sizes.device]:
        use_kernels("auto")
        choose(name)
        Timer(sizes.device)(step)
        chosen = chosen_kernels()
        kernels = "; ".join(f"{op}: {why}" for op, why in sorted(chosen.items()))
        if name not in chosen.values():
            notes.append(f"{size}: without {name}: {kernels}")
            continue
        if set(chosen.values()) != {name}:
            notes.append(f"{size}: {name} is {kernels}")
        variants.append(remember(name, step, kernels, sizes.device))
    for name, make in case.others.items():
        # whatever another library raises, the rest is measured
        try:
            other = make()
            Timer(sizes.device)(other)
            variants.append(remember(name, other, "", sizes.device))
        except Exception as error:
            notes.append(f"{size}: without {name}: {type(error).__name__}: {error}".splitlines()[0])
    return variants


def remember(name: str, step: Step, kernels: str, device: str) -> Variant:
    """A variant, its memory measured."""
    forget(step)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # storages are told apart by their address: none may be freed before the end
        y = step.forward()
    saved = sum(kept.values()) / MIB
    del y
    outputs: list[Tensor] = []
    forward, left = allocated(lambda: outputs.append(step.forward()), device)
    backward = left + allocated(lambda: step.backward(outputs[0]), device)[0]
    peak = {"forward": forward, "backward": backward, "full": max(forward, backward)}
    forget(step)
    return Variant(name=name, step=step, kernels=kernels, peak=peak, saved=saved)


def allocated(function: Callable[[], None], device: str) -> tuple[float, float]:
    """MiB that tensors took at most during a call, and still take after it, more than before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        most, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return (most - before) / MIB, (after - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        function()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most / MIB, taken / MIB


def forget(step: Step) -> None:
    """Forget gradients."""
    for leaf in step.leaves:
        leaf.grad = None


class Timer:
    """Milliseconds of a step's forward and backward."""

    def __init__(self, device: str) -> None:
        # one thread's own time is not lengthened by what else runs on the machine
        self.now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        # as large as no cache of a GPU is; writing it also gives the processor time to queue the run
        self.cache = torch.empty(256 * MIB, dtype=torch.uint8, device=device) if device == "cuda" else None

    def __call__(self, step: Step) -> tuple[float, float]:
        forget(step)
        if self.cache is None:
            start = self.now()
            y = step.forward()
            middle = self.now()
            step.backward(y)
            end = self.now()
            return 1e3 * (middle - start), 1e3 * (end - middle)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self.cache.zero_()
        events[0].record()
        y = step.forward()
        events[1].record()
        step.backward(y)
        events[2].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])
