"""What the machine can do at most, measured: memory and multiply-adds per second, in float32, on the threads in use."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

# independent sums: enough for two units with a latency of four or five cycles each, and few enough for 16 registers
SUMS = 12
BURST = 500_000
MATRIX = 512
SLICE = 16 << 20
FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Rates per second. The best of many short runs: a busy machine shows its limits only now and then."""

    copy_bandwidth: float
    """Bytes read and written by a copy of a tensor that is much larger than the last cache, slice after slice."""
    multiply_adds: float
    """Fused multiply-adds; on a GPU those of a matrix product, without TF32."""
    matrix_product: float
    """Multiply-adds of a product of square matrices, 512 rows each, 8192 on a GPU."""

    def __str__(self) -> str:
        return (
            f"copy {self.copy_bandwidth / 1e9:.1f} GB/s, multiply-adds {self.multiply_adds / 1e9:.1f} G/s, "
            f"in a matrix product {self.matrix_product / 1e9:.1f} G/s"
        )


def measure_limits(device: str) -> Limits:
    """Measure the limits of a device, ``"cpu"`` or ``"cuda"``; takes a second or two."""
    on_cpu = device == "cpu"
    copy = _copy_bandwidth(device, max(128 << 20, 4 * _last_cache()) if on_cpu else 1 << 30)
    rows = MATRIX if on_cpu else 16 * MATRIX
    matrix = torch.rand(rows, rows, device=device)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        product = rows**3 / min(_seconds(lambda: torch.mm(matrix, matrix), device) for _ in range(20))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return Limits(copy_bandwidth=copy, multiply_adds=_multiply_adds() if on_cpu else product, matrix_product=product)


def _seconds(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _copy_bandwidth(device: str, size: int) -> float:
    source = torch.ones(size // FLOAT, device=device)
    target = torch.zeros_like(source)
    # short enough to be left alone by the machine's other programs now and then; a GPU needs one long copy
    pieces = source.split(SLICE // FLOAT if device == "cpu" else source.numel())
    places = target.split(pieces[0].numel())
    best = min(
        _seconds(lambda place=place, piece=piece: place.copy_(piece), device) / piece.nbytes  # type: ignore[misc]
        for _ in range(4)
        for place, piece in zip(places, pieces, strict=True)
        if piece.numel() == pieces[0].numel()
    )
    return 2 / best


def _last_cache() -> int:
    """Bytes of the largest cache, 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("K")) << 10 for size in sizes if size.rstrip("K").isdecimal()), default=0)


def _multiply_adds() -> float:
    """Fused multiply-adds per second, with all of torch's threads at work."""
    spin, lanes = _compile()
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        # calls through ctypes do without Python's lock
        seconds = min(
            _seconds(lambda: list(pool.map(lambda _: spin(BURST, 0.5), range(threads))), "cpu") for _ in range(60)
        )
    return threads * SUMS * lanes * BURST / seconds


def _compile() -> tuple[Callable[[int, float], float], int]:
    """A loop of multiply-adds into independent sums in vector registers, and the floats in such a register."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    lanes = 16 if features.get("avx512f", False) else 8
    vector = f"<{lanes} x float>"
    # sums that begin with one value would be one sum to the compiler
    starts = ["<" + ", ".join([f"float {c:e}"] * lanes) + ">" for c in range(SUMS)]
    phis = [f"%a{c} = phi {vector} [{starts[c]}, %entry], [%b{c}, %loop]" for c in range(SUMS)]
    fused = f"call {vector} @llvm.fma.v{lanes}f32"
    updates = [f"%b{c} = {fused}({vector} %a{c}, {vector} %factors, {vector} %factors)" for c in range(SUMS)]
    totals = [f"%t{c + 1} = fadd {vector} %t{c}, %b{c}" for c in range(SUMS)]
    code = f"""
        declare {vector} @llvm.fma.v{lanes}f32({vector}, {vector}, {vector})
        define float @spin(i64 %count, float %factor) {{
        entry:
          %one = insertelement {vector} undef, float %factor, i32 0
          %factors = shufflevector {vector} %one, {vector} undef, <{lanes} x i32> zeroinitializer
          br label %loop
        loop:
          %i = phi i64 [0, %entry], [%next, %loop]
          {chr(10).join(phis)}
          {chr(10).join(updates)}
          %next = add i64 %i, 1
          %more = icmp slt i64 %next, %count
          br i1 %more, label %loop, label %end
        end:
          %t0 = fadd {vector} %factors, %factors
          {chr(10).join(totals)}
          %result = extractelement {vector} %t{SUMS}, i32 0
          ret float %result
        }}"""
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    engine = binding.create_mcjit_compiler(binding.parse_assembly(code), machine)
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64, ctypes.c_float)(engine.get_function_address("spin"))

    def spin(count: int, factor: float) -> float:
        # the code lives as long as its engine
        assert engine is not None
        return float(function(count, factor))

    return spin, lanes
