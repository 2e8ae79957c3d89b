"""A replay buffer on disk is the one in memory, at every checkpoint that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dppo_fast.checkpoint import CheckpointError
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
        journal.prune(iteration - 1 if iteration else 0)
        assert len(files) <= 6
        restored = ReplayBuffer(10)
        Journal(tmp_path, restored).load(files)
        assert equal(restored, replay)
    assert len(list(tmp_path.iterdir())) <= 12


def test_pruning_keeps_what_an_older_checkpoint_needs(tmp_path: Path) -> None:
    replay = ReplayBuffer(10)
    journal = Journal(tmp_path, replay)
    lists = []
    for iteration in range(20):
        replay.add(transitions(5, 5 * iteration))
        lists.append(journal.save(iteration))
    journal.prune(11)
    for files in lists[11:]:
        Journal(tmp_path, ReplayBuffer(10)).load(files)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Journal(tmp_path, ReplayBuffer(10)).load(lists[0])
