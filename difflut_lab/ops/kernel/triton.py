"""What the Triton kernels share: blocks of samples, reading routed inputs, drawing flips, products, sums over readers.

A program works on NODES nodes and GROUPS groups of eight samples, in tensors ``(NODES, GROUPS, 8)``. A group is
what one draw of the generator serves: it begins at a multiple of 8 of the sample's index in the global batch; the
batch begins SHIFT samples after its first group does. Rows of inputs, outputs and gradients are ``(F, B)`` or
``(N, B)``: neighbouring samples are one vector load, a warp reads whole lines. Bases of rows are 64-bit numbers, for
there may be more than 2^31 elements.
"""

# kernels are typed by Triton's compiler
# mypy: disable-error-code="assignment, no-untyped-def"

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from difflut_lab.ops.compiler.triton import Argument, compile_for, gpu_of
from difflut_lab.ops.flips import WORD, Draw

MAX_FAN_IN = 8
# entries of a table gradient that a program sums up in registers
TILE = 64
# the interpreter pays per instruction, whatever the size: few programs with large tensors
INTERPRETED = {"NODES": 32, "GROUPS": 16}
# arguments that change from step to step or from layer to layer, and that compile nothing anew
COUNTERS = ("threshold", "key_low", "key_high", "layer", "first_group", "bucket")
LENGTHS = ("num_nodes", "batch")
# what pointers point to that are not of the inputs' dtype
POINTERS = {
    **dict.fromkeys(("indices", "slots", "start"), "*i32"),
    **dict.fromkeys(("packed", "address"), "*u8"),
    **dict.fromkeys(("table", "slope", "slot_gradient", "table_gradient"), "*fp32"),
    "step": "*i64",
}
# pointers that are None without flips, and where inputs are routed already
FLIPPED = ("packed", "step")
WIRED = ("indices", "slots", "start")

UNLIMITED = 1 << 31

# (groups, warps) to try
EVALUATE = ((4, 1), (8, 1), (16, 1), (32, 1), (16, 4), (32, 4))
# with the accumulators of a tile in every thread: few samples per thread, few warps to sum up over
ACCUMULATE = ((4, 1), (8, 2))


