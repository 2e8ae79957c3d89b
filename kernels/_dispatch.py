"""Which backend runs an op, and what its arguments have to be."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Collection
from functools import cache
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from dppo_fast.runtime.native import BUILD_HINT, native

Backend: TypeAlias = Literal["reference", "triton", "native"]

log = logging.getLogger(__name__)


def resolve(op: str, device: torch.device, backends: Collection[Backend], requested: Backend | None = None) -> Backend:
    """The backend, one of ``backends``, on which ``op`` runs for tensors on ``device``.

    The first of these that says something decides: ``requested``, the op's argument; the environment variable
    DPPO_FAST_BACKEND, for the ops that have that backend; the device (Triton on CUDA, C++ on the CPU, where the op has
    it and it is there, else the reference). This last, automatic choice is logged once per op and device type.

    Raises ValueError if what was asked for is no backend, or for ``requested`` none of this op; RuntimeError if it
    cannot run here.
    """
    if requested is not None:
        if requested not in backends:
            raise ValueError(f"backend={requested!r}: {op} has the backends {', '.join(backends)}")
        return _usable(op, requested, device, f"backend={requested!r}")

    forced = os.environ.get("DPPO_FAST_BACKEND")
    if forced and forced not in get_args(Backend):
        raise ValueError(f"DPPO_FAST_BACKEND={forced}: the backends are {', '.join(get_args(Backend))}")
    for backend in backends:
        if backend == forced:
            return _usable(op, backend, device, f"DPPO_FAST_BACKEND={forced}")

    choice: Backend = "triton" if device.type == "cuda" else "native" if device.type == "cpu" else "reference"
    if choice not in backends or _obstacle(choice, device) is not None:
        choice = "reference"
    _log_choice(op, device.type, choice)
    return choice


def check_tensor(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Refuse an argument of ``op`` with another dtype (TypeError), shape or device (ValueError)."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")


def _usable(op: str, backend: Backend, device: torch.device, asked: str) -> Backend:
    obstacle = _obstacle(backend, device)
    if obstacle is not None:
        raise RuntimeError(f"{asked} cannot run {op}: {obstacle}")
    return backend


def _obstacle(backend: Backend, device: torch.device) -> str | None:
    if backend == "native" and native() is None:
        return f"the C++ extension is not built; {BUILD_HINT}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it exists for Linux only)"
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, and Triton needs CUDA (or TRITON_INTERPRET=1, for tests)"
    return None


@cache
def _log_choice(op: str, device_type: str, backend: Backend) -> None:
    log.info("%s runs on %s with the %s backend", op, device_type, backend)
