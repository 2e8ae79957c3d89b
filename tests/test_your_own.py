"""`docs/your-own.md`, done: its files, its commands, and what they should lead to, with few iterations."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from dppo_fast.cli import config_folder
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.train import main as train
from tests.runs import COMMON, rows

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "your-own.md").read_text()
FILES = re.findall(r"`(\w+\.(?:py|yaml))`[^`]*?:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SHORT = {
    "pretrain": ["train.n_train_itr=2", "train.val_freq=2", "algorithm.epoch_start_ema=1"],
    "finetune": ["train.n_train_itr=2", "train.n_steps=6", "train.val_freq=2", "algorithm.batch_size=90"],
}
SMALL = [*COMMON, "train.eval_episodes=4", "env.num_envs=6", "log.live=false"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder, where Python finds modules as it does for ``python -m``."""
    for name, text in FILES:
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_every_file_is_there() -> None:
    assert [name for name, _ in FILES] == [
        *("reach.py", "record.py", "task.yaml", "pretrain.yaml", "finetune.yaml", "reach_vec.py")
    ]
    assert len(COMMANDS) == 4


def test_the_page(folder: Path) -> None:
    for command in COMMANDS:
        python, *arguments = shlex.split(command)
        assert python == "python"
        if arguments == ["record.py"]:
            runpy.run_path("record.py")
            continue
        assert arguments[:2] == ["-m", "dppo_fast.train"]
        kind = "pretrain" if "cfg=pretrain.yaml" in arguments else "finetune"
        film = ["render.train=[2]"] if "runs/finetune" in command else []
        assert train([*arguments[2:], *SMALL, *SHORT[kind], *film]) == 0
    returns = Trajectories.load("data/train.npz").returns
    assert returns is not None
    assert 3 < returns.mean() < 12
    videos = [f"evaluate_{iteration}_env{env}.mp4" for iteration in ("000000", "000002") for env in (0, 1)]
    videos.append("train_000000_env2.mp4")
    assert sorted(file.name for file in (folder / "runs/finetune/videos").glob("[!.]*")) == videos
    assert not (folder / "runs/vec/videos").exists()
    for run in ("finetune", "vec"):
        before, after = rows(folder / "runs" / run)[0], rows(folder / "runs" / run)[-1]
        assert after["env_steps"] == 2 * 6 * 6 * 4
        assert "eval/success_rate" in before
        assert after["eval/episode_length"] == 24


@pytest.mark.parametrize("page", ["your-own.md", "environments.md"])
def test_links_and_configurations_exist(page: str) -> None:
    text = (DOCS / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (DOCS / target).exists(), target
    for piece in re.findall(r"`piece/([\w/-]+)`", text):
        assert (config_folder() / "piece" / f"{piece}.yaml").exists(), piece
