"""Check the Triton kernels on this machine's GPU, then measure them: ``make gpu-check``, or ``ARGS=--quick`` for less.

Runs the tests of the kernels compiled for the GPU, where they run in Triton's interpreter otherwise, and then
``scripts/benchmark.py --device cuda``, which gets the options given here. What each printed, a summary of the tests and
one line to report go to ``outputs/gpu_check/<time>``. The exit status is 0 if every check passed, 1 if one failed, and
2 without a GPU.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(words: Sequence[str]) -> int:
    """Check and measure; the exit status."""
    import torch

    from difflut_lab.training.paths import claim, git_revision

    if not torch.cuda.is_available():
        print(f"gpu-check: there is no GPU here that torch {torch.__version__} can use; nothing was checked.")
        return 2
    directory = Path(claim(f"outputs/gpu_check/{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    tests = sorted(map(str, (ROOT / "tests" / "ops").glob("test_*triton*.py")))
    report = directory / "tests.xml"
    failed = run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests], directory / "tests.txt")
    counts = count(report)
    # pytest may fail without a test that does, and skip what it was to run
    checked = not failed and all(set(kinds) == {"passed"} for kinds in counts.values())
    measured = run(
        [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--device", "cuda", *words],
        directory / "benchmark.txt",
    )
    lines = [
        f"{', '.join(f'{number} {kind}' for kind, number in kinds.items()):>20}  {name}"
        for name, kinds in counts.items()
    ]
    passed = sum(kinds.get("passed", 0) for kinds in counts.values())
    total = sum(sum(kinds.values()) for kinds in counts.values())
    lines.append(
        f"gpu-check: {'all' if checked else 'NOT ALL'} of {total} checks passed ({passed}), "
        f"{torch.cuda.get_device_name()} ({architecture(torch)}), torch {torch.__version__}, triton {found('triton')}, "
        f"python {platform.python_version()}, revision {git_revision()}, "
        f"benchmark {'failed' if measured else 'done'}: {directory}"
    )
    (directory / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines]))
    return 0 if checked and not measured else 1


def run(command: Sequence[str], path: Path) -> int:
    """Run a command with compiled kernels, and show and keep what it prints; its exit status."""
    # products of matrices in the reference are deterministic with a workspace of their own
    words = {"TRITON_INTERPRET": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    environment = os.environ | words
    with (
        open(path, "w") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
    return process.returncode


def count(report: Path) -> dict[str, dict[str, int]]:
    """How many cases of each test passed, failed or were skipped, from pytest's report."""
    counts: dict[str, dict[str, int]] = {}
    if not report.exists():
        return counts
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        kind = next((outcomes[part.tag] for part in case if part.tag in outcomes), "passed")
        name = case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")
        kinds = counts.setdefault(f"{case.get('classname', '').rpartition('.')[2]}: {name}", {})
        kinds[kind] = kinds.get(kind, 0) + 1
    return counts


def architecture(torch: object) -> str:
    """Such as sm_90 or gfx942."""
    properties = torch.cuda.get_device_properties(0)  # type: ignore[attr-defined]  # imported late
    return getattr(properties, "gcnArchName", None) or f"sm_{properties.major}{properties.minor}"


def found(package: str) -> str:
    """The version of a package that may not be installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
