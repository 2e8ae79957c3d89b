"""The benchmarks measure what they say, at their smallest sizes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import iteration, plot, run, timing
from benchmarks.inputs import SHAPES
from benchmarks.learning import enclosed, report
from benchmarks.reference import IteratedAtOnce, advantages, load, vectorised_discount
from benchmarks.registry import OPS, Op, tensors
from benchmarks.report import ROOT, environment, read_csv, write_csv
from benchmarks.vs_reference import compared, difference, network_arguments
from dppo_fast.kernels.gae import gae
from dppo_fast.runtime.precision import pick_recipe
from dppo_fast.types import UserError
from tests.runs import COMMON, DPPO

CPU = torch.device("cpu")
KERNELS = {name: op for name, op in OPS.items() if name not in ("decision", "minibatch")}
QUICK = ["--shape", "tiny", "--seconds", "0.001"]
REFERENCE = os.environ.get("DPPO_REFERENCE")


def result_of(op: Op, backend: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return list(tensors(op.call(op.arguments(SHAPES["tiny"], CPU), backend)()))


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name, op in OPS.items() for backend in ("reference", "native") if backend in op.backends],
)
def test_every_op_runs_at_the_smallest_shape(name: str, backend: str) -> None:
    op = OPS[name]
    if obstacle := op.obstacle(backend, CPU):
        pytest.skip(obstacle)
    results = result_of(op, backend)
    assert all(result.isfinite().all() for result in results)
    if name in KERNELS:
        for ours, expected in zip(results, result_of(op, "reference"), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_part_of_what_is_timed() -> None:
    rows, chunk = SHAPES["tiny"].rows, (SHAPES["tiny"].rows, SHAPES["tiny"].Th, SHAPES["tiny"].Da)
    assert [tuple(result.shape) for result in result_of(OPS["chain_log_prob"], "reference")] == [(rows,), chunk]
    assert result_of(OPS["value_loss"], "reference")[-1].shape == (rows,)


@pytest.mark.parametrize("name", OPS)
def test_the_tests_that_guard_an_op_exist(name: str) -> None:
    assert all((ROOT / node.split("::")[0]).is_file() for node in OPS[name].tests.split())


def test_bytes_are_those_of_arguments_and_results() -> None:
    arguments = OPS["gae"].arguments(SHAPES["tiny"], CPU)
    result = OPS["gae"].call(arguments, "reference")()
    T, N = SHAPES["tiny"].T, SHAPES["tiny"].N
    assert OPS["gae"].traffic(arguments, result) == T * N * (3 * 4 + 2 * 1 + 2 * 4) + N * 4


@pytest.mark.parametrize("name", ["decision", "minibatch", "mlp_chain"])
def test_operations_are_those_of_the_products(name: str) -> None:
    """All products but the time embedding's, whose few rows do not matter where there are many observations."""
    shape = replace(SHAPES["tiny"], N=500, rows=5000, Do=40)
    call = OPS[name].call(OPS[name].arguments(shape, CPU), "reference")
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    assert OPS[name].flops(shape) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_an_op_becomes_a_row_and_the_rows_a_plot(tmp_path: Path) -> None:
    csv = tmp_path / "results" / "ops.csv"
    assert (
        run.main(["--op", "gae", "ppo_loss", "--backend", "reference", *QUICK, "--no-verify", "--out", str(csv)]) == 0
    )
    row, other = read_csv(csv)
    assert (row["op"], row["backend"], row["shape"], row["dtype"]) == ("gae", "reference", "tiny", "float32")
    assert (row["verified"], other["op"]) == ("False", "ppo_loss")
    p20, p50, p80 = (float(row[f"p{n}_us"]) for n in (20, 50, 80))
    assert 0 < p20 <= p50 <= p80
    assert float(row["gb_s"]) == pytest.approx(int(row["bytes"]) / p50 / 1e3, rel=1e-3)
    assert float(row["tflop_s"]) == pytest.approx(int(row["flops"]) / p50 / 1e6, rel=1e-3)
    assert environment(CPU).items() <= {**row, "threads": int(row["threads"])}.items()
    plot.main([str(csv), str(tmp_path / "ops.png")])
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")