def kernel(
    function: Callable[..., None],
    shapes: Sequence[tuple[int, int]] = EVALUATE,
    values: int = UNLIMITED,
    terms: int = UNLIMITED,
) -> Any:
    """Compile a kernel; choose its block by trial, once for each fan-in and size, and remember the choice on disk.

    Parameters
    ----------
    function : callable
        With constants ``NODES`` and ``GROUPS``, and with ``n``, ``num_nodes`` and ``bucket`` (see ``bucket``).
    shapes : sequence of (int, int)
        Groups of eight samples, and warps.
    values : int
        How many products of half the inputs a thread has room for, over all its samples: larger blocks would spill. By
        default there are none.
    terms : int
        How many entries a thread uses, once for each of its samples: of more the compiler loads too many ahead.
    """
    configs = [triton.Config({"NODES": 1, "GROUPS": groups}, num_warps=warps) for groups, warps in shapes]
    if knobs.runtime.interpret:
        configs = [triton.Config(INTERPRETED)]

    def prune(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
        return fitting(configs, arguments["n"], (values, terms), 64 if torch.version.hip else 32)

    tuned = tune(function, configs, ("n", "num_nodes", "bucket"), COUNTERS, prune)
    tuned.limits = (values, terms)
    return tuned


def tune(
    function: Callable[..., None],
    configs: Sequence[Any],
    key: Sequence[str],
    counters: Sequence[str],
    prune: Callable[..., list[Any]] | None = None,
) -> Any:
    """Compile a kernel; choose among blocks by trial, and remember the choice on disk.

    Parameters
    ----------
    function : callable
        The kernel.
    configs : sequence of triton.Config
        The blocks. One alone is not tried.
    key : sequence of str
        The arguments for whose values, and for all dtypes, a choice is made anew.
    counters : sequence of str
        Arguments whose values compile nothing anew; the kernel need not have all of them.
    prune : callable, optional
        The blocks that are worth a trial, of all, the arguments as a dict, and constants by keyword.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    compiled = triton.jit(function, do_not_specialize=[name for name in counters if name in names])
    pruned = {"early_config_prune": prune} if prune else None
    return triton.autotune(list(configs), key=list(key), prune_configs_by=pruned, cache_results=True)(compiled)


def fitting(configs: Sequence[Any], n: int, limits: tuple[int, int], threads: int) -> list[Any]:
    """The blocks whose values and terms a thread has room for, ``threads`` to a warp; the first if there are none."""
    found = []
    for config in configs:
        samples = -(-config.kwargs["GROUPS"] * 8 // (threads * config.num_warps))
        if samples << (n + 1) // 2 <= limits[0] and samples << n <= limits[1]:
            found.append(config)
    return found or list(configs[:1])


class Use(NamedTuple):
    """What a compiled kernel uses."""

    samples: int
    # of a node, per program

    warps: int
    registers: int
    # of a thread

    spilled: int
    # bytes of a thread's stack

    shared: int
    # bytes of shared memory


class Launch(NamedTuple):
    """What a kernel is compiled for anew, beside its fan-in and the GPU."""

    dtype: str = "fp32"
    # of inputs, outputs and gradients, as Triton writes it

    flips: bool = True
    # whether there are any

    wired: bool = True
    # False where the inputs are routed already

    odd: bool = False
    # the batch begins within a group and is no multiple of 16, and slots read constants


def compile_ahead(tuned: Any, target: str, n: int, launch: Launch) -> Use:
    """Compile a kernel for a GPU that need not be there, and say what it uses.

    Parameters
    ----------
    tuned : kernel
        As ``kernel`` returns it. The block with the most samples per thread is compiled: the others need less.
    target : str
        ``"sm_90"`` or another of NVIDIA's, ``"gfx942"`` or another of AMD's.
    n : int
        Inputs per node.
    launch : Launch
        What it is compiled for.

    Raises
    ------
    RuntimeError
        If the process interprets kernels, or the compiler does not say what a kernel uses.
    """
    configs = fitting(tuned.configs, n, tuned.limits, gpu_of(target).warp_size)
    config = max(configs, key=lambda config: config.kwargs["GROUPS"] / config.num_warps)
    constants = {"n": n, "TILED": min(n, TILE.bit_length() - 1), **config.kwargs}
    constants |= {"SHIFT": 5 if launch.odd and launch.flips else 0, "PADDED": launch.odd and launch.wired}
    constants |= dict.fromkeys(() if launch.flips else FLIPPED) | dict.fromkeys(() if launch.wired else WIRED)
    arguments = {}
    for name in tuned.fn.arg_names:
        # as a launch would: pointers, and lengths of rows in most networks, are multiples of 16
        integer = name in COUNTERS or name in LENGTHS
        kind = "i32" if integer else POINTERS.get(name, f"*{launch.dtype}")
        if name == "slot_gradient" and not launch.wired:
            # not summed over readers, but returned as it is
            kind = f"*{launch.dtype}"
        arguments[name] = Argument(kind, name not in COUNTERS and not (integer and launch.odd))
    binary = compile_for(tuned.fn, target, arguments, constants, num_warps=config.num_warps)
    return Use(8 * config.kwargs["GROUPS"], config.num_warps, *binary[:3])


def bucket(batch: int) -> int:
    """The size of a batch, roughly: what is chosen by trial holds for all batches of one bucket."""
    return batch.bit_length()


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of ``x``, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def declines(n: int, device: str, dtype: torch.dtype) -> str:
    """Why the Triton kernels do not take arguments of a kind; empty if they do.

    Parameters
    ----------
    n : int
        Inputs per node.
    device : str
        Type of the device of all tensors.
    dtype : torch.dtype
        What is computed in.
    """
    if device != ("cpu" if knobs.runtime.interpret else "cuda"):
        return f"tensors are on {device}"
    if dtype != torch.float32:
        return f"computes in {str(dtype).removeprefix('torch.')}"
    if n > MAX_FAN_IN:
        return f"n = {n} is more than {MAX_FAN_IN}"
    return ""


def counters(draw: Draw | None, device: torch.device) -> tuple[Tensor | None, int, int, int, int, int]:
    """The arguments ``step, threshold, key_low, key_high, layer, first_group`` of a kernel; no step means no flips."""
    if draw is None:
        return None, 0, 0, 0, 0, 0
    words = (draw.seed, draw.seed >> 32, draw.layer, draw.sample_offset // 8)
    # whatever the word, the argument has 32 bits and a sign: another type would be another kernel
    key_low, key_high, layer, group = (((word & WORD) ^ 1 << 31) - (1 << 31) for word in words)
    return draw.step.to(device), draw.threshold, key_low, key_high, layer, group


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel writes: the interpreter would truncate to bfloat16 where a GPU rounds."""
    return torch.float32 if knobs.runtime.interpret and dtype == torch.bfloat16 else dtype


def grid(num_nodes: int, batch: int) -> Callable[[dict[str, int]], tuple[int, int]]:
    """One program per block of nodes and block of samples."""
    return lambda meta: (triton.cdiv(num_nodes, meta["NODES"]), triton.cdiv(batch, 8 * meta["GROUPS"]))


@triton.jit
def nodes_of(NODES: tl.constexpr):
    """The nodes of a program, ``(NODES, 1, 1)``; a number where it is one.

    Measured: with a tensor of one node the compiler looks for layouts for a minute at n = 8.
    """
    if NODES == 1:
        node = tl.program_id(0)
    else:
        node = tl.program_id(0) * NODES + tl.arange(0, NODES)[:, None, None]
    return node


@triton.jit
def sum_samples(x, NODES: tl.constexpr):
    """The sum over samples of ``(NODES, ...)``, of the shape of ``nodes_of``."""
    if NODES == 1:
        total = tl.sum(x)
    else:
        total = tl.sum(tl.sum(x, 2), 1)[:, None, None]
    return total


@triton.jit
def largest(x, NODES: tl.constexpr):
    """The largest of a number per node."""
    if NODES == 1:
        found = x
    else:
        found = tl.max(x)
    return found


@triton.jit
def groups_of(batch, SHIFT: tl.constexpr):
    """How many groups of eight samples the batch touches."""
    return (batch + SHIFT + 7) // 8


@triton.jit
def samples_of(group, node, batch, num_nodes, SHIFT: tl.constexpr):
    """Indices in the batch of the samples of groups, ``(1, GROUPS, 8)``, and which of them exist, for nodes that do."""
    sample = group * 8 + tl.arange(0, 8)[None, None, :]
    inside = (node < num_nodes) & (sample < batch + SHIFT)
    if SHIFT > 0:
        inside = inside & (sample >= SHIFT)
        sample = sample - SHIFT
    return sample, inside


@triton.jit
def read(x, indices, node, k, sample, inside, num_nodes, batch, n: tl.constexpr, PADDED: tl.constexpr):
    """What slot k of the nodes reads, and where it reads an input and no constant, such as minus infinity."""
    row = node * n + k
    if indices is not None:
        row = tl.load(indices + row, mask=node < num_nodes, other=0)
    if PADDED:
        inside = inside & (row >= 0)
    value = tl.load(x + row.to(tl.int64) * batch + sample, mask=inside, other=0).to(tl.float32)
    return value, inside & (value != float("-inf"))


@triton.jit
def draw_flips(step, threshold, key_low, key_high, layer, first_group, slot, group):
    """Bit i is the flip of the sample with i = sample mod 8; ``(NODES, GROUPS, 1)`` int32."""
    low = key_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = (key_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low
    counter = first_group.to(tl.uint32, bitcast=True) + group.to(tl.uint32)
    number = (tl.load(step) & 0xFFFFFFFF).to(tl.uint32)
    words = tl.philox(seed, counter, slot.to(tl.uint32), number, layer.to(tl.uint32, bitcast=True))
    flips = tl.zeros_like(words[0]).to(tl.int32)
    for i in tl.static_range(4):
        flips |= ((words[i] & 0xFFFF).to(tl.int32) < threshold).to(tl.int32) << (2 * i)
        flips |= ((words[i] >> 16).to(tl.int32) < threshold).to(tl.int32) << (2 * i + 1)
    return flips


@triton.jit
def flipped(flips):
    """Flips of groups as flips of samples, ``(NODES, GROUPS, 8)``."""
    return ((flips >> tl.arange(0, 8)[None, None, :]) & 1) != 0


def sum_over_readers(
    slot_gradient,
    slots,
    start,
    x,
    out,
    n: tl.constexpr,
    num_nodes,
    batch,
    bucket,
    NODES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``out (F, B)``: the sum over the slots that read an input, in their order, where x ``(F, B)`` is in [0, 1].

    ``num_nodes`` counts the inputs, F.
    """
    feature = nodes_of(NODES)
    sample = tl.program_id(1) * (GROUPS * 8) + tl.arange(0, GROUPS * 8)[None, None, :]
    exists = feature < num_nodes
    inside = exists & (sample < batch)
    first = tl.load(start + feature, mask=exists, other=0)
    count = tl.load(start + feature + 1, mask=exists, other=0) - first
    total = tl.zeros([NODES, 1, GROUPS * 8], tl.float32)
    for i in range(largest(count, NODES)):
        reads = i < count
        slot = tl.load(slots + first + i, mask=reads, other=0).to(tl.int64)
        total += tl.load(slot_gradient + slot * batch + sample, mask=inside & reads, other=0)
    at = feature.to(tl.int64) * batch + sample
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    total = tl.where((value < 0) | (value > 1), 0.0, total)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
