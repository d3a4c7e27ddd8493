"""The tutorials are true: their code runs in the order of the page and prints what the page shows."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra.core.config_store import ConfigStore

from difflut_lab import REGISTRY
from difflut_lab.registry import KINDS

ROOT = Path(__file__).resolve().parents[1]
# each with the number of tests that its own files have
PAGES = {"custom_parts": 3, "ternary_layers": 0}
# small, so that the page's trainings take seconds here; what it shows is of whole ones
QUICK = ["model.widths=[40,20]", "trainer=cpu", "trainer.max_epochs=1", "data.val_fraction=0.5", "logger=none"]


class Block(NamedTuple):
    """A fenced block: its language, its text, and the text block that follows it at once, or None."""

    language: str
    text: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order; blocks of printed output belong to the block before."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    followed = [*found[1:], ("", "")]
    return [
        Block(language, text, after if kind == "text" else None)
        for (language, text), (kind, after) in zip(found, followed, strict=True)
        if language != "text"
    ]


BLOCKS = {name: blocks((ROOT / "docs" / f"{name}.md").read_text()) for name in PAGES}
COMMANDS = [(name, block) for name, page in BLOCKS.items() for block in page if block.language == ""]


def file_of(block: Block) -> str | None:
    """The file that a block of Python is a part of, as its first line says."""
    named = re.match(r"# (\w+\.py)\n", block.text) if block.language == "python" else None
    return named.group(1) if named else None


def write_files(page: str, folder: Path) -> None:
    """What a reader who follows the page has written at its end."""
    for block in BLOCKS[page]:
        if name := file_of(block):
            with open(folder / name, "a") as file:
                file.write(block.text)


@pytest.fixture
def _forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start in an empty folder; afterwards forget the modules and parts that came from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # blocks are appended to a module faster than the clock of compiled files ticks
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    parts = {kind: dict(REGISTRY._loaded(kind)) for kind in KINDS}
    yield
    for name in {file_of(block) for page in BLOCKS.values() for block in page} - {None}:
        sys.modules.pop(str(name).removesuffix(".py"), None)
    for kind, known in parts.items():
        for added in set(REGISTRY._parts[kind]) - set(known):
            del REGISTRY._parts[kind][added]
            ConfigStore.instance().repo.get(kind, {}).pop(f"{added}.yaml", None)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("page", PAGES)
def test_python_runs_and_prints_what_the_page_shows(page: str, tmp_path: Path) -> None:
    names: dict[str, object] = {}
    ran = []
    for block in BLOCKS[page]:
        if block.language != "python":
            continue
        name = file_of(block)
        if name:
            with open(tmp_path / name, "a") as file:
                file.write(block.text)
            module = importlib.import_module(name.removesuffix(".py"))
            importlib.invalidate_caches()
            module = importlib.reload(module)
            for function in [value for key, value in vars(module).items() if key.startswith("test_")]:
                function()
                ran.append(function)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, f"{page}.md", "exec"), names)
        assert printed.getvalue() == (block.output or ""), block.text
    assert len(ran) == PAGES[page]


@pytest.mark.parametrize(
    ("page", "block"), COMMANDS, ids=["sweep" if "-m" in block.text.split() else "run" for _, block in COMMANDS]
)
def test_commands_run_and_print_what_the_page_shows(page: str, block: Block, tmp_path: Path) -> None:
    write_files(page, tmp_path)
    command = shlex.split(block.text)
    assert command[:2] == ["python", "train.py"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *command[2:], *QUICK],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"COLUMNS": "140"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    wanted, printed = labels(block.output or ""), labels(result.stdout)
    assert wanted <= printed, wanted - printed


def labels(output: str) -> set[str]:
    """The words of a printed table that are the same in every training: what its rows and columns are called."""
    cells = [cell.strip() for line in output.splitlines() for cell in re.split("[│┃]", line)[1:-1]]
    return {re.sub(r"\d+", "0", cell) for cell in cells if re.match("[a-z]", cell)}


def test_the_pages_have_few_commands_because_each_is_a_process() -> None:
    assert len(COMMANDS) == 2
