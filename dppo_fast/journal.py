"""A replay buffer on disk, without writing all of it for every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dppo_fast.checkpoint import Checkpoint, CheckpointError
from dppo_fast.replay import ReplayBuffer


class Journal:
    """Files in ``folder``, one per checkpoint, with what ``buffer`` got since the one before. Once they have twice as
    many rows as the buffer, one has all of it, and those before are of no more use to later checkpoints.
    """

    def __init__(self, folder: Path, buffer: ReplayBuffer) -> None:
        self.folder = folder
        self.buffer = buffer
        self.files: list[str] = []
        self.rows = 0

    def save(self, iteration: int) -> list[str]:
        """Write a file, and name all those that together are the buffer; the checkpoint has to hold them."""
        if self.rows > 2 * len(self.buffer):
            self.files, self.rows = [], 0
        changes = self.buffer.changes(everything=not self.files)
        name = f"iteration_{iteration:08d}{'' if self.files else '_whole'}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        Checkpoint({}, changes, {}, iteration).save(self.folder / name)
        self._add(name, changes)
        return list(self.files)

    def load(self, files: Sequence[str]) -> None:
        """Make the buffer what it was. Raises CheckpointError for a file that is missing or damaged, or of a buffer of
        another capacity.
        """
        self.files, self.rows = [], 0
        for name in files:
            changes = dict(Checkpoint.load(self.folder / name).state)
            saved, own = _capacity(changes, self.buffer.capacity), self.buffer.capacity
            if saved != own:
                raise CheckpointError(
                    f"{self.folder / name}: the saved replay buffer has room for {saved} transitions, this one for "
                    f"{own}; resume with the run's own algorithm.buffer_size"
                )
            self.buffer.apply(changes)
            self._add(name, changes)

    def prune(self, kept: Iterable[int]) -> None:
        """Delete what neither the checkpoints of the iterations ``kept`` need nor those to come."""
        names = sorted(path.name for path in self.folder.glob("iteration_*.safetensors"))
        needed = set(self.files)
        for iteration in kept:
            until = [name for name in names if int(name[10:18]) <= iteration]
            whole = max((i for i, name in enumerate(until) if "_whole" in name), default=0)
            needed.update(until[whole:])
        for name in names:
            if name not in needed:
                (self.folder / name).unlink()

    def _add(self, name: str, changes: dict[str, Any]) -> None:
        self.files.append(name)
        self.rows += len(changes["rows"])


def _capacity(changes: dict[str, Any], expected: int) -> int:
    """That of the buffer that ``changes`` are of. Files of before it was saved tell it where that buffer was full; of
    others it is ``expected``, if there is room in that for one more.
    """
    size = int(changes["size"])
    full = size != changes["head"]
    return int(changes.get("capacity", size if full else max(expected, size + 1)))
