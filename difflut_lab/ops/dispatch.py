"""Which backend computes an op.

A backend of an op is a module beside its public function, with the functions ``forward`` and ``backward``. A fast one
declines with a reason what it does not compute, and the reference, which computes everything, takes its place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from difflut_lab.errors import ConfigError
from difflut_lab.ops.shapes import compute_dtype

# auto never takes triton: its kernels are checked in the interpreter and compiled, but have not run on a GPU yet
KERNELS = ("auto", "reference", "cpu", "triton")
VARIABLE = "DIFFLUT_LAB_KERNELS"
# an address is a byte, and a table fits into the nearest cache
CPU_MAX_FAN_IN = 8

_log = logging.getLogger(__name__)
_configured = "auto"
_chosen: dict[str, str] = {}


def use_kernels(name: str) -> None:
    """Choose what computes the ops of this process.

    Parameters
    ----------
    name : str
        ``"auto"`` for the fastest backend that takes an op's arguments, or the name of a backend. With ``"auto"`` the
        environment variable ``DIFFLUT_LAB_KERNELS`` decides, where it is set.

    Raises
    ------
    ConfigError
        If there is no such backend.
    """
    global _configured
    _check(name, "kernels")
    _configured = name
    kernels()
    _chosen.clear()
    backend.cache_clear()


def kernels() -> str:
    """What is asked for: the name given to ``use_kernels``, or that in the environment.

    Raises
    ------
    ConfigError
        If the environment names a backend that there is not.
    """
    if _configured != "auto":
        return _configured
    return _check(os.environ.get(VARIABLE) or "auto", VARIABLE)


def chosen_kernels() -> dict[str, str]:
    """What computed each op so far: a backend's name, or ``"reference (why)"``."""
    return dict(_chosen)


def choose(op: str, n: int, *tensors: Tensor, plain: str = "") -> ModuleType:
    """The module that computes an op.

    Parameters
    ----------
    op : str
        Such as ``"interpolate"``.
    n : int
        Inputs per node; 0 of ops without nodes.
    *tensors : Tensor
        What it computes with. All are on one device.
    plain : str
        Why only the reference computes it, such as ``"scales differ by group"``; empty where fast ones may.
    """
    return backend(op, kernels(), n, tensors[0].device.type, compute_dtype(*tensors), plain)


@functools.cache
def backend(op: str, asked: str, n: int, device: str, dtype: torch.dtype, plain: str = "") -> ModuleType:
    """The module that computes an op for arguments of a kind; see ``choose``."""
    wanted = "cpu" if asked == "auto" else asked
    why = ""
    if plain and wanted != "reference":
        why = plain
    elif wanted == "cpu":
        why = cpu_declines(n, device, dtype)
    elif wanted == "triton":
        why = triton_declines(op, n, device, dtype)
    name = "reference" if why else wanted
    choice = f"{name} ({why})" if why else name
    if op not in _chosen or _chosen[op] != choice:
        level = logging.WARNING if why and asked != "auto" else logging.INFO
        _log.log(level, "kernels of %s: %s", op, choice)
    _chosen[op] = choice
    return importlib.import_module(f"difflut_lab.ops.{op}.{name}")


def cpu_declines(n: int, device: str, dtype: torch.dtype) -> str:
    """Why the CPU kernels do not take arguments of a kind; empty if they do."""
    if device != "cpu":
        return f"tensors are on {device}"
    if dtype != torch.float32:
        return f"computes in {str(dtype).removeprefix('torch.')}"
    if n > CPU_MAX_FAN_IN:
        return f"n = {n} is more than {CPU_MAX_FAN_IN}"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    return ""


def triton_declines(op: str, n: int, device: str, dtype: torch.dtype) -> str:
    """Why the Triton kernels do not take an op with arguments of a kind; empty if they do."""
    if importlib.util.find_spec(f"difflut_lab.ops.{op}.triton") is None:
        return "has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("triton.knobs") is None:
        return "triton is older than 3.4"
    declines: Callable[[int, str, torch.dtype], str] = importlib.import_module("difflut_lab.ops.kernel.triton").declines
    return declines(n, device, dtype)


def _check(name: str, key: str) -> str:
    if name not in KERNELS:
        raise ConfigError(f"{key}={name}: there is no such backend. Backends: {', '.join(KERNELS)}.")
    return name
