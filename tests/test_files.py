"""Atomic writes: the old file or the new one, and nothing else in the folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dppo_fast.runtime.files import atomic_write


def test_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"a long old content")
    with path.open("rb") as reader:
        with atomic_write(path) as file:
            file.write(b"new")
            assert path.read_bytes() == b"a long old content"
        assert reader.read() == b"a long old content"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the new")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "cache.bin"
    with atomic_write(path) as first:
        first.write(b"1" * 10)
        with atomic_write(path) as second:
            second.write(b"2" * 5)
        assert path.read_bytes() == b"2" * 5
    assert path.read_bytes() == b"1" * 10


def test_has_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with atomic_write(tmp_path / "atomic"):
        pass
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    program = """
import itertools, pathlib, sys
from dppo_fast.runtime.files import atomic_write
for i in itertools.count():
    with atomic_write(pathlib.Path(sys.argv[1])) as file:
        file.writelines([b"%09d" % i] * 100_000)
    print(i, flush=True)
"""
    root = Path(__file__).parent.parent
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=root, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    done = [int(writer.stdout.readline()) for _ in range(3)]
    os.kill(writer.pid, signal.SIGKILL)
    done += map(int, writer.communicate()[0].split())
    content = path.read_bytes()
    assert content == content[:9] * 100_000
    assert int(content[:9]) - done[-1] in (0, 1)
