"""Compiling Triton kernels for GPUs that need not be there, and what the compiled kernels use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Binary(NamedTuple):
    """A compiled kernel."""

    registers: int
    # of a thread

    spilled: int
    # bytes of a thread's stack

    shared: int
    # bytes of shared memory

    assembly: str
    # PTX, or what AMD's assembler reads


class Argument(NamedTuple):
    """What an argument of a launch is to the compiler."""

    kind: str
    # as Triton writes it, such as *fp32 or i32

    aligned: bool = True
    # a pointer or number that is a multiple of 16


def gpu_of(target: str) -> GPUTarget:
    """``"sm_90"`` or another of NVIDIA's, ``"gfx942"`` or another of AMD's."""
    return GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)


def compile_for(
    function: Any, target: str, arguments: Mapping[str, Argument], constants: Mapping[str, Any], **options: int
) -> Binary:
    """Compile a kernel for a GPU that need not be there.

    Parameters
    ----------
    function : JITFunction
        The kernel.
    target : str
        See ``gpu_of``.
    arguments : mapping of str to Argument
        Those that a launch passes.
    constants : mapping of str to any
        Those that the kernel is compiled for; others than it has are left out.
    **options : int
        Of the compiler, such as ``num_warps``.

    Raises
    ------
    RuntimeError
        If the process interprets kernels, or the compiler does not say what a kernel uses.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter is on, and nothing is compiled: set TRITON_INTERPRET=0.")
    gpu = gpu_of(target)
    signature, hints = {}, {}
    for index, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else arguments[name].kind
        if name not in constants and arguments[name].aligned:
            hints[(index,)] = [["tt.divisibility", 16]]
    folded = {name: constants[name] for name in signature if name in constants}
    compiled = triton.compile(ASTSource(function, signature, folded, hints), target=gpu, options=options)
    if gpu.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers, spilled = _amd_use(assembly)
    else:
        assembly = compiled.asm["ptx"]
        registers, spilled = _nvidia_use(compiled.asm["cubin"])
    return Binary(registers, spilled, compiled.metadata.shared, assembly)


def _nvidia_use(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # no kernel here has a stack for anything but spilled registers
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text)


def _amd_use(assembly: str) -> tuple[int, int]:
    # scalar registers overflow into lanes of vector registers, not into memory
    spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    stack = _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    return _number(r"\.vgpr_count:\s+(\d+)", assembly), max(stack, spilled)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what the compiler says:\n{text[-2000:]}")
    return int(found[1])
