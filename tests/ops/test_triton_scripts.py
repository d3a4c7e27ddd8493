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
    kept = compile_kernels.Row("lookup.evaluate", 6, "fp32", "sm_80", "256", 1, 60, 0, 0)
    compile_kernels.fail_on_spills([kept])
    with pytest.raises(SystemExit, match=r"spilled registers: lookup\.evaluate n=6 fp32 gfx942: 8 bytes") as error:
        compile_kernels.fail_on_spills([kept, kept._replace(target="gfx942", spilled=8)])
    assert isinstance(error.value.code, str)  # which is status 1


INSTRUCTIONS = [
    ("int8", "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8", True),
    ("int8", "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8", True),
    ("int8 skew", "v_mfma_i32_32x32x16_i8", True),
    ("int8", "v_mfma_f32_32x32x8_f16", False),
    ("int8 skew", "mma.sync.aligned.m16n8k16.row.col.f32.f16", False),
    ("int8", "", False),
    ("fp16", "v_mfma_f32_32x32x8_f16", True),
]


@pytest.mark.parametrize(("launch", "instruction", "passes"), INSTRUCTIONS)
def test_bytes_multiplied_as_floats_fail(launch: str, instruction: str, passes: bool) -> None:
    compile_kernels = script("compile_kernels")
    if instruction:
        # with what follows it in the assembly
        assert compile_kernels.MATRIX.search(f"\t{instruction}.s32 {{%r1}};")[0] == instruction
    row = compile_kernels.Row("ternary_linear.multiply", 0, launch, "sm_90", "64x64x64", 4, 60, 0, 0, instruction)
    if passes:
        compile_kernels.fail_without_integers([row])
        return
    with pytest.raises(SystemExit, match=f"as integers: ternary_linear.multiply {launch} sm_90: {instruction}"):
        compile_kernels.fail_without_integers([row])


def test_tables_are_of_what_was_compiled() -> None:
    compile_kernels = script("compile_kernels")
    product = compile_kernels.Row("ternary_linear.multiply", 0, "int8", "sm_90", "64x64x64", 4, 60, 0, 32)
    node = compile_kernels.Row("lookup.evaluate", 6, "fp32 flips", "sm_90", "256", 1, 61, 0, 0)
    rows = [product, product._replace(target="gfx942", registers=59), node]
    found = compile_kernels.tables(rows)
    assert list(found) == ["resources", "limits", "products"]
    assert "| `lookup.evaluate` | 6 | 256 | 1 | 61, 0, 0 |" in found["resources"]
    assert "| `ternary_linear.multiply` | int8 | 64x64x64 | 4 | 60, 0, 32 | 59, 0, 32 |" in found["products"]
    assert list(compile_kernels.tables(rows[:2])) == ["products"]
    assert list(compile_kernels.tables(rows[2:])) == ["resources", "limits"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_bytes_are_multiplied_as_integers(target: str) -> None:
    # the script fails where they are not
    command = [sys.executable, str(SCRIPTS / "compile_kernels.py"), "--targets", target, "--launches", "int8"]
    kernels = ["ternary_linear.multiply", "ternary_linear.convolve"]
    done = subprocess.run([*command, "--kernels", *kernels], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kernels" in done.stdout


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
