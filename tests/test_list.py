"""``--list``: what there is for ``cfg=``."""

from __future__ import annotations

import io
import re
import sys

import pytest

from dppo_fast.cli import config_names
from tests.runs import train


def listed(capsys: pytest.CaptureFixture[str], *patterns: str) -> list[list[str]]:
    assert train("--list", *patterns) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_all_are_listed_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys)
    assert [name for name, *_ in rows] == config_names()
    assert {len(row) for row in rows} == {4}
    assert ["quickstart", "hopper-medium-v2", "dppo", "diffusion_mlp"] in rows


@pytest.mark.parametrize(
    ("patterns", "expression"),
    [
        (["robomimic"], "robomimic"),
        (["finetune/can"], "finetune/can"),
        (["*/avoid_m?/*gmm*"], "/avoid_m./.*gmm"),
        (["lamp", "round"], "lamp|round"),
    ],
)
def test_patterns_choose(patterns: list[str], expression: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name, *_ in listed(capsys, *patterns)]
    assert names == [name for name in config_names() if re.search(expression, name)]
    assert names


def test_a_pattern_that_fits_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--list", "hoper") == 2
    assert capsys.readouterr().err == "error: no configuration matches hoper; --list alone shows all\n"


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    assert train("--list", "quickstart") == 0
    assert "configuration" in terminal.getvalue()
    assert re.search(r"quickstart_pretrain +hopper-medium-v2 +bc +diffusion_mlp", terminal.getvalue())