def test_an_op_whose_tests_fail_gets_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = tmp_path / "test_op.py"
    arguments = ["--op", "gae", "value_loss", "--backend", "reference", *QUICK, "--out", str(tmp_path / "ops.csv")]
    test.write_text("def test_op(): assert False")
    monkeypatch.setitem(OPS, "gae", replace(OPS["gae"], tests=str(test)))
    monkeypatch.setitem(OPS, "value_loss", replace(OPS["value_loss"], tests=f"{test}::test_other"))
    test.write_text("def test_op(): assert False\ndef test_other(): pass")
    assert run.main(arguments) == 1
    assert [(row["op"], row["verified"]) for row in read_csv(tmp_path / "ops.csv")] == [("value_loss", "True")]


def test_a_call_is_measured() -> None:
    result = timing.measure(lambda: time.sleep(0.002), CPU, seconds=0.02)
    assert 2000 <= result.p20_us <= result.p50_us <= result.p80_us
    ceiling = timing.measure_ceiling(CPU, seconds=0.01)
    assert ceiling.seconds(int(2 * ceiling.bandwidth), 0) == pytest.approx(2)
    assert ceiling.seconds(0, int(3 * ceiling.rate)) == pytest.approx(3)


def test_calls_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    calls: dict[str, Callable[[], Any]] = {name: lambda name=name: turns.append(name) for name in ("a", "b")}
    clock = iter([100.0, 100.0, 1.0, 5.0, 3.0, 4.0, 2.0, 6.0])
    monkeypatch.setattr(timing, "wall_clock", lambda call, device: (call(), next(clock))[1])
    assert timing.interleaved(calls, CPU, seconds=0, least=3) == {"a": 2.0, "b": 5.0}
    assert turns == ["a", "b"] * 4


def test_rows_are_on_disk_as_they_come(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"task": "update", "ratio": 1 / 3}
        assert read_csv(tmp_path / "rows.csv") == [{"task": "update", "ratio": "0.333333", "device": "x"}]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csv(rows(), {"device": "x"}, tmp_path / "rows.csv")
    assert len(read_csv(tmp_path / "rows.csv")) == 1


def test_an_iteration_by_phase(tmp_path: Path) -> None:
    csv = tmp_path / "iteration.csv"
    assert iteration.main(["--iterations", "2", "--out", str(csv), *DPPO]) == 0
    rows = read_csv(csv)
    assert tuple(row["phase"] for row in rows) == iteration.PHASES
    seconds = {row["phase"]: float(row["seconds"]) for row in rows}
    assert min(seconds[phase] for phase in ("sampling", "env", "advantage", "update")) > 0
    assert float(rows[0]["amdahl_ceiling"]) == pytest.approx(sum(seconds.values()) / seconds["env"], rel=1e-3)
    plot.main([str(csv), str(tmp_path / "iteration.png")])
    assert (tmp_path / "iteration.png").exists()


def test_phases_add_up_to_the_wall_clock() -> None:
    row = {"time/sampling": 1.0, "time/env": 2.0, "time/advantage": 0.5, "time/update": 4.0, "seconds": 8.0}
    assert iteration.phases(row | {"time/collect": 0.25}) == {
        "sampling": 1.0,
        "env": 2.0,
        "advantage": 0.5,
        "update": 4.0,
        "other": 0.5,
    }
    assert iteration.amdahl_ceiling({"env": 2.0, "update": 6.0}) == 4.0


def test_a_run_without_an_environment_has_no_such_iteration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["cfg=quickstart_pretrain", *COMMON, "policy.network.mlp_dims=[16,16,16]"]
    assert iteration.main([*settings, f"logdir={tmp_path}"]) == 2
    assert "on-policy" in capsys.readouterr().err


def test_a_plot_needs_a_benchmarks_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.csv").write_text("iteration,env_steps\n0,0\n")
    assert plot.main([str(tmp_path / "metrics.csv"), str(tmp_path / "x.png")]) == 2
    assert "metrics.csv" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_both_ratios_are_given() -> None:
    row = compared("update", 1000, {"reference": 6.0, "fix": 3.0, "ours": 2.0})
    assert (row["ratio"], row["ratio_fix"]) == (3.0, 1.5)
    row = compared("sampling", 40, {"reference": 6.0, "ours": 2.0})
    assert (row["ratio"], row["ratio_fix"], row["reference_fix_ms"]) == (3.0, 3.0, 6000.0)


