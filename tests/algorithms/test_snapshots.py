"""Refactoring changes no number: two iterations of every algorithm are what they were.

Where they are meant to change, ``python -m tests.algorithms.snapshots`` writes the new ones; look at the differences.
"""

from __future__ import annotations

import json

import pytest

from tests.algorithms.snapshots import FILE, NAMES, snapshot

EXPECTED = json.loads(FILE.read_text())


@pytest.mark.parametrize("backend", ["", "reference"], ids=["fastest", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_is_what_it_was(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C++ ops and without; other CPUs round differently."""
    monkeypatch.setenv("DPPO_FAST_BACKEND", backend)
    assert snapshot(name) == pytest.approx(EXPECTED[name], rel=1e-4, abs=1e-6)


def test_none_is_left_over() -> None:
    assert EXPECTED.keys() == set(NAMES)
