"""What holds for all tests; the environment is set before anything imports torch, triton or wandb."""

from __future__ import annotations

import os

# processes that tests start inherit all of these
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
# triton reads it at its import; TRITON_INTERPRET=0 runs the kernels on a GPU instead
os.environ.setdefault("TRITON_INTERPRET", "1")
# small networks gain nothing by a second thread, and lose much where another program has the core
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same global random state, whatever ran before it."""
    torch.manual_seed(0)
