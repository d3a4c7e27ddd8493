"""Blocks are tried once for each kind of launch, and once on a machine; checked with a GPU that only answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# a driver that says what the GPU is and takes times, and kernels that are not run: the rest is Triton's
DRIVER = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched = []
trials = 0

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self):
        def measure(call, quantiles):
            global trials
            trials += 1
            call()
            return [seconds(*launched[-1])] * 3

        return measure

driver.set_active(Driver())

def record(kernel, *names):
    kernel.fn.run = lambda *args, **words: launched.append([words[name] for name in names])
"""

NODES = """
from difflut_lab.ops import Flips, Wiring
from difflut_lab.ops.flips import Draw
from difflut_lab.ops.lookup import triton as hard

record(hard.evaluate, "GROUPS", "num_warps")

def seconds(groups, warps):
    # the widest block of one warp is the fastest
    return 1 / groups + warps

def forward(n=6, nodes=20, batch=100, flips=False, dtype=torch.float32):
    before = trials
    indices = torch.zeros(nodes, n, dtype=torch.int32)
    draw = Draw(torch.tensor(1), 100, 3, 0, 0) if flips else None
    hard.forward(torch.zeros(batch, 9, dtype=dtype), torch.zeros(nodes, 2**n), n, indices, False, draw)
    return trials - before, launched[-1]

first = forward()
print(json.dumps({
    "first": first,
    "again": forward(),
    "another batch": forward(batch=120),
    "larger batch": forward(batch=200),
    "fan-in": forward(n=4),
    "nodes": forward(nodes=21),
    "flips": forward(flips=True),
    "dtype": forward(dtype=torch.bfloat16),
}))
"""

PRODUCTS = """
from difflut_lab.ops.ternary_linear import triton as fast

for kernel in (fast.multiply, fast.multiply_floats, fast.multiply_one, fast.convolve, fast.convolve_floats):
    record(kernel, "TOKENS", "OUTPUTS", "INPUTS", "num_warps")
record(fast.round_values, "ROWS", "VALUES")

def seconds(first, second, *others):
    # the block with the most outputs is the fastest
    return 1 / (first * second)

def forward(tokens=100, outputs=300, skew=False, bits=None, dtype=torch.float16):
    before = trials
    codes, scale = torch.zeros(outputs, 5, dtype=torch.int32), torch.zeros(outputs)
    bias, factor = (None, scale) if skew else (scale, None)
    fast.linear(torch.zeros(tokens, 70, dtype=dtype), codes, scale, bias, factor, None, bits)
    return trials - before, launched[-1]

def convolve(size=9, dtype=torch.float16):
    before = trials
    x, codes, scale = torch.zeros(2, 8, size, size, dtype=dtype), torch.zeros(6, 5, dtype=torch.int32), torch.zeros(6)
    fast.conv2d(x, codes, scale, None, None, (6, 8, 3, 3), (1, 1), (1, 1), 1, None, None)
    return trials - before, launched[-1]

print(json.dumps({
    "first": forward(),
    "again": forward(),
    "another batch": forward(tokens=120),
    "few": forward(tokens=20),
    "outputs": forward(outputs=301),
    "skew": forward(skew=True),
    "bytes": forward(bits=8),
    "floats": forward(dtype=torch.float32),
    "single": forward(tokens=2),
    "convolution": convolve(),
    "convolution again": convolve(),
    "small convolution": convolve(size=2),
    "convolution of floats": convolve(dtype=torch.float32),
}))
"""


def tune(script: str, cache: Path) -> dict[str, Any]:
    """How many blocks a process tried at each launch, and which one it launched."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", DRIVER + script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_blocks_are_tried_once(tmp_path: Path) -> None:
    found = tune(NODES, tmp_path)
    blocks, chosen = found["first"]
    assert blocks > 2
    assert chosen == [32, 1]
    for same in ("again", "another batch"):
        assert found[same] == [0, chosen]
    for other in ("larger batch", "fan-in", "nodes", "flips", "dtype"):
        assert found[other] == [blocks, chosen]
    # what one process found is on the disk for the next
    assert all(launch == [0, chosen] for launch in tune(NODES, tmp_path).values())


def test_blocks_of_products_are_tried_once(tmp_path: Path) -> None:
    found = tune(PRODUCTS, tmp_path)
    # few tokens want small blocks, and so does a skew, with twice the accumulators; bytes try how to round as well
    assert found == {
        "first": [5, [128, 128, 64, 8]],
        "again": [0, [128, 128, 64, 8]],
        "another batch": [0, [128, 128, 64, 8]],
        "few": [2, [16, 128, 64, 4]],
        "outputs": [5, [128, 128, 64, 8]],
        "skew": [3, [64, 64, 64, 4]],
        "bytes": [8, [128, 128, 64, 8]],
        "floats": [4, [64, 64, 16, 8]],
        "single": [4, [1, 16, 256, 4]],
        "convolution": [4, [128, 64, 32, 8]],
        "convolution again": [0, [128, 64, 32, 8]],
        "small convolution": [0, [16, 32, 64, 4]],
        "convolution of floats": [4, [64, 64, 16, 8]],
    }
    assert not any(trials for trials, _ in tune(PRODUCTS, tmp_path).values())
