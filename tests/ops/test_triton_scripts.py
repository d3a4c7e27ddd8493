"""The scripts that compile and check the Triton kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

SCRIPTS = Path(__file__).parents[2] / "scripts"

# all entries at once for four samples are more than a thread has registers
SPILLING = """
from difflut_lab.ops.interpolate.triton import _evaluate
from difflut_lab.ops.kernel.triton import Launch, compile_ahead, kernel
print(compile_ahead(kernel(_evaluate, values=64), "sm_90", 8, Launch(flips=False)).spilled)
"""


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_spill_fails() -> None:
    compile_kernels = script("compile_kernels")
    kept = compile_kernels.Row("lookup.evaluate", 6, "fp32", "sm_80", 256, 1, 60, 0, 0)
    compile_kernels.fail_on_spills([kept])
    with pytest.raises(SystemExit, match=r"spilled registers: lookup\.evaluate n=6 fp32 gfx942: 8 bytes") as error:
        compile_kernels.fail_on_spills([kept, kept._replace(target="gfx942", spilled=8)])
    assert isinstance(error.value.code, str)  # which is status 1


@pytest.mark.slow
def test_spills_are_seen(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SPILLING], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_says_that_there_is_no_gpu() -> None:
    done = subprocess.run([sys.executable, str(SCRIPTS / "gpu_check.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith("gpu-check: there is no GPU here")
    assert done.stdout.count("\n") == 1


def test_gpu_check_counts_what_passed(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2, 3])\n"
        "def test_sums(n):\n    assert n != 2\n"
        "def test_others():\n    pytest.skip('not here')\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(tmp_path)]
    gpu_check = script("gpu_check")
    assert gpu_check.run(command, tmp_path / "out.txt") == 1
    assert "1 failed, 2 passed, 1 skipped" in (tmp_path / "out.txt").read_text()
    assert gpu_check.count(report) == {
        "test_some: sums": {"passed": 2, "failed": 1},
        "test_some: others": {"skipped": 1},
    }
