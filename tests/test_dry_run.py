"""``dry_run=true``: sizes, memory and times of a run, found out without making it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dppo_fast import dry_run
from dppo_fast.build import build_trainer, parse
from dppo_fast.config import plain
from dppo_fast.dry_run import Rehearsed, rehearse
from dppo_fast.trainer import Trainer
from tests.configs.composed import overridden
from tests.runs import BC, DPPO, DQL, PPO, SAC, demonstrations, train


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(arguments: list[str], *more: str) -> Trainer:
        if arguments is BC:
            more = (*more, f"data.path={demonstrations(tmp_path / 'data.npz')}")
        return build_trainer(parse(plain(overridden(*arguments, *more, f"logdir={tmp_path}/run"))), tmp_path / "run")

    return make


@pytest.mark.parametrize("arguments", [DPPO, PPO, BC, DQL, SAC], ids=["dppo", "ppo", "bc", "dql", "sac"])
def test_it_tells_and_leaves_nothing(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"data.path={demonstrations(tmp_path / 'data.npz')}"] if arguments is BC else []
    assert train(*arguments, *data, "dry_run=true", f"logdir={tmp_path}/run") == 0
    out = capsys.readouterr().out
    told = dict(re.findall(r"^([a-z ]+): +(.+)$", out, re.MULTILINE))
    assert told.keys() >= {"weights", "memory", "update", "in use", "an iteration", "the run"}
    assert ("collecting" in told) == (arguments is not BC)
    assert re.search(r"^[\d.]+ (s|min|h), evaluation not included", told["an iteration"])
    assert told["the run"].endswith("for 3 iterations")
    assert not (tmp_path / "run").exists()


def test_every_minibatch_is_counted(trainer: Callable[..., Trainer]) -> None:
    """6 decisions of 3 environments, 2 scored parts each, in minibatches of 12 pairs: 3 in each of 2 epochs."""
    assert "update:       6 minibatches," in rehearse(trainer(DPPO))
    assert "update:       5 minibatches," in rehearse(trainer(BC))
    assert "update:       6 minibatches," in rehearse(trainer(DQL))


def test_a_late_iteration_is_told_where_the_first_only_explore(trainer: Callable[..., Trainer]) -> None:
    assert "update:       6 minibatches," in rehearse(trainer(SAC))
    assert "update:       0 minibatches\n" in rehearse(trainer(SAC, "algorithm.n_explore_steps=1000"))


def test_expected_times_are_those_of_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def learn(inputs: object, due: str) -> str:
        now[0] += 1.0 if due == "critic" else 10.0
        return due

    rehearsed = Rehearsed(learn, lambda: now[0], kind=1)
    assert [rehearsed(None, due) for due in ["critic"] * 20 + ["actor"] * 7] == ["critic"] * 20 + ["actor"] * 7
    assert rehearsed.total() == 20 * 1.0 + 7 * 10.0
    assert rehearsed.real == now[0] == dry_run.CALLS * 11.0


def test_the_expected_time_of_an_iteration_is_about_right(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts work: a decision takes 3, a minibatch 5."""
    made = trainer(DPPO, "train.n_steps=40", "algorithm.update_epochs=1")
    now = [0.0]
    monkeypatch.setattr("dppo_fast.dry_run.time.perf_counter", lambda: now[0])
    collector, algorithm = made.collector, made.algorithm
    assert collector is not None

    def slow(call: Callable[..., object], seconds: float) -> Callable[..., object]:
        def slowed(*arguments: object) -> object:
            now[0] += seconds
            return call(*arguments)

        return slowed

    monkeypatch.setattr(collector.env, "step", slow(collector.env.step, 3.0))
    monkeypatch.setattr(algorithm, "learn", slow(algorithm.learn, 5.0))
    algorithm.learn.enabled = False
    told = rehearse(made)
    assert "collecting:   40 decisions of all environments, 3e+03 ms each" in told
    assert "update:       20 minibatches, 5e+03 ms each" in told
    assert "an iteration: 3.67 min, evaluation not included" in told  # 40 x 3 s and 20 x 5 s


def test_a_missing_simulator_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dppo_fast.envs.envpool", None)
    assert train("cfg=quickstart", "env.backend=envpool", "dry_run=true", "device=cpu") == 2
    assert re.fullmatch(
        r"error: env.id=hopper-medium-v2, env.backend=envpool: envpool is not usable here .*: pip install 'envpool'\n",
        capsys.readouterr().err,
    )


def test_the_device_s_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60_000_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3_000_000_000)
    told = dry_run._in_use(torch.device("cuda"))
    assert told.endswith("memory, 3 GB of the device's 80 GB, of which 60 GB are free")
