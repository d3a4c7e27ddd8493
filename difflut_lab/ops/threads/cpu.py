"""Kernels on the threads that torch computes with.

torch keeps a team of OpenMP threads, which spin for a while after each of its operations. A second pool would take
turns with them on the same cores and start each piece of work late, so kernels run on that team. Its entry point takes
a plain C function: a few instructions around a compiled kernel, emitted here, that claim runs of nodes until none is
left. Nothing is handed out in advance, and no run waits for a thread that came late.

What holds for torch's operations holds here: a forked process whose parent has used several threads hangs on more than
one (start processes by spawning them).
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir

_log = logging.getLogger(__name__)

# nanoseconds of work that are worth a thread
SHARE = 30_000
RUNS_PER_THREAD = 4

# what the threads share: the next run, how many there are, nodes, runs that failed; then the kernel's arguments
NEXT, RUNS, TOTAL, FAILED, ARGUMENTS = range(5)
ROOM = 256

I32, I64 = ir.IntType(32), ir.IntType(64)

# where the machine code of a claimer is, by kernel and kinds of arguments; and what keeps it alive
_claimers: dict[Any, int] = {}
_engines: list[Any] = []


def run(function: Any, total: int, work: int, *arguments: Any) -> None:
    """Call ``function(begin, end, *arguments)`` for runs of 0 .. ``total``, on as many threads as torch would use.

    Parameters
    ----------
    function : kernel
        Writes what its run of nodes owns and nothing else, so that runs may go in any order.
    total : int
        Nodes, or whatever the kernel counts.
    work : int
        Nanoseconds that all of it takes, roughly. Little work is done by the calling thread alone.
    *arguments
        Passed on: contiguous arrays, numbers, and tuples of integers.
    """
    threads = min(torch.get_num_threads(), total, work // SHARE)
    begin_team = _team() if threads > 1 else None
    if begin_team is None:
        function(0, total, *arguments)
        return
    job = (ctypes.c_int64 * ROOM)(0, min(total, RUNS_PER_THREAD * threads), total, 0)
    place = ARGUMENTS
    for argument in arguments:
        for value in _flat(argument):
            if isinstance(value, float):
                ctypes.c_double.from_buffer(job, 8 * place).value = value
            else:
                job[place] = value
            place += 1
    key = function, *map(_kind, arguments)
    if key not in _claimers:
        _claimers[key] = _claimer(function, arguments)
    begin_team(_claimers[key], job, threads, 0)
    if job[FAILED]:
        # alone, it raises what went wrong
        function(0, total, *arguments)


def _kind(argument: Any) -> Any:
    """What decides how a kernel takes an argument."""
    if isinstance(argument, np.ndarray):
        return argument.dtype.char, argument.ndim
    return len(argument) if isinstance(argument, tuple) else type(argument)


def _flat(argument: Any) -> tuple[Any, ...]:
    """An argument as numba passes it on: an array by its owner, sizes, address, shape and strides."""
    if isinstance(argument, np.ndarray):
        return 0, 0, argument.size, argument.itemsize, argument.ctypes.data, *argument.shape, *argument.strides
    if isinstance(argument, tuple):
        return argument
    return (float(argument) if isinstance(argument, float | np.floating) else int(argument),)


@functools.cache
def _team() -> Callable[..., None] | None:
    """The entry point of torch's OpenMP: ``(function, data, threads, flags)``; None where there is none."""
    # looks into what torch is linked to; the runtimes of LLVM and Intel have GNU's entry points, too
    torch_library = ctypes.CDLL(torch._C.__file__)
    if hasattr(torch_library, "GOMP_parallel"):
        entry = torch_library.GOMP_parallel
        entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
        return entry
    _log.warning("CPU kernels use one thread: torch has no OpenMP threads")
    return None


def _claimer(function: Any, arguments: tuple[Any, ...]) -> int:
    """Machine code that claims runs and calls a kernel for each, as a function of the address of what threads share."""
    signature = tuple(numba.typeof(argument) for argument in (0, 0, *arguments))
    function.compile(signature)
    compiled = function.overloads[signature]
    convention = compiled.target_context.call_conv
    called = convention.get_function_type(compiled.fndesc.restype, compiled.fndesc.argtypes)
    module = ir.Module(name=f"claim_{len(_claimers)}")
    module.triple = binding.get_process_triple()
    claimer = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), name=module.name)
    entry, claim, call, done = (claimer.append_basic_block(name) for name in ("entry", "claim", "call", "done"))
    job = claimer.args[0]
    builder = ir.IRBuilder(entry)

    def load(place: int, kind: ir.Type = I64) -> ir.Value:
        value = builder.load(builder.gep(job, [I64(place)]))
        if isinstance(kind, ir.PointerType):
            return builder.inttoptr(value, kind)
        if isinstance(kind, ir.IntType):
            return value if kind == I64 else builder.trunc(value, kind)
        number = builder.bitcast(value, ir.DoubleType())
        return number if kind == ir.DoubleType() else builder.fptrunc(number, kind)

    kernel = builder.inttoptr(
        I64(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)), called.as_pointer()
    )
    results = [builder.alloca(kind.pointee) for kind in called.args[:2]]
    passed = [load(ARGUMENTS + i, kind) for i, kind in enumerate(called.args[4:])]
    runs, total = load(RUNS), load(TOTAL)
    builder.branch(claim)
    builder.position_at_end(claim)
    index = builder.atomic_rmw("add", builder.gep(job, [I64(NEXT)]), I64(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", index, runs), call, done)
    builder.position_at_end(call)
    bounds = [builder.sdiv(builder.mul(total, number), runs) for number in (index, builder.add(index, I64(1)))]
    status = builder.call(kernel, [*results, *bounds, *passed])
    failed = builder.zext(builder.icmp_signed("!=", status, I32(0)), I64)
    builder.atomic_rmw("add", builder.gep(job, [I64(FAILED)]), failed, "monotonic")
    builder.branch(claim)
    builder.position_at_end(done)
    builder.ret_void()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(module.name))
