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
SCRIPT = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from difflut_lab.ops import Flips, Wiring
from difflut_lab.ops.flips import Draw
from difflut_lab.ops.lookup import triton as hard

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
            # the widest block of one warp is the fastest
            seconds = 1 / launched[-1][0] + launched[-1][1]
            return [seconds] * 3

        return measure

driver.set_active(Driver())
hard.evaluate.fn.run = lambda *args, **words: launched.append((words["GROUPS"], words["num_warps"]))

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


def tune(cache: Path) -> dict[str, Any]:
    """How many blocks a process tried at each launch, and which one it launched."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_blocks_are_tried_once(tmp_path: Path) -> None:
    found = tune(tmp_path)
    blocks, chosen = found["first"]
    assert blocks > 2
    assert chosen == [32, 1]
    for same in ("again", "another batch"):
        assert found[same] == [0, chosen]
    for other in ("larger batch", "fan-in", "nodes", "flips", "dtype"):
        assert found[other] == [blocks, chosen]
    # what one process found is on the disk for the next
    assert all(launch == [0, chosen] for launch in tune(tmp_path).values())
