"""``deterministic=true`` asks PyTorch for all that it can do; that a seed determines a run is in `test_resume`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.runs import DPPO, train

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def build(run: Path, deterministic: bool) -> None:
    assert train(*DPPO, "dry_run=true", f"deterministic={str(deterministic).lower()}", f"logdir={run}") == 0


@pytest.mark.parametrize("wanted", [True, False])
def test_the_algorithms_of_pytorch_cudnn_and_cublas(wanted: bool, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(not wanted)
    torch.backends.cudnn.deterministic = not wanted
    build(tmp_path / "run", wanted)
    assert torch.are_deterministic_algorithms_enabled() == wanted
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "where there is none it fails"
    assert torch.backends.cudnn.deterministic == wanted
    assert not torch.backends.cudnn.benchmark
    assert os.environ.get(VARIABLE) == (":4096:8" if wanted else None)


def test_a_users_workspace_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    build(tmp_path / "run", True)
    assert os.environ[VARIABLE] == ":16:8"
