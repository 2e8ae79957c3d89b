"""The run directory's metrics, TensorBoard, wandb, and what the terminal shows."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dppo_fast.log import RunLog, print_summary, read_metrics
from dppo_fast.log.display import Progress
from dppo_fast.types import UserError

Row = dict[str, float]


def write(directory: Path, rows: list[Row], total: int = 100, **settings: Any) -> None:
    with RunLog(directory, total, **{"tensorboard": False, "live": False, **settings}) as log:
        for row in rows:
            log.iteration(row)


def finetuning_row(iteration: int) -> Row:
    row: Row = {"iteration": iteration, "env_steps": 1000 * (iteration + 1), "train/return": math.sqrt(iteration)}
    if iteration % 3 == 2:
        row |= {"eval/return": 10.0 * iteration, "eval/return_std": 1.5}
    return row | {"ppo/approx_kl": 0.01, "ppo/clip_fraction": 0.125, "time/collect": 0.75, "time/update": 0.25}


def files(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv")}


def test_both_files_hold_every_row_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    rows = [finetuning_row(i) for i in range(5)]
    with RunLog(tmp_path / "new" / "run", 5, tensorboard=False) as log:
        for i, row in enumerate(rows):
            log.iteration(row)
            stored = read_metrics(tmp_path / "new" / "run" / "metrics.jsonl")
            assert [{key: r[key] for key in r if key != "steps_per_second"} for r in stored] == rows[: i + 1]
            table = read_metrics(tmp_path / "new" / "run" / "metrics.csv")
            assert [{key: x for key, x in r.items() if not math.isnan(x)} for r in table] == stored


def test_steps_per_second_spans_the_row_s_phases(tmp_path: Path) -> None:
    rows = [{"iteration": i, "env_steps": 100.0 * (i + 1) ** 2, "time/a": 1.0, "time/b": 3.0} for i in range(3)]
    write(tmp_path, rows[:2])
    write(tmp_path, rows[2:], resume_iteration=2)
    assert [row["steps_per_second"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [25, 75, 125]


def test_numbers_that_are_not_finite_are_null_and_empty(tmp_path: Path) -> None:
    write(tmp_path, [{"iteration": 0, "loss/bc": math.nan, "lr/actor": math.inf, "eval/return": -math.inf, "x": 0.0}])
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "iteration": 0, "loss/bc": None, "lr/actor": None, "eval/return": None, "x": 0.0
    }  # fmt: skip
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "0,,,,0.0"


VALUES = st.floats() | st.integers(-(10**9), 10**9)
ROWS = st.lists(st.dictionaries(st.sampled_from(["a", "b/c", "d", "time/e"]), VALUES), max_size=6)


@settings(max_examples=15, deadline=None)
@given(rows=ROWS, data=st.data())
def test_a_resumed_run_has_the_files_of_an_uninterrupted_one(rows: list[Row], data: st.DataObject) -> None:
    rows = [{"iteration": i, **row} for i, row in enumerate(rows)]
    killed = data.draw(st.integers(0, len(rows)), "rows written before the kill")
    resumed = data.draw(st.integers(0, killed), "iteration of the checkpoint")
    torn = data.draw(st.sampled_from([b"", b"{", b'{"iteration": 1', b'{"iteration": 0, "a": 1.0}']), "last line")
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        write(whole, rows)
        write(broken, rows[:killed])
        with (broken / "metrics.jsonl").open("ab") as file:
            file.write(torn)
        write(broken, rows[resumed:], resume_iteration=resumed)
        assert files(broken) == files(whole)


def test_a_killed_run_resumes_without_a_gap(tmp_path: Path) -> None:
    program = f"""
from __future__ import annotations
import itertools, math, pathlib, sys
from dppo_fast.log import RunLog
{inspect.getsource(finetuning_row)}
with RunLog(pathlib.Path(sys.argv[1]), 1000, tensorboard=False, live=False) as log:
    for i in itertools.count():
        log.iteration(finetuning_row(i))
        print("checkpoint", i + 1, file=sys.stderr, flush=True)
