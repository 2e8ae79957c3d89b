"""All Triton kernels go through the real compiler, for GPUs that need not be there; and Triton need not be there."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import dppo_fast

ROOT = Path(dppo_fast.__file__).parents[1]
TABLE = ROOT / "docs" / "kernels.md"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class Row(NamedTuple):
    """A row of the table of resources, as text."""

    call: str
    kernel: str
    target: str
    registers: str
    shared: str
    spills: str


def rows(markdown: str) -> list[Row]:
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    return [Row(*row) for row in cells if len(row) == 6 and re.fullmatch(r"sm_\d+", row[2])]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The table as this Triton's compiler has it, without its cache and outside of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.kernel_resources"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return rows(result.stdout)


@needs_triton
def test_every_kernel_compiles_without_spills(compiled: list[Row]) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    for target in ("sm_80", "sm_90"):
        assert {row.kernel.strip("`") for row in compiled if row.target == target} == kernels
    assert [row for row in compiled if row.spills != "0"] == []


@needs_triton
def test_the_table_in_the_documentation_lists_them_all(compiled: list[Row]) -> None:
    """With the same numbers, where it was made by the same Triton."""
    import triton

    text = TABLE.read_text()
    documented = rows(text)
    assert [row[:3] for row in documented] == [row[:3] for row in compiled]
    if f"Triton {triton.__version__}" in text:
        assert documented == compiled


def test_kernels_can_be_imported_without_triton() -> None:
    code = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import torch
import dppo_fast.kernels
for module in pkgutil.iter_modules(dppo_fast.kernels.__path__):
    importlib.import_module(f"dppo_fast.kernels.{module.name}")
from dppo_fast.kernels.ppo_loss import value_loss
one = torch.ones(2)
assert value_loss(one, one, one) == 0
try:
    value_loss(one, one, one, backend="triton")
except RuntimeError as error:
    assert "Triton is not installed" in str(error)
else:
    raise AssertionError("it ran")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
