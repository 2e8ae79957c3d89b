"""Envs in worker processes: the same numbers, through shared memory, and no worker is indispensable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from numpy.typing import NDArray

from dppo_fast.envs.gymnasium import GymnasiumSimulator
from dppo_fast.envs.workers import DEATHS_IN_A_ROW, WorkerSimulator
from dppo_fast.types import UserError

N = 5
SIZE = 64


class Wander(gymnasium.Env[Any, Any]):
    """A walk in noise that follows from the seed; its picture shows the clock. It ends where it has gone 2 far."""

    observation_space = Dict({"state": Box(-np.inf, np.inf, (2,)), "rgb": Box(0, 255, (SIZE, SIZE, 3), np.uint8)})
    action_space = Box(-1, 1, (2,))

    def __init__(self, dies: Path | None = None) -> None:
        """While the file ``dies`` is there a reset kills the process; with ``forever`` in it, it stays there."""
        self._dies = dies

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if self._dies is not None and self._dies.exists():
            if self._dies.read_text() != "forever":
                self._dies.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        self._rng, self._place, self._clock = np.random.default_rng(seed), np.zeros(2, np.float32), 0
        return self._observe(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._clock += 1
        self._place = self._place + action + self._rng.normal(size=2).astype(np.float32)
        return self._observe(), float(self._place[0]), bool(np.abs(self._place).max() > 2), self._clock == 9, {}

    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        return np.full((8, 8, 3), self._clock, np.uint8)

    def _observe(self) -> dict[str, Any]:
        return {"state": self._place, "rgb": np.full((SIZE, SIZE, 3), self._clock, np.uint8)}


def wander(index: int, dies: Path | None = None) -> Wander:
    return Wander(dies)


def refuse(index: int) -> Wander:
    raise UserError(f"env {index} cannot be")


def fail(index: int) -> Wander:
    raise ZeroDivisionError


@contextmanager
def workers(make: Callable[[int], Any] = wander, num_workers: int = 2) -> Iterator[WorkerSimulator]:
    simulator = WorkerSimulator("Wander", make, N, num_workers)
    simulator.seed(0, np.zeros(N, np.int64))
    yield simulator
    simulator.close()


@pytest.fixture(scope="module")
def simulator() -> Iterator[WorkerSimulator]:
    with workers() as simulator:
        yield simulator


def kill(simulator: WorkerSimulator, worker: int) -> None:
    process = simulator._workers[worker].process
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


def history(simulator: Any, steps: int) -> list[Any]:
    """What comes of random actions, when subsets step and whoever has ended is reset at once."""
    rng = np.random.default_rng(1)
    simulator.seed(7, np.arange(N))
    found = [simulator.reset(np.arange(N))]
    for _ in range(steps):
        ids = np.flatnonzero(rng.random(N) < 0.8)
        obs, reward, ended, cut = simulator.step(rng.uniform(-1, 1, (len(ids), 2)), ids)
        found += [obs, reward, ended, cut]
        if over := ids[ended | cut].tolist():
            found.append(simulator.reset(np.array(over)))
    return found


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        pairs = [(a[name], b[name]) for name in ("state", "rgb")] if isinstance(a, dict) else [(a, b)]
        for x, y in pairs:
            np.testing.assert_array_equal(x, y)


def test_processes_change_nothing(simulator: WorkerSimulator) -> None:
    alone = GymnasiumSimulator("tests.envs.test_workers:Wander", N)
    assert (simulator.obs_shapes, simulator.num_envs) == (alone.obs_shapes, N)
    np.testing.assert_array_equal(simulator.action_low, alone.action_low)
    expected = history(alone, 30)
    assert_same(history(simulator, 30), expected)
    with workers(num_workers=9) as many:
        assert len(many._workers) == N
        assert_same(history(many, 30), expected)


def test_what_was_returned_stays(simulator: WorkerSimulator) -> None:
    obs = simulator.reset(np.arange(N))
    before = {name: value.copy() for name, value in obs.items()}
    simulator.step(np.ones((N, 2)), np.arange(N))
    assert all(np.array_equal(obs[name], before[name]) for name in obs)


def test_observations_do_not_go_through_the_pipe(simulator: WorkerSimulator, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    for worker in simulator._workers:
        recv = worker.connection.recv_bytes

        def read(self: Any = worker.connection, recv: Any = recv) -> Any:
            sent.append(recv())
            return __import__("pickle").loads(sent[-1])

        monkeypatch.setattr(worker.connection, "recv", read, raising=False)
    obs = simulator.reset(np.arange(N))
    simulator.step(np.ones((N, 2)), np.arange(N))
    assert obs["rgb"].nbytes == N * SIZE * SIZE * 3
    assert len(sent) == 4
    assert sum(map(len, sent)) < 100


def test_pictures(simulator: WorkerSimulator) -> None:
    simulator.reset(np.arange(N))
    simulator.step(np.zeros((1, 2)), np.array([3]))
    assert [int(simulator.render(env)[0, 0, 0]) for env in range(N)] == [0, 0, 0, 1, 0]


def test_a_killed_worker_loses_its_episodes_and_nothing_else() -> None:
    everyone = np.arange(N)
    with workers() as simulator, workers() as unharmed:
        for both in (simulator, unharmed):
            both.reset(everyone)
            last, *_ = both.step(np.ones((N, 2)) / 8, everyone)
        kill(simulator, 1)  # the one of envs 1 and 3
        ids = np.array([0, 1, 2, 4])
        obs, reward, ended, cut = simulator.step(np.zeros((4, 2)), ids)
        expected, wanted, *_ = unharmed.step(np.zeros((4, 2)), ids)
        assert simulator.worker_deaths == 1
        assert cut.tolist() == [False, True, False, False]
        assert not ended[1]
        assert reward.tolist() == [wanted[0], 0, wanted[2], wanted[3]]
        assert np.array_equal(obs["state"][1], last["state"][1])
        assert np.array_equal(np.delete(obs["state"], 1, 0), np.delete(expected["state"], 1, 0))
        assert simulator.step(np.zeros((1, 2)), np.array([3]))[3].all()  # lost although it was not asked to step
        lost = np.array([1, 3])
        assert_same([simulator.reset(lost)], [unharmed.reset(lost)])  # the very episodes that were to come
        assert_same(simulator.step(np.ones((N, 2)), everyone), unharmed.step(np.ones((N, 2)), everyone))
        assert simulator.worker_deaths == 1


def test_a_worker_that_dies_in_a_reset_is_asked_again(tmp_path: Path) -> None:
    dies = tmp_path / "dies"
    with workers(partial(wander, dies=dies)) as simulator:
        first = simulator.reset(np.arange(N))
        dies.touch()
        simulator.seed(0, np.zeros(N, np.int64))
        assert_same([simulator.reset(np.array([0, 2]))], [{name: value[[0, 2]] for name, value in first.items()}])
        assert simulator.worker_deaths == 1
        assert simulator.step(np.zeros((1, 2)), np.array([4]))[3].all()


def test_a_worker_that_always_dies_ends_the_run(tmp_path: Path) -> None:
    dies = tmp_path / "dies"
    dies.write_text("forever")
    message = rf"env\.id=Wander: the worker of envs \[0, 2, 4\] died \(exit code -9\), {DEATHS_IN_A_ROW} times in a row"
    with workers(partial(wander, dies=dies)) as simulator, pytest.raises(RuntimeError, match=message):
        simulator.reset(np.array([0]))


def test_what_cannot_be_made() -> None:
    with pytest.raises(UserError, match="env 0 cannot be"):
        WorkerSimulator("Wander", refuse, N, 1)
    with pytest.raises(RuntimeError, match=r"a worker died \(exit code 1\) while it made its envs"):
        WorkerSimulator("Wander", fail, N, 1)


def test_signals_to_all_processes_are_the_main_ones_business() -> None:
    """As SLURM, systemd and shells send them: the main one finishes what it is at, and then ends its workers."""
    everyone = np.arange(N)
    with workers() as simulator, workers() as unharmed:
        for both in (simulator, unharmed):
            both.reset(everyone)
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for process, _ in simulator._workers:
                os.kill(process.pid or 0, name)
            time.sleep(0.1)
            assert_same(simulator.step(np.ones((N, 2)), everyone), unharmed.step(np.ones((N, 2)), everyone))
        assert simulator.worker_deaths == 0
    assert [process.exitcode for process, _ in simulator._workers] == [0, 0]


class Stuck(Wander):
    def render(self) -> NDArray[np.uint8]:  # type: ignore[override]
        time.sleep(600)
        return super().render()


def stuck(index: int) -> Stuck:
    return Stuck()


def test_workers_that_do_not_end_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo_fast.envs.workers.PATIENCE", 0.5)
    with workers(stuck) as simulator:
        simulator.reset(np.arange(N))
        simulator._workers[0].connection.send(("render", np.array([0])))
        started = time.monotonic()
    assert time.monotonic() - started < 20
    assert [process.exitcode for process, _ in simulator._workers] == [-signal.SIGKILL, 0]


STOPPED = """
import os, signal
import numpy as np
from dppo_fast.envs.workers import WorkerSimulator
from tests.envs.test_workers import wander
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    simulator = WorkerSimulator("Wander", wander, 2, 2)
    simulator.seed(0, np.zeros(2, np.int64))
    simulator.reset(np.arange(2))
    os.killpg(0, signal.SIGTERM)
    for _ in range(5):
        simulator.step(np.zeros((2, 2)), np.arange(2))
    print(*(worker.process.pid for worker in simulator._workers), simulator.worker_deaths, flush=True)
"""
LEFT = STOPPED.replace("os.killpg(0, signal.SIGTERM)", "")
ORPHANS = """
import os, signal
from dppo_fast.envs.workers import WorkerSimulator
from tests.envs.test_workers import wander
if __name__ == "__main__":
    simulator = WorkerSimulator("Wander", wander, 2, 2)
    print(*(worker.process.pid for worker in simulator._workers), simulator.worker_deaths, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("program", "code"),
    [
        pytest.param(ORPHANS, -signal.SIGKILL, id="killed"),
        pytest.param(STOPPED, 0, id="stopped"),
        pytest.param(LEFT, 0, id="left"),
    ],
)
def test_workers_do_not_outlive_the_main_process(program: str, code: int, tmp_path: Path) -> None:
    """Killed, told to stop with all its processes, or left without closing."""
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, str(script)]
    found = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, start_new_session=True
    )
    assert found.returncode == code, found.stderr
    *pids, deaths = map(int, found.stdout.split())
    assert len(pids) == 2
    assert deaths == 0
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "workers are still there"
        time.sleep(0.05)
