"""Phase timing, NVTX ranges and Chrome traces."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dppo_fast import advantage
from dppo_fast.kernels.gae import gae
from dppo_fast.runtime.profile import PhaseTimer, annotate, set_profile, tracing
from dppo_fast.types import UserError
from tests.runs import DPPO, train


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the NVTX ranges that are opened."""
    seen: list[str] = []

    @contextmanager
    def record(name: str) -> Iterator[None]:
        seen.append(name)
        yield

    monkeypatch.setattr(torch.cuda.nvtx, "range", record)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    yield seen
    set_profile(None)


def events(trace: Path) -> set[str]:
    with gzip.open(trace) as file:
        return {event["name"] for event in json.load(file)["traceEvents"] if "name" in event}


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


def test_ranges_are_nvtx_only_when_asked(ranges: list[str]) -> None:
    assert annotate("off") is annotate("also off")
    set_profile("nvtx")
    with annotate("on"), PhaseTimer()("collect"):
        pass
    set_profile(None)
    with annotate("off"):
        pass
    assert ranges == ["on", "collect"]


def test_every_op_is_a_range_while_ranges_are_on(ranges: list[str]) -> None:
    plain = advantage.gae
    flags = torch.zeros(2, 3, dtype=torch.bool)
    arguments: list[Any] = [*torch.randn(3, 2, 3), torch.randn(3), flags, flags, 0.9, 0.9]
    set_profile("nvtx")
    assert advantage.gae is not plain
    for ours, expected in zip(advantage.gae(*arguments), gae(*arguments), strict=True):
        assert ours.equal(expected)
    assert ranges == ["gae"]
    set_profile(None)
    assert advantage.gae is plain


def test_chosen_laps_are_traced(tmp_path: Path) -> None:
    timer = PhaseTimer()
    set_profile("torch")
    with tracing(timer, tmp_path, [3, 5], first=2):
        for lap in range(2, 6):
            with timer(f"phase{lap}"):
                torch.zeros(1)
            timer.lap()
    set_profile(None)
    assert {path.name for path in tmp_path.iterdir()} == {"iteration_3.json.gz", "iteration_5.json.gz"}
    for lap in (3, 5):
        found = events(tmp_path / f"iteration_{lap}.json.gz")
        assert {name for name in found if name.startswith("phase")} == {f"phase{lap}"}
        assert "aten::zeros" in found


def test_a_lap_that_fails_is_traced_under_its_own_number(tmp_path: Path) -> None:
    timer = PhaseTimer()

    def fail() -> None:
        with tracing(timer, tmp_path, [0, 1], first=0):
            timer.lap()
            torch.zeros(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    timer.lap()
    assert "aten::zeros" in events(tmp_path / "iteration_1.json.gz")
    assert "aten::zeros" not in events(tmp_path / "iteration_0.json.gz")


def test_a_run_writes_traces_of_its_iterations(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"logdir={run}", "profile=torch", "profile_iterations=[1]", "train.n_train_itr=2"]
    assert train(*DPPO, *settings, "train.val_freq=0") == 0
    set_profile(None)
    assert [path.name for path in (run / "trace").iterdir()] == ["iteration_1.json.gz"]
    assert {"collect", "update", "gae", "discounted_sum"} <= events(run / "trace/iteration_1.json.gz")


def test_an_unprofiled_run_leaves_no_trace(tmp_path: Path) -> None:
    with tracing(PhaseTimer(), tmp_path / "trace", [], first=0):
        pass
    assert not list(tmp_path.iterdir())


def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"profile=nvtxx: choose nvtx or torch"):
        set_profile("nvtxx")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"profile=nvtx: needs a CUDA build"):
        set_profile("nvtx")
