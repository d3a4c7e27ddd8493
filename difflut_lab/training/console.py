"""The screen: light to import, because a sweep's parent and ``--help`` need nothing heavier."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console


def new_console() -> Console:
    """The standard output; a file or a pipe has no width of its own and gets 120 columns."""
    return Console(width=None if sys.stdout.isatty() else 120)


def shown_path(path: Path) -> Path:
    """A path as a person in the working directory would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
