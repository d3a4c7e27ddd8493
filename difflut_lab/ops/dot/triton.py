"""What products with codes of two bits share on a GPU, in Triton: blocks, decoding, scales, compiling ahead.

A program has a block of TOKENS rows of activations and OUTPUTS outputs, and goes through the inputs, INPUTS at a time.
Codes are decoded in registers into the type of the activations, so that tensor cores multiply them: bytes with bytes
to exact integers, halves with halves to floats. Products in float32 keep all bits of the activations.

Shape letters: M tokens, K inputs of an output, W words that K codes take, O outputs.
"""

# kernels are typed by Triton's compiler
# mypy: disable-error-code="assignment, no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from difflut_lab.ops.compiler.triton import Argument, Binary, compile_for, gpu_of
from difflut_lab.ops.kernel.triton import tune

# arguments whose values compile nothing anew: those of a batch, and sizes of images
COUNTERS = ("num_tokens", "bucket", "height", "width", "out_height", "out_width")
# accumulators of a thread that leave room for operands
ACCUMULATORS = 64
# steps of the loop over inputs whose loads are under way; AMD's have less shared memory
STAGES = {"cuda": 3, "hip": 2}

# TOKENS, OUTPUTS, INPUTS and warps to try; the last needs the most registers on sm_80.
# Tensor cores multiply at least 16 rows, and 32 bytes of each.
HALVES = ((16, 32, 128, 4), (16, 128, 64, 4), (64, 64, 64, 4), (128, 128, 64, 8), (128, 64, 64, 4))
# where each value has an address of its own in registers
GATHERED = ((16, 32, 64, 4), (32, 64, 32, 4), (64, 64, 32, 8), (128, 64, 32, 8))
# NVIDIA's have none for float32: operands of a whole step are in registers
FLOATS = ((16, 64, 16, 4), (32, 32, 16, 4), (32, 64, 16, 4), (64, 64, 16, 8))
# without tensor cores, a program per token
SINGLES = ((1, 1, 512, 1), (1, 4, 512, 4), (1, 16, 256, 4), (1, 4, 1024, 4))
# the interpreter pays per instruction, whatever the size: few programs with large tensors
INTERPRETED = (64, 64, 128, 4)
INTERPRETED_SINGLE = (1, 128, 128, 4)

# what pointers point to that are not of the activations' type
POINTERS = {"codes": "*i32", "levels": "*i8", **dict.fromkeys(("scale", "skew", "bias", "step"), "*fp32")}
# the convolution that is compiled ahead
CONVOLUTION = {
    **dict.fromkeys(("KERNEL_H", "KERNEL_W"), 3),
    **dict.fromkeys(("STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W", "x_column", "y_column"), 1),
}


def product(function: Callable[..., None], blocks: Sequence[tuple[int, int, int, int]]) -> Any:
    """Compile a kernel; choose its block by trial, once for each weight, size of batch and dtype.

    Parameters
    ----------
    function : callable
        With constants ``SKEWED``, ``TOKENS``, ``OUTPUTS`` and ``INPUTS``, and with ``length``, ``num_outputs`` and
        ``bucket`` (see ``bucket``).
    blocks : sequence of (int, int, int, int)
        ``HALVES``, ``GATHERED``, ``FLOATS`` or ``SINGLES``.
    """
    if knobs.runtime.interpret:
        blocks = (INTERPRETED_SINGLE if blocks is SINGLES else INTERPRETED,)
    stages = STAGES["hip" if torch.version.hip else "cuda"]
    configs = [
        triton.Config({"TOKENS": tokens, "OUTPUTS": outputs, "INPUTS": inputs}, num_warps=warps, num_stages=stages)
        for tokens, outputs, inputs, warps in blocks
    ]

    def prune(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
        return fitting(configs, arguments["bucket"], constants["SKEWED"])

    return tune(function, configs, ("length", "num_outputs", "bucket", "SKEWED"), COUNTERS, prune)


def fitting(configs: Sequence[Any], bucket: int, skewed: bool) -> list[Any]:
    """The blocks with room for all accumulators, twice as many with a skew, and no larger than the batch needs."""
    found = []
    for config in configs:
        tokens, outputs = config.kwargs["TOKENS"], config.kwargs["OUTPUTS"]
        accumulators = tokens * outputs * (1 + skewed) // (32 * config.num_warps)
        if accumulators <= ACCUMULATORS and tokens <= max(16, 1 << bucket):
            found.append(config)
    return found


class Launch(NamedTuple):
    """What a product is compiled for anew, beside its weight and the GPU."""

    operand: str = "fp32"
    # of activations, as Triton writes it; i8 where they are rounded

    skew: bool = False
    # whether positive and negative codes have their own scales


def compile_ahead(tuned: Any, target: str, launch: Launch) -> tuple[str, int, Binary]:
    """Compile a kernel for a GPU that need not be there: its block and warps, and what it uses.

    Parameters
    ----------
    tuned : kernel
        As ``product`` or ``tune`` returns it. Of its blocks the last that fits is compiled.
    target : str
        ``"sm_90"`` or another of NVIDIA's, ``"gfx942"`` or another of AMD's.
    launch : Launch
        What it is compiled for.

    Raises
    ------
    RuntimeError
        If the process interprets kernels, or the compiler does not say what a kernel uses.
    """
    configs = fitting(tuned.configs, 32, launch.skew) if "TOKENS" in tuned.configs[0].kwargs else tuned.configs
    config = configs[-1]
    constants = {**CONVOLUTION, **config.kwargs, "SKEWED": launch.skew}
    constants |= {} if launch.skew else {"skew": None}
    constants |= {} if launch.operand == "i8" or "levels" in tuned.fn.arg_names else {"step": None}
    kinds = {**POINTERS, "x": f"*{launch.operand}", "y": "*fp32" if launch.operand == "i8" else f"*{launch.operand}"}
    # as a launch would: pointers and lengths of rows are multiples of 16
    arguments = {name: Argument(kinds.get(name, "i32"), name not in COUNTERS) for name in tuned.fn.arg_names}
    options = {"num_warps": config.num_warps, "num_stages": STAGES[gpu_of(target).backend]}
    binary = compile_for(tuned.fn, target, arguments, constants, **options)
    return "x".join(map(str, config.kwargs.values())), config.num_warps, binary


@triton.jit
def decode(codes, output, exists, first, length, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """Codes -1, 0, +1 of outputs, ``(OUTPUTS, INPUTS)`` int8, from input ``first`` on; any where there are none."""
    words = tl.cdiv(length, 16)
    word = first // 16 + tl.arange(0, INPUTS // 16)
    at = output.to(tl.int64)[:, None] * words + word[None, :]
    packed = tl.load(codes + at, mask=exists[:, None] & (word < words)[None, :], other=0)
    digits = (packed[:, :, None] >> (2 * tl.arange(0, 16))[None, None, :]) & 3
    return tl.reshape(digits.to(tl.int8) - 1, [OUTPUTS, INPUTS])


@triton.jit
def scaled(sums, kept, scale, skew, bias, step, output, exists):
    """``(scale * sums + skew * kept) * step + bias`` as float32; outputs are the last dimension.

    ``sums`` is c . x and ``kept`` |c| . x, with a skew; ``step`` is a value per token or None.
    """
    y = sums.to(tl.float32) * tl.load(scale + output, mask=exists, other=0).to(tl.float32)
    if skew is not None:
        y += kept.to(tl.float32) * tl.load(skew + output, mask=exists, other=0).to(tl.float32)
    if step is not None:
        y *= step
    if bias is not None:
        y += tl.load(bias + output, mask=exists, other=0).to(tl.float32)
    return y
