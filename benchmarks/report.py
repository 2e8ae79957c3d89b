"""What makes a measurement a publishable one: where it was taken, in a file that plots are made from."""

from __future__ import annotations

import csv
import io
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dppo_fast.runtime.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent


def write_csv(rows: Iterable[Mapping[str, Any]], surroundings: Mapping[str, Any], path: Path | None) -> None:
    """Print rows of equal columns as they come, and write them with ``surroundings`` to ``path``.

    The file is whole after every row, so that an interrupted run leaves what it has measured.
    """
    print(*(f"{name}={value}" for name, value in surroundings.items()), sep="  ")
    text = io.StringIO()
    writer = None
    for row in rows:
        cells = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        print(*(f"{name}={value}" for name, value in cells.items()), sep="  ", flush=True)
        cells |= surroundings
        if writer is None:
            writer = csv.DictWriter(text, list(cells), lineterminator="\n")
            writer.writeheader()
        writer.writerow(cells)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def environment(device: torch.device) -> dict[str, str | int]:
    """What a published number has to be accompanied by."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def _commit() -> str:
    """The checkout's commit, with ``-dirty`` where files differ from it; empty outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()
