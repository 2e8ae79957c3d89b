"""Phase timing and NVTX ranges."""

from __future__ import annotations

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from dppo_fast.runtime import profile
from dppo_fast.runtime.profile import PhaseTimer, annotate, set_profile
from dppo_fast.types import UserError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


def test_phases_add_up_and_laps_start_anew(clock: SimpleNamespace) -> None:
    timer = PhaseTimer()
    for seconds in (1.0, 2.0):
        with timer("collect"):
            clock.seconds += seconds
    with timer("update"):
        clock.seconds += 4.0
    assert timer.lap() == {"time/collect": 3.0, "time/update": 4.0}
    with timer("update"):
        clock.seconds += 8.0
    assert timer.lap() == {"time/update": 8.0}
    assert timer.lap() == {}


def test_an_inner_phase_is_not_counted_twice(clock: SimpleNamespace) -> None:
    timer = PhaseTimer()
    with timer("update"):
        clock.seconds += 1.0
        for _ in range(2):
            with timer("advantage"):
                clock.seconds += 10.0
        clock.seconds += 2.0
    with timer("save"):
        clock.seconds += 0.5
    assert timer.lap() == {"time/update": 3.0, "time/advantage": 20.0, "time/save": 0.5}


def test_a_phase_waits_for_the_device_and_counts_when_it_fails(clock: SimpleNamespace) -> None:
    def synchronize() -> None:
        clock.seconds += 5.0

    timer = PhaseTimer(synchronize)
    with timer("update"):
        clock.seconds += 1.0

    def fail() -> None:
        with timer("save"):
            clock.seconds += 2.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert timer.lap() == {"time/update": 6.0, "time/save": 2.0}


def test_ranges_are_nvtx_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @contextmanager
    def record(name: str):  # type: ignore[no-untyped-def]
        seen.append(name)
        yield

    monkeypatch.setattr(torch.cuda.nvtx, "range", record)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(profile, "_nvtx", False)
    assert annotate("off") is annotate("also off")
    set_profile("nvtx")
    with annotate("on"), PhaseTimer()("collect"):
        pass
    set_profile(None)
    with annotate("off"):
        pass
    assert seen == ["on", "collect"]


def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"profile=nvtxx: choose nvtx"):
        set_profile("nvtxx")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"profile=nvtx: needs a CUDA build"):
        set_profile("nvtx")