def test_a_mean_is_enclosed_where_other_runs_lie_on_both_sides() -> None:
    runs = [{0.0: 1.0, 1.0: 5.0, 2.0: 9.0}, {0.0: 3.0, 1.0: 5.0}]
    assert enclosed(runs, [{0.0: 1.0, 1.0: 6.0}, {0.0: 2.0, 1.0: 7.0, 2.0: 9.0}]) == (1, 2)


def test_the_verdict_on_learning_comes_from_evaluations_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    returns = {"fast0": (1000, 2900), "plain0": (1100, 2850), "plain1": (900, 2950), "fault": (1000, 9)}
    for name, (first, last) in returns.items():
        (tmp_path / name).mkdir()
        rows = [f"0,0,{first}", "1,80000,", f"2,160000,{last}"]
        (tmp_path / name / "metrics.csv").write_text("\n".join(["iteration,env_steps,eval/return", *rows, ""]))
    fast, *plain, fault = (tmp_path / name for name in returns)
    assert report([fast], fault, plain, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "fast0: 1000 -> 2900 at 160,000 env steps; passes 2800 at 160,000 env steps" in printed
    assert "fault: 1000 -> 1000 at 0 env steps; never reaches 2800" in printed
    assert "at 2 of 2 evaluations" in printed
    assert report([fast], plain[0], plain[1:], tmp_path) == 1
    assert report([fault], None, plain, tmp_path) == 1


def test_difference_is_relative_to_the_largest_number() -> None:
    assert difference(torch.tensor([4.0, 0.5]), torch.tensor([4.0, 0.0])) == 0.125
    assert network_arguments({"name": "mlp", "mlp_dims": [8]}, 11) == {"mlp_dims": [8], "cond_dim": 11}


def test_the_fix_does_the_loop_at_once() -> None:
    indices = torch.tensor([0, 2, 1, 2])
    shipped = torch.tensor([0.9 ** (3 - i - 1) for i in indices])
    at_once = indices.as_subclass(IteratedAtOnce)
    with vectorised_discount():
        passes = list(at_once)
        fixed = torch.tensor([0.9 ** (3 - i - 1) for i in at_once])
        assert torch.tensor([1.0, 2.0]).tolist() == [1.0, 2.0]
    assert len(passes) == 1
    assert fixed.equal(shipped)
    assert type(at_once.float()) is type(torch.arange(3)[at_once]) is torch.Tensor


def test_the_references_advantages_are_ours_without_time_limits() -> None:
    reward, value = torch.randn(2, 6, 3, dtype=torch.float64)
    last = torch.randn(3, dtype=torch.float64)
    terminated = torch.rand(6, 3) < 0.3
    ours, _ = gae(reward, value, value, last, terminated, torch.zeros_like(terminated), 0.9, 0.8)
    theirs = advantages(reward.numpy(), torch.cat([value, last[None]]).numpy(), terminated.numpy(), 0.9, 0.8)
    torch.testing.assert_close(ours, torch.from_numpy(theirs))


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--reference {tmp_path}: cannot import model.diffusion.nothing"):
        load(tmp_path, "model.diffusion.nothing")


@pytest.mark.skipif(REFERENCE is None, reason="DPPO_REFERENCE names no checkout of irom-princeton/dppo")
def test_side_by_side_with_the_reference(tmp_path: Path) -> None:
    csv = tmp_path / "vs.csv"
    sizes = [
        "--batch",
        "2",
        "--log-prob-batch",
        "20",
        "--update",
        "50",
        "--seconds",
        "0",
        "--iteration",
        "--steps",
        "2",
    ]
    settings = [*COMMON, "env.num_envs=4", "env.num_threads=1", "algorithm.update_epochs=1"]
    command = [sys.executable, "-m", "benchmarks.vs_reference", "--reference", str(REFERENCE), *sizes, "--repeats", "1"]
    subprocess.run([*command, "--out", str(csv), *settings], cwd=ROOT, check=True)
    rows = read_csv(csv)
    tasks = [("sampling", "2"), ("decision", "2"), ("iteration", "2"), ("update", "50")]
    if pick_recipe("auto", CPU).backward == "bf16":
        tasks.append(("update fp32", "50"))
    assert [(row["task"], row["size"]) for row in rows] == tasks
    sampling, decision = (float(row["reference_ms"]) for row in rows[:2])
    assert 0 < sampling < decision
    plot.main([str(csv), str(tmp_path / "vs.png")])
    assert (tmp_path / "vs.png").exists()
