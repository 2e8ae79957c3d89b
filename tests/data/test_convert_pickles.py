"""The reader of pickles: data comes through, code does not run, and nothing but a UserError comes of damage."""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_fast.data.convert.__main__ import main
from dppo_fast.data.pickles import read_pickle
from dppo_fast.types import UserError

DATA = {
    "doubles": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "axes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(0, 2, 1),
    "big endian": np.arange(3, dtype=">i4"),
    "empty": np.zeros((0, 3)),
    "nothing": None,
    "nested": [{"a": (1, 2.5, "x", b"y", b"")}, {3, 4}, frozenset({5}), 1 + 2j, True],
    "ordered": collections.OrderedDict(b=np.ones(2, np.bool_)),
    "scalar": np.float64(2.5),
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(b, np.ndarray | np.generic):
        return isinstance(a, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in b)
    if isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_come_through(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(DATA, protocol))
    assert equal(read_pickle(tmp_path / "data.pkl"), DATA)


def test_an_array_of_objects_is_a_list(tmp_path: Path) -> None:
    ragged = np.array([np.arange(2), np.arange(3.0), {"a": 1}], dtype=object)
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(ragged))
    assert equal(read_pickle(tmp_path / "data.pkl"), [np.arange(2), np.arange(3.0), {"a": 1}])


class Call:
    """Unpickled, it calls."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    "function",
    [os.system, subprocess.check_output, builtins.eval, builtins.exec, builtins.getattr, Path, np.load, np.frombuffer],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_code_does_not_run(function: Any, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    argument = f"open({str(mark)!r}, 'w')" if function in (eval, exec) else f"touch {mark}"
    evil = {"states": np.zeros(3), "actions": Call(function, argument)}
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(evil, protocol))
    with pytest.raises(UserError, match=r"it holds an object of .*; only arrays and builtin containers are read"):
        read_pickle(tmp_path / "train.pkl")
    assert not mark.exists()
    if function in (os.system, eval):
        pickle.loads((tmp_path / "train.pkl").read_bytes())  # the test would notice
        assert mark.exists()


def test_the_command_refuses_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "ran"
    for name, source in (("reference", tmp_path / "train.pkl"), ("d3il", tmp_path)):
        (tmp_path / "train.pkl").write_bytes(pickle.dumps(Call(os.system, f"touch {mark}")))
        assert main([name, f"source={source}", f"out={tmp_path / 'out'}"]) == 2
        error = capsys.readouterr().err
        assert "it holds an object of posix.system; only arrays and builtin containers are read" in error
        assert error.count("\n") == 1
    assert not mark.exists()
    assert list((tmp_path / "out").iterdir()) == []


def hand_made(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


DTYPE = name("numpy", "dtype")
RECONSTRUCT = name("numpy._core.multiarray", "_reconstruct")


@pytest.mark.parametrize(
    "content",
    [
        hand_made(DTYPE, b"}\x8c\x08__code__K\x01s", b"b"),  # attributes for what stands for a function
        hand_made(DTYPE, b"N}\x8c\x08__code__K\x01s\x86", b"b"),
        hand_made(b"}", DTYPE, b"K\x01s"),
        hand_made(DTYPE),
        hand_made(name("builtins", "set"), b"N}\x8c\x03addK\x01s\x86", b"b"),
        hand_made(b"]r\xff\xff\xff\x7f"),  # 32 GiB for one value
        hand_made(b"]\x94h\x00a"),  # a list that holds itself
        hand_made(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f"),
        hand_made(name("builtins", "bytearray"), b"\x8a\x07\x00\x00\x00\x00\x00\x00\x10\x85R"),
        pickle.dumps(np.array(["text"])),
        pickle.dumps(np.zeros(2, "f8,O")),
        pickle.dumps(np.datetime64("2020")),
        pickle.dumps(np.zeros(3), 4).replace(b"f8", b"f9"),
        pickle.dumps(np.zeros(3), 4).replace(b"K\x03\x85", b"K\x09\x85"),  # a shape larger than the data
        b"",
        b"not a pickle",
    ],
)
def test_malformed_pickles_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"not a readable pickle|only numbers are read|containers are read|no data"):
        read_pickle(tmp_path / "data.pkl")


def test_a_few_bytes_do_not_become_many(tmp_path: Path) -> None:
    """A list of ten times the same list of ten times the same list, 60 deep."""
    value: list[Any] = []
    for _ in range(60):
        value = [value] * 10
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(value))
    read = read_pickle(tmp_path / "data.pkl")
    assert len(read) == 10
    assert all(item is read[0] for item in read)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damage_gives_data_or_a_user_error(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(pickle.dumps(DATA, data.draw(st.sampled_from([2, 4, 5]))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed.pkl"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with suppress(UserError):
        read_pickle(path)