"""
    killed = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "killed")],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert killed.stderr is not None
    for _ in range(20):
        line = killed.stderr.readline()
    os.kill(killed.pid, signal.SIGKILL)
    lines = [line, *killed.communicate()[1].splitlines(keepends=True)]
    checkpoint = int([line for line in lines if line.endswith(b"\n")][-1].split()[1])
    rows = [finetuning_row(i) for i in range(checkpoint + 5)]
    write(tmp_path / "killed", rows[checkpoint:], resume_iteration=checkpoint)
    write(tmp_path / "whole", rows)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_new_run_does_not_touch_an_old_one(tmp_path: Path) -> None:
    write(tmp_path, [{"iteration": 0}])
    before = files(tmp_path)
    with pytest.raises(UserError, match=rf"logdir={tmp_path}: already holds .* resume={tmp_path}"):
        write(tmp_path, [{"iteration": 0}])
    assert files(tmp_path) == before


@pytest.mark.parametrize("line", ["nonsense", "[1]", "{}", '{"iteration": null}', '{"iteration": 1, "a": "b"}'])
def test_a_corrupt_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"iteration": 0}}\n{line}\n{{"iteration": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a row of metrics"):
        RunLog(tmp_path, 10, resume_iteration=1)


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"logdir={tmp_path}/file/run: cannot write there \(Not a directory\)"):
        RunLog(tmp_path / "file" / "run", 10)


def test_tensorboard_follows_env_steps_and_forgets_what_was_cut(tmp_path: Path) -> None:
    write(tmp_path, [finetuning_row(i) for i in range(4)], tensorboard=True)
    time.sleep(1.1)  # event files are named by the second and read in the order of their names
    write(tmp_path, [finetuning_row(i) for i in range(2, 6)], tensorboard=True, resume_iteration=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("train/return")
    assert [scalar.step for scalar in scalars] == [1000, 2000, 3000, 4000, 5000, 6000]
    assert [scalar.value for scalar in scalars] == pytest.approx([math.sqrt(i) for i in range(6)])
    assert "iteration" not in events.Tags()["scalars"]


def test_wandb_gets_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(**settings: Any) -> SimpleNamespace:
        calls.append(settings)
        return SimpleNamespace(
            log=lambda row, step: calls.append((step, row["train/return"])),
            finish=lambda exit_code: calls.append(exit_code),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    write(tmp_path, [finetuning_row(0), finetuning_row(1)], wandb={"project": "hopper"})
    assert calls == [{"dir": str(tmp_path), "resume": "auto", "project": "hopper"}, (1000, 0.0), (2000, 1.0), 0]


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb.*pip install wandb"):
        RunLog(tmp_path, 10, tensorboard=False, wandb={})


def test_without_a_terminal_an_iteration_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [finetuning_row(i) | {"env_steps": 123_456 + 10_000_000 * i} for i in range(8, 12)], live=None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 110
    assert lines[-1].startswith(
        "[ 11/100]  env steps 110,123,456  steps/s 10,000,000  return 3.32  evaluation 110 ± 2  ETA "
    )


@pytest.mark.parametrize(("terminal", "live"), [("xterm", True), ("dumb", False)])
def test_on_a_terminal_the_panel_is_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: str, live: bool
) -> None:
    """On one that can move its cursor; another gets the lines."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any output for a terminal
    monkeypatch.setenv("TERM", terminal)
    write(tmp_path, [finetuning_row(0)], live=None)
    shown = capsys.readouterr().out
    assert ("╭" in shown, "[  0/100]" in shown) == (live, not live)
    assert len(read_metrics(tmp_path / "metrics.csv")) == 1


def draw(progress: Progress, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(progress)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_panel_fits_and_shows_the_figures(width: int) -> None:
    more = {"steps_per_second": 5432.1, "time/evaluate": 0.9, "time/save": 0.1}
    progress = Progress("hopper", 100, [finetuning_row(i) | more for i in range(36)])
    progress.phase = "collect"
    progress.update(finetuning_row(36) | {"eval/return": 2500.0, "eval/return_std": 250.0, "train/return": math.nan})
    panel = draw(progress, width)
    assert max(map(len, panel.splitlines())) == min(width, 100)
    assert len(panel.splitlines()) == 8
    for text in ("hopper", "36/100", "37,000", "5,432", "5.92", "2,500 ± 250", "12.5 %", "collect 38 %", "save 5 %"):
        assert text in panel, text


def test_pretraining_shows_its_loss() -> None:
    rows = [{"iteration": i, "loss/bc": 0.08 - i / 100, "time/update": 1.0} for i in range(8)]
    assert "BC loss 0.0100 █▇▆▅▄▃▂▁" in draw(Progress("pretrain", 10, rows), 100)


def test_the_time_left_follows_the_last_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    progress = Progress("run", 160, [])
    assert "-:-- left" in draw(progress, 100)
    for i in range(61):
        now.seconds += 3600 if i < 10 else 60
        progress.update({"iteration": i})
    now.seconds += 30
    assert "10:51:30 elapsed   1:39:30 left" in draw(progress, 100)


def test_the_phase_on_show_is_the_one_that_failed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 10, live=False, tensorboard=False)

    def run() -> None:
        with log:
            with log.phase("collect"):
                pass
            with log.phase("update"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert "stopped: update" in draw(log._progress, 100)


@pytest.mark.parametrize("width", [40, 120])
def test_the_summary_prints_paths_whole(width: int) -> None:
    before = {"eval/return": 1512.3, "eval/return_std": 310.4, "eval/episodes": 20, "eval/success_rate": 0.25}
    after = {"eval/return": 3020.7, "eval/return_std": 95.2, "eval/episodes": 20, "eval/success_rate": 0.9}
    console = Console(width=width, file=io.StringIO())
    curve, checkpoint = Path("/runs/[bold]" + "x" * 90, "curve.png"), Path("/runs/checkpoint")
    print_summary(before, after, {"learning curve": curve, "checkpoint": checkpoint}, console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[-2:] == [f"  learning curve  {curve}", f"  checkpoint      {checkpoint}"]
    if width == 120:
        table = [line.split() for line in lines]
        assert ["return", "1,512", "±", "310", "3,021", "±", "95", "+1,508"] in table
        assert ["success", "rate", "25.0", "%", "90.0", "%", "+65.0", "%"] in table
        assert ["episodes", "20", "20"] in table
