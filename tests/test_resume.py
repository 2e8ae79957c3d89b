"""A run that is killed at any moment and resumed is the run that was never interrupted, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dppo_fast.checkpoint import checkpoints
from tests.runs import (
    BC,
    DPPO,
    DQL,
    DROPOUT,
    PPO,
    SAC,
    assert_same_runs,
    demonstrations,
    killed,
    rows,
    train,
    train_until,
)

COLLECT = "dppo_fast.buffer:RolloutBuffer.add"
UPDATE = "dppo_fast.optim:Trainable.step"
EVALUATE = "dppo_fast.evaluator:Evaluator.evaluate"
WRITE_CHECKPOINT = "dppo_fast.checkpoint:atomic_write"

RUNS = {
    "dppo-envpool": [*DPPO, "env.backend=envpool"],
    "dppo-gymnasium": [*DPPO, "env.backend=gymnasium"],
    "ppo": PPO,
    "dql": DQL,
    "sac": SAC,
    "bc": BC,
    "bc-dropout": DROPOUT,
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The arguments of the run with this name."""
    data = demonstrations(tmp_path_factory.mktemp("data") / "train.npz")
    return lambda name: [*RUNS[name], *([f"data.path={data}"] if name.startswith("bc") else [])]


@pytest.fixture(scope="module")
def whole(arguments: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The uninterrupted run with this name; made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole") / name
            assert train(*arguments(name), f"logdir={made[name]}") == 0
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "moment", "call"),
    [
        ("dppo-envpool", COLLECT, 6 + 3),
        ("dppo-envpool", UPDATE, 12 + 5),
        ("dppo-gymnasium", COLLECT, 6 + 3),
        ("dppo-gymnasium", UPDATE, 12 + 5),
        ("ppo", COLLECT, 16 + 9),
        ("ppo", UPDATE, 12 + 5),
        ("dql", COLLECT, 6 + 3),
        ("dql", UPDATE, 6 + 5),
        ("sac", COLLECT, 6 + 3),
        ("sac", UPDATE, 6 + 5),
        pytest.param("dql", "dppo_fast.journal:Journal.prune", 2, id="between checkpoint and pruning the replay"),
        ("bc", UPDATE, 5 + 3),
        ("bc-dropout", UPDATE, 5 + 3),
        pytest.param("dppo-envpool", COLLECT, 3, id="in the first iteration"),
        pytest.param("dppo-envpool", EVALUATE, 1, id="before the first checkpoint"),
        pytest.param("dppo-envpool", WRITE_CHECKPOINT, 2, id="between metrics and checkpoint"),
        pytest.param("dppo-envpool", "dppo_fast.trainer:prune", 2, id="between checkpoint and pruning"),
        pytest.param("bc", "dppo_fast.plot:learning_curve", 1, id="after the last iteration"),
    ],
)
def test_a_killed_run_resumes_exactly(
    name: str,
    moment: str,
    call: int,
    arguments: Callable[[str], list[str]],
    whole: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    killed([*arguments(name), f"logdir={run}"], moment, call, tmp_path / "output")
    assert train(f"resume={run}") == 0
    assert_same_runs(run, whole(name))
    assert (run / "learning_curve.png").is_file()


@pytest.mark.parametrize("name", ["dppo-envpool", "ppo", "dql", "sac", "bc", "bc-dropout"])
def test_the_seed_determines_the_run(
    name: str, arguments: Callable[[str], list[str]], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    assert train(*arguments(name), f"logdir={tmp_path / 'same'}") == 0
    assert train(*arguments(name), f"logdir={tmp_path / 'other'}", "seed=7") == 0
    assert_same_runs(tmp_path / "same", whole(name))
    assert rows(tmp_path / "other") != rows(whole(name))


def test_a_corrupt_checkpoint_is_refused_and_the_previous_one_used_on_request(
    arguments: Callable[[str], list[str]],
    whole: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    killed([*arguments("dppo-envpool"), f"logdir={run}"], COLLECT, 6 + 3, tmp_path / "output")
    latest = checkpoints(run)[-1]
    good = latest.read_bytes()
    flipped = good[:-100] + bytes([good[-100] ^ 1]) + good[-99:]
    for damaged in (flipped, good[:-1], good[: len(good) // 2], b"", b"something else"):
        latest.write_bytes(damaged)
        assert train(f"resume={run}") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(latest) in error
    assert train(f"resume={run}", "resume_from=previous") == 0
    assert_same_runs(run, whole("dppo-envpool"))


def test_a_run_can_be_prolonged(
    arguments: Callable[[str], list[str]], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(*arguments("dppo-envpool"), f"logdir={run}", "train.n_train_itr=2") == 0
    assert train(f"resume={run}", "train.n_train_itr=3") == 0
    assert OmegaConf.load(run / "config.yaml").train.n_train_itr == 3
    assert_same_runs(run, whole("dppo-envpool"))


def test_resuming_a_finished_run_changes_nothing(whole: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole("dppo-envpool"), run)
    settings = (run / "config.yaml").read_bytes()
    assert train(f"resume={run}", "algorithm.actor_lr=1e-5") == 0
    assert_same_runs(run, whole("dppo-envpool"))
    assert (run / "config.yaml").read_bytes() == settings


@pytest.mark.parametrize("moment", [COLLECT, UPDATE])
def test_ctrl_c_says_how_to_go_on(
    moment: str, arguments: Callable[[str], list[str]], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code = train_until([*arguments("dppo-envpool"), f"logdir={run}"], moment, 9, signal.SIGINT, tmp_path / "output")
    assert code == 130
    assert (tmp_path / "output").read_text().splitlines()[-1] == f"interrupted; resume={run} continues the run"
    assert train(f"resume={run}") == 0
    assert_same_runs(run, whole("dppo-envpool"))


def test_the_commands_themselves(
    arguments: Callable[[str], list[str]], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """As a user does it: ``python -m``, a SIGKILL from outside, and another ``python -m`` from another folder."""
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "dppo_fast.train"]
    slow = [*command, *arguments("dppo-gymnasium"), f"logdir={tmp_path / 'run'}"]
    with subprocess.Popen(slow, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("[2/3]"))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run([*command, "resume=run"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert_same_runs(tmp_path / "run", whole("dppo-gymnasium"))
