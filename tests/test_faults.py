"""Faults at every step of saving and loading: nothing is lost but the current iteration."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from dppo_fast.checkpoint import Checkpoint, CheckpointError, checkpoints, find
from dppo_fast.journal import Journal
from dppo_fast.log import RunLog, read_metrics
from dppo_fast.replay import ReplayBuffer
from dppo_fast.trainer import Trainer
from dppo_fast.types import UserError
from tests.runs import contents
from tests.small import gaussian_policy
from tests.test_nan import NEVER, Corruption, trainer
from tests.test_replay import equal, transitions

WRITERS = ("runtime/files.py", "journal.py", "trainer.py", "checkpoint.py", "log/metrics.py")
INNER = ("_pack", "_bytes", "_digest", "<dictcomp>", "<listcomp>", "<genexpr>", "_read", "_numbered", "below")
"""Loops that write nothing."""


def at_line(number: int, action: Callable[[], None]) -> Callable[..., Any]:
    """A trace function that does ``action`` before the ``number``-th line that runs in one of the `WRITERS`."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        code = frame.f_code
        if not code.co_filename.endswith(WRITERS) or code.co_name in INNER:
            return None
        if event == "line":
            lines += 1
            if lines == number:
                action()
        return trace

    return trace


def in_child(work: Callable[[], None], number: int) -> bool:
    """Do ``work`` in a copy of this process, which kills itself at line ``number``; whether it came to that."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.settrace(at_line(number, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def make(run: Path) -> Trainer:
    return trainer(run, gaussian_policy(), Corruption(NEVER))


def continued(run: Path, iterations: int) -> Trainer:
    """What ``resume=`` does, up to that iteration."""
    current = make(run)
    if checkpoints(run):
        current.restore(find(run))
    with RunLog(run, 4, current.next_row, live=False, tensorboard=False) as log:
        current.train(log, lambda: current.iteration >= iterations)
    return current


def without_time(run: Path) -> list[dict[str, float]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "steps_per"))} for row in rows]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("half") / "run"
    continued(run, 1)
    return run


@pytest.fixture(scope="module")
def whole(half: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(half, run)
    continued(run, 2)
    return run


def assert_nothing_lost(run: Path, whole: Path) -> None:
    """The newest checkpoint is one of the two that may be there, and from it the run becomes what it should be."""
    newest = checkpoints(run)[-1]
    assert newest.name in ("iteration_000001.safetensors", "iteration_000002.safetensors")
    for file in checkpoints(run):
        Checkpoint.load(file)
    continued(run, 2)
    assert without_time(run) == without_time(whole)
    outlines, tensors = zip(*(contents(checkpoints(folder)[-1]) for folder in (run, whole)), strict=True)
    assert outlines[0] == outlines[1]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[1])


def test_sigkill_at_every_line_that_writes(half: Path, whole: Path, tmp_path: Path, capfd: Any) -> None:
    """Of restoring, an iteration's metrics, its checkpoint and the pruning."""
    number, run = 1, tmp_path / "run"
    stride = int(os.environ.get("DPPO_FAST_FAULT_STRIDE", "40"))
    while True:
        shutil.copytree(half, run)
        if not in_child(lambda: continued(run, 2) and None, number):
            break
        assert_nothing_lost(run, whole)
        shutil.rmtree(run)
        number += stride
    assert number > 100, "the lines of saving must have been among those"


def test_sigkill_at_every_line_of_a_replay_buffers_journal(tmp_path: Path) -> None:
    def grow(folder: Path, iterations: range, files: list[str], replay: ReplayBuffer) -> None:
        journal = Journal(folder / "replay", replay)
        journal.load(files)
        for iteration in iterations:
            replay.add(transitions(7, 7 * iteration))
            state = {"replay": journal.save(iteration)}
            (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
            Checkpoint({}, state, {}, iteration).save(folder / "checkpoint" / f"iteration_{iteration:06d}.safetensors")
            journal.prune(sorted({0, max(iteration - 1, 0), iteration}))

    grow(tmp_path / "start", range(4), [], ReplayBuffer(10))
    number = 1
    while True:
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", folder)
        files = list(Checkpoint.load(find(folder)).state["replay"])
        died = in_child(lambda: grow(folder, range(4, 6), files, ReplayBuffer(10)), number)  # noqa: B023
        checkpoint = Checkpoint.load(find(folder))
        restored, expected = ReplayBuffer(10), ReplayBuffer(10)
        Journal(folder / "replay", restored).load(checkpoint.state["replay"])
        for iteration in range(checkpoint.iteration + 1):
            expected.add(transitions(7, 7 * iteration))
        assert equal(restored, expected)
        shutil.rmtree(folder)
        if not died:
            break
        number += 11
    assert number > 50


STEPS = {"opening": "pathlib.Path.open", "syncing": "os.fsync", "renaming": "pathlib.Path.replace"}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_fails_is_told_and_nothing_is_lost(
    step: str, kind: int, half: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(half, run)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(kind, os.strerror(kind))

    current = make(run)
    current.restore(find(run))
    with RunLog(run, 4, current.next_row, live=False, tensorboard=False) as log, monkeypatch.context() as patch:
        patch.setattr(STEPS[step], fail)
        with pytest.raises(UserError, match=rf"{os.strerror(kind)}.*resume={run} continues the run"):
            current.train(log, lambda: current.iteration >= 2)
    assert not list(run.rglob("*.tmp"))
    assert_nothing_lost(run, whole)


def test_a_really_full_disk(half: Path, whole: Path, tmp_path: Path) -> None:
    """Metrics to /dev/full, where the kernel refuses every byte."""
    run = tmp_path / "run"
    shutil.copytree(half, run)
    current = make(run)
    current.restore(find(run))
    log = RunLog(run, 4, current.next_row, live=False, tensorboard=False)
    log._files._jsonl.close()
    log._files._jsonl = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(UserError, match=r"No space left on device.*what was saved before is whole"):
        current.train(log)
    log._files.close()
    assert_nothing_lost(run, whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told(half: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(half, run)
    (run / "checkpoint").chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"Permission denied.*give access"):
            continued(run, 2)
    finally:
        (run / "checkpoint").chmod(0o700)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_latest_checkpoint_leaves_the_previous_one(damage: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    latest = find(run)
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes({"truncated": content[:-1], "flipped": content, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"iteration_000002\.safetensors"):
        make(run).restore(latest)
    current = make(run)
    current.restore(find(run, "previous"))
    with RunLog(run, 4, current.next_row, live=False, tensorboard=False) as log:
        current.train(log, lambda: current.iteration >= 2)
    assert_nothing_lost(run, whole)


def test_a_line_of_metrics_cut_short_is_cut_off(half: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(half, run)
    for name in ("metrics.jsonl", "metrics.csv"):
        with (run / name).open("ab") as file:
            file.write(b'{"iteration": 2, "tr')
    assert_nothing_lost(run, whole)
