"""Every command that the READMEs show is executed here, made short by overrides."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dppo_fast.checkpoint import checkpoints, load_policy_weights
from tests.data.conversions import robomimic

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "dppo_fast/assets/hopper-medium-v2/README.md"]
TINY_RUN = [
    "log.tensorboard=false",
    "env.num_envs=2",
    "env.num_threads=1",
    "train.n_train_itr=3",
    "train.n_steps=4",
    "train.eval_episodes=2",
]
ONLINE = ["algorithm.batch_size=8", "train.val_freq=2", "device=cpu"]
OFFLINE = ["algorithm.batch_size=4", "data.max_n_episodes=1", "train.val_freq=0"]


def commands(page: str) -> list[str]:
    """The lines of its console blocks, without comments."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def shortened(command: str) -> list[str]:
    """``command`` as an argument list, with the overrides that make it quick."""
    _, _, module, *arguments = shlex.split(command)
    if module == "dppo_fast.collect":
        extra = ["steps=60", "num_envs=2", "min_return=null", "max_return=null"]
    elif module == "benchmarks.learning":
        extra = ["--results", "."] if "report" in arguments else [*TINY_RUN, *ONLINE]
    elif module == "benchmarks.run":
        extra = ["--shape", "tiny", "--seconds", "0.01", "--no-verify"]
    elif module == "benchmarks.iteration":
        arguments = ["--iterations", "1", *arguments]
        extra = [*TINY_RUN, *ONLINE]
    elif module == "dppo_fast.evaluate":
        extra = ["episodes=2", "num_envs=2", "mode=stochastic", "video=0"]
    elif module == "dppo_fast.latency":
        extra = ["calls=5", "warm_up=1"]
    elif module == "dppo_fast.train":
        extra = [*TINY_RUN, *(OFFLINE if "pretrain" in command else ONLINE)]
    else:
        extra = []
    return [sys.executable, "-m", module, *arguments, *extra]


def run(command: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(shortened(command), cwd=folder, env=environment, capture_output=True, text=True)
    # the tiny learning run cannot pass its gate, which `report` says with exit code 1
    assert result.returncode == (1 if " report " in command else 0), f"{command}\n{result.stdout}\n{result.stderr}"


def prepare(folder: Path) -> None:
    """The files that the commands start from: a reference checkpoint, and a run that was stopped."""
    assets = ROOT / "dppo_fast/assets/hopper-medium-v2"
    actor = load_policy_weights(assets / "policy.safetensors").actor
    network = {f"network.{name}": value for name, value in actor.items()}
    torch.save({"epoch": 3000, "model": network, "ema": network}, folder / "state_3000.pt")
    (folder / "normalization.npz").write_bytes((assets / "normalization.npz").read_bytes())
    robomimic(folder / "low_dim.hdf5")
    run("python -m dppo_fast.train cfg=quickstart logdir=runs/my_run", folder)
    checkpoints(folder / "runs/my_run")[-1].unlink()
    (folder / "dppo_fast/assets/hopper-medium-v2").mkdir(parents=True)


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    shown = [command for command in commands(page) if command.startswith("python ")]
    assert shown
    for command in shown:
        run(command, tmp_path)


def test_make_targets_exist() -> None:
    targets = {match for command in commands("README.md") for match in re.findall(r"make (\w+)", command)}
    targets |= set(re.findall(r"^    make (\w+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert {"run", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
