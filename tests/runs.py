"""Runs of seconds through the mains, in this process or in one that gets a signal at a chosen moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dppo_fast.data.trajectories import Trajectories
from dppo_fast.train import main

COMMON = ["device=cpu", "num_threads=1", "log.tensorboard=false"]
SMALL_ENV = ["env.num_envs=3", "env.num_threads=1", "train.eval_episodes=2"]
SMALL_DIFFUSION = ["policy.network.mlp_dims=[16,16,16]", "policy.options.denoising_steps=4"]

DPPO = [
    "cfg=quickstart",
    "policy.checkpoint=null",
    *COMMON,
    *SMALL_ENV,
    *SMALL_DIFFUSION,
    "policy.options.ft_denoising_steps=2",
    "critic.mlp_dims=[8,8,8]",
    "algorithm.batch_size=12",
    "algorithm.update_epochs=2",
    "train.n_train_itr=3",
    "train.n_steps=6",
    "train.val_freq=2",
]
"""Running reward scaling; an iteration is 6 decisions and 6 minibatches. The first and every second row evaluate."""

PPO = [
    "cfg=gym/scratch/hopper-v2/demonstrator",
    *COMMON,
    *SMALL_ENV,
    "policy.network.mlp_dims=[8]",
    "critic.mlp_dims=[8]",
    "algorithm.batch_size=16",
    "algorithm.update_epochs=2",
    "train.n_train_itr=3",
    "train.n_steps=16",
    "train.val_freq=2",
]
"""A Gaussian policy with running observation normalisation; an iteration is 16 decisions and 6 minibatches."""

DQL = [
    "cfg=gym/finetune/hopper-v2/ft_dql_diffusion_mlp",
    "policy.checkpoint=null",
    *COMMON,
    *SMALL_ENV,
    *SMALL_DIFFUSION,
    "critic.mlp_dims=[8,8,8]",
    "algorithm.batch_size=12",
    "algorithm.replay_ratio=4",
    "algorithm.buffer_size=40",
    "algorithm.n_critic_warmup_itr=1",
    "train.n_train_itr=3",
    "train.n_steps=6",
    "train.val_freq=2",
]
"""A replay buffer that runs over; an iteration is 6 decisions and 6 minibatches, 6 or 12 steps."""

SAC = [
    "cfg=gym/scratch/hopper-v2/sac_mlp",
    *COMMON,
    *SMALL_ENV,
    "policy.network.mlp_dims=[8]",
    "critic.mlp_dims=[8]",
    "algorithm.batch_size=12",
    "algorithm.critic_replay_ratio=4",
    "algorithm.actor_replay_ratio=2",
    "algorithm.n_explore_steps=4",
    "train.n_train_itr=3",
    "train.n_steps=6",
    "train.val_freq=2",
    "train.save_freq=1",
]
"""From exploration into learning; an iteration is 6 decisions and, from the second on, 6 minibatches."""

SMALL_BC = [
    *COMMON,
    *SMALL_ENV,
    "algorithm.batch_size=16",
    "algorithm.epoch_start_ema=2",
    "algorithm.update_ema_freq=2",
    "train.n_train_itr=3",
    "train.val_freq=2",
]
"""Pre-training on the data of `demonstrations`; an iteration is 5 minibatches."""

BC = ["cfg=gym/pretrain/hopper-medium-v2/pre_diffusion_mlp", *SMALL_BC, *SMALL_DIFFUSION]
DROPOUT = [
    "cfg=gym/pretrain/hopper-medium-v2/pre_gaussian_mlp",
    *SMALL_BC,
    "policy.network.mlp_dims=[16,16]",
    "policy.network.residual_style=false",
    "policy.network.dropout=0.5",
]
"""Of a diffusion policy, and of a Gaussian with dropout."""


def demonstrations(
    path: Path, state_dim: int = 11, action_dim: int = 3, lengths: tuple[int, ...] = (40, 30, 19)
) -> Path:
    """Write random demonstrations with the dims of Hopper."""
    rng = np.random.default_rng(0)
    steps = sum(lengths)
    states, actions = (rng.uniform(-1, 1, (steps, dim)).astype(np.float32) for dim in (state_dim, action_dim))
    terminals = np.zeros(steps, bool)
    terminals[np.cumsum(lengths) - 1] = True
    Trajectories(states, actions, np.array(lengths), np.ones(steps, np.float32), terminals).save(path)
    return path


def train(*arguments: str) -> int:
    """The exit code of ``python -m dppo_fast.train``, called here."""
    return main(arguments)


def train_until(arguments: list[str], moment: str, call: int, number: int, output: Path) -> int | None:
    """Train in a process that sends itself signal ``number`` at the ``call``-th call of the function ``moment``.

    ``moment`` is ``module:name`` or ``module:Class.method``; ``output`` gets what is printed. Gives the exit code,
    which is minus the signal where that was the end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dppo_fast.build", "dppo_fast.log", "envpool", "gymnasium", "tests.runs"])
    process = context.Process(target=_train_until, args=(arguments, moment, call, number, output))
    process.start()
    process.join()
    return process.exitcode


def _train_until(arguments: list[str], moment: str, call: int, number: int, output: Path) -> None:
    module, _, name = moment.partition(":")
    *path, attribute = name.split(".")
    owner = reduce(getattr, path, import_module(module))
    function, calls = getattr(owner, attribute), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, attribute, counted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    with output.open("w") as file:
        sys.stdout = sys.stderr = file
        code = main(arguments)
    sys.exit(code)


def killed(arguments: list[str], moment: str, call: int, output: Path) -> None:
    """Train as `train_until` says, up to a SIGKILL."""
    code = train_until(arguments, moment, call, signal.SIGKILL, output)
    assert code == -signal.SIGKILL, f"{moment} {call}: the run ended by itself with {code}: {output.read_text()}"


def rows(run: Path) -> list[dict[str, float]]:
    """The metrics of a run but for its wall-clock times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    clock = ("time/", "steps_per_second")
    return [{key: x for key, x in json.loads(line).items() if not key.startswith(clock)} for line in lines]


def contents(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All numbers and strings of a checkpoint but for its configuration, and all tensors."""
    with safe_open(str(checkpoint), "pt") as file:
        outline = json.loads(file.metadata()["outline"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del outline["config"]
    return outline, tensors


def assert_same_runs(a: Path, b: Path) -> None:
    """Metrics and checkpoints are equal bit for bit."""
    assert rows(a) == rows(b)
    names = [sorted(file.name for file in (run / "checkpoint").iterdir()) for run in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        (outline, tensors), (other_outline, other_tensors) = (contents(run / "checkpoint" / name) for run in (a, b))
        assert outline == other_outline
        assert tensors.keys() == other_tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, other_tensors[key]), f"{name}: {key}"
