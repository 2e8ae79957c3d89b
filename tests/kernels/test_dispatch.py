from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from dppo_fast.kernels import _dispatch
from dppo_fast.kernels._dispatch import resolve
from dppo_fast.runtime.native import native

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL = ("reference", "triton", "native")


@pytest.fixture(autouse=True)
def _fully_equipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the extension and Triton, and nothing asked for."""
    monkeypatch.setattr(_dispatch, "native", lambda: ModuleType("extension"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("DPPO_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _dispatch._log_choice.cache_clear()


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "native", lambda: None)


def test_the_device_decides() -> None:
    assert resolve("op", CUDA, ALL) == "triton"
    assert resolve("op", CUDA, ("reference", "native")) == "reference"
    assert resolve("op", CPU, ALL) == "native"
    assert resolve("op", CPU, ("reference", "triton")) == "reference"


def test_without_the_extension_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    assert resolve("op", CPU, ALL) == "reference"


def test_the_environment_overrules_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")
    assert resolve("op", CUDA, ALL) == "reference"
    assert resolve("op", CPU, ALL) == "reference"


def test_an_op_without_the_environments_backend_chooses_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_FAST_BACKEND", "triton")
    assert resolve("op", CPU, ("reference", "native")) == "native"


def test_the_argument_overrules_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")
    assert resolve("op", CPU, ALL, "native") == "native"


def test_unknown_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='triton': op has the backends reference, native"):
        resolve("op", CUDA, ("reference", "native"), "triton")
    monkeypatch.setenv("DPPO_FAST_BACKEND", "trition")
    with pytest.raises(ValueError, match="DPPO_FAST_BACKEND=trition: the backends are reference, triton, native"):
        resolve("op", CPU, ALL)


def test_what_was_asked_for_and_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="backend='triton' cannot run op: the tensors are on cpu"):
        resolve("op", CPU, ALL, "triton")
    without_native(monkeypatch)
    with pytest.raises(RuntimeError, match=r"backend='native' cannot run op.*setup.py build_ext --inplace"):
        resolve("op", CPU, ALL, "native")
    monkeypatch.setenv("DPPO_FAST_BACKEND", "native")
    with pytest.raises(RuntimeError, match="DPPO_FAST_BACKEND=native cannot run op"):
        resolve("op", CPU, ALL)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        resolve("op", CUDA, ALL, "triton")


def test_triton_runs_on_the_cpu_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("op", CPU, ALL, "triton") == "triton"


def test_the_automatic_choice_is_logged_once_per_op(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for op in ("one", "two", "one", "two"):
        resolve(op, CPU, ALL)
    resolve("three", CPU, ALL, "native")
    assert caplog.messages == ["one runs on cpu with the native backend", "two runs on cpu with the native backend"]


class TestNative:
    @pytest.fixture(autouse=True)
    def _not_built(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setitem(sys.modules, "dppo_fast._native", None)
        native.cache_clear()
        yield
        native.cache_clear()

    def test_absence_is_one_warning(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.delenv("DPPO_FAST_REQUIRE_NATIVE", raising=False)
        assert native() is None
        assert native() is None
        assert len(caplog.messages) == 1
        assert "setup.py build_ext --inplace" in caplog.text

    def test_absence_is_an_error_where_it_is_required(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DPPO_FAST_REQUIRE_NATIVE", "1")
        with pytest.raises(ImportError, match=r"DPPO_FAST_REQUIRE_NATIVE=1.*setup.py build_ext --inplace"):
            native()
