"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dppo_fast.types import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing so that a reader, also after a crash or a power cut, finds the old file or the new one.

    The bytes go to a temporary file in the same folder, which replaces ``path`` when the block ends. If the block
    raises, the temporary file is removed and ``path`` stays as it was.

    Raises:
        OSError: the folder does not exist or is not writable, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the renaming of a file durable, which its own fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_free(path: Path) -> None:
    """Raise UserError where there is a file already, which would be lost."""
    if path.exists():
        raise UserError(f"out={path.parent} holds {path.name} already; choose another directory, or remove it")
