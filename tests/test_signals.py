"""A run that is asked to end saves what it has, says how to go on, and goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dppo_fast.checkpoint import Checkpoint, checkpoints
from dppo_fast.runtime.signals import StopRequest
from tests.runs import DPPO, DQL, assert_same_runs, train

ROOT = Path(__file__).parent.parent
ENDLESS = [*DPPO, "env.backend=gymnasium", "train.n_train_itr=100000", "train.save_freq=100000", "train.val_freq=0"]


def heed_ctrl_c() -> None:
    """A command in the background of a script is started with SIGINT ignored, and would hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(*arguments: str, first: str = " 2/") -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own, once it has printed a line with ``first``, as in ``[     2/100000]``."""
    command = [sys.executable, "-m", "dppo_fast.train", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_ctrl_c
    ) as process:
        assert process.stdout is not None
        try:
            next(line for line in process.stdout if first in line.replace("[", " "))
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_iteration_is_finished_and_saved(number: signal.Signals, tmp_path: Path) -> None:
    """Without the save the run would be back at iteration 0: it saves every 100,000 iterations."""
    run = tmp_path / "run"
    with started(*ENDLESS, f"logdir={run}") as process:
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error.splitlines() == [
        f"{number.name}: saving after this iteration; Ctrl-C stops at once",
        f"interrupted; resume={run} continues the run",
    ]
    done = Checkpoint.load(checkpoints(run)[-1]).iteration
    assert done == len((run / "metrics.jsonl").read_text().splitlines()) - 1 >= 2


def test_the_run_continues_exactly(tmp_path: Path) -> None:
    """Also its replay buffer: saving an iteration twice would lose what the journal's file has."""
    arguments = [*DQL, "train.val_freq=0", "train.n_train_itr=100000"]
    run = tmp_path / "run"
    with started(*arguments, f"logdir={run}") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    done = Checkpoint.load(checkpoints(run)[-1]).iteration
    assert train(f"resume={run}", f"train.n_train_itr={done + 1}") == 0
    assert train(*arguments, f"logdir={tmp_path / 'whole'}", f"train.n_train_itr={done + 1}") == 0
    assert_same_runs(run, tmp_path / "whole")


def test_the_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with started(*ENDLESS, "train.n_steps=30000", f"logdir={tmp_path}", first=" 0/") as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("SIGINT: saving after this iteration")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == f"interrupted; resume={tmp_path} continues the run\n"
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_was_ignored_stays_ignored_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stop()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)
