"""How far a command has come, on a terminal and in a log."""

from __future__ import annotations

import sys

import pytest

from dppo_fast.runtime import progress as module
from dppo_fast.runtime.progress import progress


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress("recording", 5000) as recording:
        for done in range(0, 5000, 500):
            recording(done)
            now += 4.0
    assert capsys.readouterr() == (
        "",
        "recording: 1,500 of 5,000\nrecording: 3,000 of 5,000\nrecording: 4,500 of 5,000\n",
    )


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with progress("recording", 50) as recording:
        recording(25)
    shown, errors = capsys.readouterr()
    assert "recording" in shown
    assert " 50%" in shown
    assert not errors
