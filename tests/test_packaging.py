"""The wheel: what it holds, and that what it installs works away from the source checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]


def build(directory: Path, version: str) -> Path:
    """Build the wheel, standard or editable, as pip does after it has installed the build backend."""
    return Path(next(WheelBuilder(str(ROOT)).build(directory=str(directory), versions=[version])))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "standard")


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def files(folder: str, pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}


def test_wheel_holds_package_and_configurations_and_nothing_else(wheel: Path) -> None:
    modules = files("difflut_lab", "*.py") | {"difflut_lab/py.typed"}
    configurations = {f"difflut_lab/{name}" for name in files("configs", "*.yaml")}
    assert "difflut_lab/configs/train.yaml" in configurations
    held = {name for name in names(wheel) if ".dist-info/" not in name}
    assert held == modules | configurations


def test_wheel_metadata(wheel: Path) -> None:
    folder = "difflut_lab-0.1.0.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{folder}/METADATA").decode()
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
    assert "License-Expression: MIT" in metadata
    assert f"{folder}/licenses/LICENSE" in names(wheel)
    assert "difflut-lab = difflut_lab.training:main" in scripts


def test_editable_install_copies_no_configurations(tmp_path: Path) -> None:
    editable = build(tmp_path, "editable")
    assert {name for name in names(editable) if ".dist-info/" not in name} == {"_difflut_lab.pth"}
    assert zipfile.ZipFile(editable).read("_difflut_lab.pth").decode().split() == [str(ROOT)]


def test_torch_is_not_capped() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in ("torch>", "torchvision>", "triton>"):
        (requirement,) = (dependency for dependency in dependencies if dependency.startswith(name))
        assert "<" not in requirement
        assert "=" not in requirement.split(";")[0].replace(">=", "")


def test_installed_wheel_trains_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, work = tmp_path / "installed", tmp_path / "work"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(installed), str(wheel)], check=True, stdin=subprocess.DEVNULL)
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    overrides = ["data=digits", "model.widths=[100,50]", "trainer=cpu", "trainer.max_epochs=1", "logger=none"]
    result = subprocess.run(
        [installed / "bin" / "difflut-lab", *overrides],
        capture_output=True,
        text=True,
        cwd=work,
        env=environment | {"PYTHONPATH": str(installed)},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    # compiled as it was imported: what ran is the installed copy and not the checkout
    assert (installed / "difflut_lab" / "training" / "__pycache__").is_dir()
    assert [path.name for path in work.iterdir()] == ["outputs"]
    (run,) = (work / "outputs" / "runs").iterdir()
    assert json.loads((run / "metrics.json").read_text())["epochs"] == 1
    assert (run / "checkpoints" / "best.ckpt").exists()
