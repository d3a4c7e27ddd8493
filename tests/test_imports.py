"""Imports point one way, and the heavy libraries are imported where they belong only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "difflut_lab"

# A part imports parts of lower levels only: those of one level stand beside each other.
LEVELS = [
    {"errors", "seeding"},
    {"registry"},
    {"schema", "__init__"},
    {"ops", "data", "augmentations"},
    {"nodes", "encoders", "heads", "schedules"},
    {"layers"},
    {"ternary"},
    {"models"},
    {"export", "testing"},
    {"training"},
    {"train.py", "scripts", "examples"},
]
# the model is handed tensors: where they come from is the training's business
NEVER = {(part, "data") for part in ("nodes", "encoders", "heads", "ternary", "layers", "models")}

OWNERS = {
    "lightning": ["difflut_lab/training/*", "scripts/*"],
    "pytorch_lightning": [],  # lightning under its old name; two names would be two class hierarchies
    "hydra": ["difflut_lab/training/*", "scripts/*"],
    "omegaconf": ["difflut_lab/training/*", "scripts/*"],
    "wandb": ["difflut_lab/training/*"],
    "triton": ["difflut_lab/ops/*/triton.py"],
    "numba": ["difflut_lab/ops/*/cpu.py"],
}
# modules that need a library that is slow to import or not there: the op that dispatches imports them when it runs them
LAZY = ["difflut_lab.ops.*.triton", "difflut_lab.ops.*.cpu"]
HEAVY = ["lightning", "wandb", "hydra", "numba", "triton", "torchvision", "sklearn"]


def sources() -> list[Path]:
    """All modules of the package, the scripts and the examples."""
    paths = [path for folder in (PACKAGE, "scripts", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*paths, ROOT / "train.py"]


def imports(tree: ast.AST, package: str, *, lazy: bool = False) -> Iterator[tuple[int, list[str], bool]]:
    """Line, names that may be the imported module (longest first), and whether a function must run first."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, [alias.name], lazy
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, [f"{module}.{alias.name}", module], lazy
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, lazy=lazy or inside)


def part_of(module: str) -> str:
    """The part of the package that a module of it belongs to: ``ops`` for ``difflut_lab.ops.lookup``."""
    part = module.removeprefix(PACKAGE).lstrip(".").split(".")[0]
    return part if any(part in level for level in LEVELS) else "__init__"


def level_of(part: str) -> int:
    return next(number for number, level in enumerate(LEVELS) if part in level)


def violations(path: str, source: str) -> list[str]:
    """What a file, named by its path from the root, imports and must not."""
    inside = path.startswith(f"{PACKAGE}/")
    module = path.removesuffix(".py").replace("/", ".")
    package = module.removesuffix(".__init__") if path.endswith("__init__.py") else module.rpartition(".")[0]
    first = path.split("/")[1 if inside else 0]
    importer = first if not inside else part_of(module)
    on_demand = any(fnmatch(module, pattern) for pattern in LAZY)
    found = []
    for line, names, lazy in imports(ast.parse(source), package):
        said = f"{path}:{line} imports {names[0]}"
        library = names[0].split(".")[0]
        if library in OWNERS and not any(fnmatch(path, owner) for owner in OWNERS[library]):
            found.append(f"{said}, which is for {', '.join(OWNERS[library]) or 'no one'}")
        if library != PACKAGE:
            continue
        imported = part_of(names[0])
        if imported != importer and level_of(imported) >= level_of(importer):
            found.append(f"{said}: {importer} stands below or beside {imported}")
        if (importer, imported) in NEVER:
            found.append(f"{said}: {importer} knows nothing of {imported}")
        if not lazy and not on_demand and any(fnmatch(name, pattern) for name in names for pattern in LAZY):
            found.append(f"{said} outside of a function")
    return found


def test_imports_point_one_way() -> None:
    found = [violation for path in sources() for violation in violations(str(path.relative_to(ROOT)), path.read_text())]
    assert not found, "\n".join(found)


def test_every_module_has_a_level() -> None:
    parts = {path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py") for path in (ROOT / PACKAGE).rglob("*.py")}
    assert parts <= set().union(*LEVELS)


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("difflut_lab/ops/wiring.py", "from difflut_lab.nodes import dwn", "ops stands below or beside nodes"),
        ("difflut_lab/nodes/dwn.py", "from difflut_lab import layers", "nodes stands below or beside layers"),
        ("difflut_lab/nodes/dwn.py", "from ..layers import base", "imports difflut_lab.layers.base"),
        ("difflut_lab/ops/__init__.py", "from ..layers import base", "imports difflut_lab.layers.base"),
        ("difflut_lab/heads/group_sum.py", "import difflut_lab.encoders", "heads stands below or beside encoders"),
        ("difflut_lab/registry.py", "def f():\n    import difflut_lab.schema", "registry.py:2 imports"),
        ("difflut_lab/models/base.py", "from difflut_lab.data import Split", "models knows nothing of data"),
        ("difflut_lab/models/base.py", "import lightning as L", "is for difflut_lab/training/*"),
        ("scripts/report.py", "import wandb.apis", "is for difflut_lab/training/*"),
        ("difflut_lab/ops/lookup/__init__.py", "import triton", "is for difflut_lab/ops/*/triton.py"),
        ("difflut_lab/ops/lookup/__init__.py", "from . import cpu", "outside of a function"),
        ("difflut_lab/ops/lookup/__init__.py", "from .triton import forward", "outside of a function"),
    ],
)
def test_what_points_the_wrong_way_is_found(path: str, source: str, said: str) -> None:
    assert said in "\n".join(violations(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("difflut_lab/nodes/dwn.py", "from difflut_lab.ops import lookup\nfrom .base import LUTNodes"),
        ("difflut_lab/training/run.py", "import lightning\nfrom difflut_lab import REGISTRY, data, schema"),
        ("difflut_lab/ops/lookup/__init__.py", "def f():\n    from difflut_lab.ops.lookup import triton"),
        ("difflut_lab/ops/lookup/triton.py", "import triton\nimport triton.language as tl"),
        ("difflut_lab/ops/lookup/cpu.py", "import numba\nfrom difflut_lab.ops.kernel.cpu import pack"),
        ("examples/my_layers.py", "from difflut_lab.layers import BaseLUTLayer"),
    ],
)
def test_what_points_the_right_way_is_not(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_importing_the_parts_is_light() -> None:
    # what torch imports by itself is not counted: some of its releases bring triton along
    parts = ["", ".ops", ".nodes", ".encoders", ".heads", ".layers", ".models", ".data"]
    script = f"""
import sys, torch
before = set(sys.modules)
import {", ".join(PACKAGE + part for part in parts)}
print(*[name for name in {HEAVY!r} if name in sys.modules and name not in before])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr
