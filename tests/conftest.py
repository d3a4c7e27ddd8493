"""What holds for all tests; the environment is set before anything imports torch, triton or wandb."""

from __future__ import annotations

import os

# processes that tests start inherit all of these
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
# triton reads it at its import; TRITON_INTERPRET=0 runs the kernels on a GPU instead
os.environ.setdefault("TRITON_INTERPRET", "1")
# workers of pytest-xdist, one per core, would only get in each other's way with more threads
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(min(THREADS, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same global random state, whatever ran before it."""
    torch.manual_seed(0)
