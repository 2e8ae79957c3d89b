"""A replay buffer on disk is the one in memory, at every checkpoint that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dppo_fast.checkpoint import Checkpoint, CheckpointError, checkpoint_path, prune
from dppo_fast.journal import Journal
from dppo_fast.replay import ReplayBuffer
from tests.test_replay import equal, transitions


def test_every_checkpoint_can_be_restored(tmp_path: Path) -> None:
    """From growing, full and rewritten buffers, also by a run that itself was restored."""
    replay = ReplayBuffer(10)
    journal = Journal(tmp_path, replay)
    saved, start = [], 0
    for iteration, n in enumerate((4, 3, 0, 6, 10, 10, 2, 5)):
        replay.add(transitions(n, start))
        start += n
        if iteration == 3:
            replay.rewrite("action", torch.tensor([2, 5]), torch.full((2, 1, 1), -1.0))
        files = journal.save(iteration)
        journal.load(files)
        saved.append((files, {path: value.clone() for path, value in replay.data.items()}, replay.size, replay.head))
    for files, data, size, head in saved:
        restored = ReplayBuffer(10)
        Journal(tmp_path, restored).load(files)
        assert (restored.size, restored.head) == (size, head)
        for path, value in restored.data.items():
            assert torch.equal(value[:size], data[path][:size])


def test_a_file_has_only_what_is_new(tmp_path: Path) -> None:
    replay = ReplayBuffer(100_000)
    journal = Journal(tmp_path, replay)
    sizes = []
    for iteration, n in enumerate((10_000, 100, 100)):
        replay.add(transitions(n))
        sizes.append((tmp_path / journal.save(iteration)[-1]).stat().st_size)
    assert max(sizes[1:]) < sizes[0] / 20


def test_files_do_not_pile_up(tmp_path: Path) -> None:
    replay = ReplayBuffer(10)
    journal = Journal(tmp_path, replay)
    for iteration in range(50):
        replay.add(transitions(5, 5 * iteration))
        files = journal.save(iteration)
        journal.prune([max(iteration - 1, 0), iteration])
        assert len(files) <= 6
        restored = ReplayBuffer(10)
        Journal(tmp_path, restored).load(files)
        assert equal(restored, replay)
    assert len(list(tmp_path.iterdir())) <= 12


def twenty_saves(folder: Path) -> tuple[ReplayBuffer, Journal, list[list[str]]]:
    """Of a buffer of 10 after every 5 transitions, with the files of each."""
    replay = ReplayBuffer(10)
    journal = Journal(folder, replay)
    lists = []
    for iteration in range(20):
        replay.add(transitions(5, 5 * iteration))
        lists.append(journal.save(iteration))
    return replay, journal, lists


def test_pruning_keeps_what_an_older_checkpoint_needs(tmp_path: Path) -> None:
    _, journal, lists = twenty_saves(tmp_path)
    journal.prune([3, 11, 18, 19])
    for iteration in (3, 11, 18, 19):
        Journal(tmp_path, ReplayBuffer(10)).load(lists[iteration])
    for iteration in (4, 5):
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            Journal(tmp_path, ReplayBuffer(10)).load(lists[iteration])


def test_files_between_the_checkpoints_that_stay_for_good_are_deleted(tmp_path: Path) -> None:
    """As in a run of 300 iterations with ``keep_checkpoints`` 2 and ``save_model_freq`` 100."""
    replay, run = ReplayBuffer(10), tmp_path
    journal = Journal(run / "replay", replay)
    (run / "checkpoint").mkdir()
    expected = {}
    for iteration in range(301):
        replay.add(transitions(5, 5 * iteration))
        checkpoint_path(run, iteration).touch()
        files = journal.save(iteration)
        kept = prune(run, iteration, keep=2, keep_every=100)
        journal.prune(kept)
        if iteration in (0, 100, 200, 299, 300):
            expected[iteration] = files, replay.gather(torch.arange(len(replay))), replay.head
    assert kept == list(expected)
    assert {path.name for path in (run / "replay").iterdir()} == {
        name for files, *_ in expected.values() for name in files
    }
    assert len(list((run / "replay").iterdir())) <= 1 + 3 * 6
    for files, data, head in expected.values():
        Journal(run / "replay", restored := ReplayBuffer(10)).load(files)
        found = restored.gather(torch.arange(len(restored)))
        assert restored.head == head
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found.items(), data.items(), strict=True))


def test_files_that_later_checkpoints_go_on_from_stay(tmp_path: Path) -> None:
    """Where an older checkpoint was resumed from, and newer ones are there still."""
    replay, journal, lists = twenty_saves(tmp_path)
    journal.load(lists[4])
    replay.add(transitions(1, 25))
    files = journal.save(5)
    journal.prune([18, 19])
    Journal(tmp_path, restored := ReplayBuffer(10)).load(files)
    assert equal(restored, replay)


def written(folder: Path, steps: int, older: bool) -> list[str]:
    """The files of a buffer of 10 after ``steps`` transitions; of older runs, they do not say that."""
    replay = ReplayBuffer(10)
    journal = Journal(folder, replay)
    for start in range(0, steps, 4):
        replay.add(transitions(min(4, steps - start), start))
        files = journal.save(start)
    for name in files if older else []:
        state = dict(Checkpoint.load(folder / name).state)
        del state["capacity"]
        Checkpoint({}, state, {}, 0).save(folder / name)
    return files


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(("steps", "other"), [(10, 20), (12, 20), (12, 5), (6, 5), (6, 6)])
def test_a_buffer_of_another_capacity_is_refused(steps: int, other: int, older: bool, tmp_path: Path) -> None:
    files = written(tmp_path, steps, older)
    message = rf"room for \d+ transitions, this one for {other}; resume with the run's own algorithm\.buffer_size"
    with pytest.raises(CheckpointError, match=message):
        Journal(tmp_path, ReplayBuffer(other)).load(files)
    Journal(tmp_path, restored := ReplayBuffer(10)).load(files)
    assert len(restored) == min(steps, 10)


def test_the_capacity_that_is_needed_is_named(tmp_path: Path) -> None:
    """Also before the buffer is full."""
    with pytest.raises(CheckpointError, match="has room for 10 transitions, this one for 20"):
        Journal(tmp_path, ReplayBuffer(20)).load(written(tmp_path, 4, older=False))
