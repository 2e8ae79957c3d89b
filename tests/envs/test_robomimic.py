"""Robomimic's tasks on robosuite, in worker processes; images where there is OpenGL without a screen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dppo_fast.collect import main as collect
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.envs import ChunkEnv, EnvConfig, make_env
from dppo_fast.envs.robomimic import _require_versions
from dppo_fast.envs.workers import WorkerSimulator
from dppo_fast.log import read_metrics
from dppo_fast.runtime import gl
from dppo_fast.types import Obs, UserError
from tests.envs.toy import random_actions
from tests.runs import train

has_gl = pytest.mark.skipif(gl.headless_gl() not in ("egl", "osmesa"), reason="has neither EGL nor OSMesa")
pytest.importorskip("robosuite", reason="needs pip install 'dppo-fast[robomimic]'")

IMAGES = {"cameras": ["agentview", "robot0_eye_in_hand"], "image_size": [48, 64]}

TINY = [
    "device=cpu",
    "num_threads=1",
    "log.tensorboard=false",
    "policy.checkpoint=null",
    "env.normalization=none",
    "env.num_envs=2",
    "env.num_threads=2",
    "env.max_episode_steps=12",
    "policy.network.mlp_dims=[16,16,16]",
    "critic.mlp_dims=[8,8,8]",
    "algorithm.batch_size=10",
    "algorithm.update_epochs=1",
    "algorithm.n_critic_warmup_itr=0",
    "train.n_train_itr=2",
    "train.n_steps=4",
    "train.val_freq=0",
]
TINY_IMAGES = [
    *TINY,
    "env.num_envs=1",
    "env.max_episode_steps=4",
    "train.n_steps=2",
    "env.options.image_size=[32,32]",
    *(f"{part}.backbone.embed_dim=16" for part in ("policy.network", "critic")),
    *(f"{part}.spatial_emb=8" for part in ("policy.network", "critic")),
]


@contextmanager
def opened(task: str, num_envs: int = 2, num_threads: int = 1, **options: Any) -> Iterator[ChunkEnv]:
    env = make_env(EnvConfig(task, num_envs, 4, num_threads=num_threads, options=options), "cpu", 0)
    assert isinstance(env, ChunkEnv)
    yield env
    env.close()


def run(env: ChunkEnv, actions: torch.Tensor) -> list[Obs]:
    return [env.step(action).obs for action in actions]


def assert_same(found: list[Obs], expected: list[Obs]) -> None:
    for obs, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(obs[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def lift() -> Iterator[ChunkEnv]:
    with opened("lift") as env:
        yield env


@pytest.mark.parametrize(
    ("task", "dims", "action_dim", "objects"),
    [("can", 23, 7, [(9, 16)]), ("square", 23, 7, [(9, 16)]), ("transport", 59, 14, [(18, 25), (25, 32)])],
)
def test_the_other_tasks(task: str, dims: int, action_dim: int, objects: list[tuple[int, int]]) -> None:
    with opened(task, num_envs=1) as env:
        state = env.reset()["state"][0, 0]
        assert (env.obs_shapes, env.action_dim) == ({"state": (1, dims)}, action_dim)
        arms = [slice(9 * arm, 9 * arm + 9) for arm in range(action_dim // 7)]
        poses = [state[arm][:7] for arm in arms] + [state[first:last] for first, last in objects]
        for pose in poses:  # a position, then a unit quaternion
            assert pose[3:].norm().item() == pytest.approx(1, abs=1e-5)
        for arm in arms:  # two fingers, mirrored
            assert state[arm][7:].tolist() == pytest.approx([0.0208, -0.0208], abs=1e-3)
        step = env.step(torch.zeros(1, 4, action_dim))
        assert step.reward.tolist() == [0]
        assert not (step.terminated | step.truncated).any()


def test_the_state_and_the_actions_of_lift(lift: ChunkEnv) -> None:
    state = lift.reset(0)["state"][:, 0]
    hand, cube, between = state[:, :3], state[:, 9:12], state[:, 16:19]
    assert lift.obs_shapes == {"state": (1, 19)}
    assert torch.allclose(hand - cube, between, atol=1e-6)
    assert ((cube[:, 2] > 0.8) & (cube[:, 2] < 0.85)).all()
    assert (cube[:, :2].abs() < 0.05).all()
    forward = torch.zeros(2, 4, 7)
    forward[:, :, 0], forward[:, :, 6] = 0.4, 1.0  # 0.02 m ahead of where the hand is, at every step; gripper closed
    moved = lift.step(forward).obs["state"][:, 0]
    assert (moved[:, 0] - hand[:, 0] > 0.01).all()
    assert ((moved[:, 1:3] - hand[:, 1:3]).abs() < 0.01).all()
    assert (moved[:, 7] < state[:, 7] - 0.005).all()


def test_one_seed_fixes_everything_and_nothing_of_an_episode_is_left_to_the_next(lift: ChunkEnv) -> None:
    actions = random_actions(lift, 12)
    first = lift.reset(5)
    expected = run(lift, actions)
    closing = torch.ones(2, 4, 7)
    lift.reset(6)
    run(lift, torch.stack([closing] * 6))
    assert_same([lift.reset(5), *run(lift, actions)], [first, *expected])
    assert not torch.equal(lift.reset(6)["state"], first["state"])
    with opened("lift", num_envs=1) as alone:
        found = [alone.reset(5), *run(alone, actions[:, :1])]
        assert_same(found, [{"state": obs["state"][:1]} for obs in (first, *expected)])


def test_a_restored_env_continues_bit_for_bit(lift: ChunkEnv) -> None:
    actions = random_actions(lift, 12)
    lift.reset(1)
    run(lift, actions[:6])
    state = lift.state_dict()
    expected = run(lift, actions[6:])
    lift.load_state_dict(state)
    assert_same(run(lift, actions[6:]), expected)


def test_demonstrations(tmp_path: Path) -> None:
    """Without noise both ways lift the cube; the reward is 1 while it is up."""
    settings = ["num_envs=2", "steps=80", "options.noise=0", "options.jitter=0", "env.max_episode_steps=60"]
    assert collect(["scripted=lift", f"out={tmp_path}", "device=cpu", "min_return=1", *settings]) == 0
    found = Trajectories.load(tmp_path / "train.npz")
    assert (found.state_dim, found.action_dim) == (19, 7)
    assert found.rewards is not None
    assert set(found.rewards.tolist()) == {0.0, 1.0}
    assert found.traj_lengths.tolist() == [60, 60]


def test_a_worker_killed_in_the_middle_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    step = WorkerSimulator.step

    def shot(self: WorkerSimulator, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(self._workers[1].process.pid or 0, signal.SIGKILL)
        return step(self, *arguments)

    monkeypatch.setattr(WorkerSimulator, "step", shot)
    assert train("cfg=robomimic/finetune/lift/ft_ppo_diffusion_mlp", *TINY, f"logdir={tmp_path}/run") == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/worker_deaths" in row]
    assert [row["train/worker_deaths"] for row in rows] == [1, 1]
    assert [row["env_steps"] for row in rows] == [32, 64]
    assert all(np.isfinite(row["loss/policy"]) for row in rows)


@has_gl
def test_images_are_upright_and_the_same_in_any_process() -> None:
    """Two envs of one process each have an OpenGL context; pictures, which are of agentview, have another."""
    with opened("lift", **IMAGES) as env, opened("lift", num_envs=1, **IMAGES) as alone:
        assert env.obs_shapes == {"state": (1, 9), "rgb": (1, 6, 48, 64)}
        actions = random_actions(env, 2)
        found = [env.reset(0), *run(env, actions[:1])]
        pictures = torch.from_numpy(np.stack([env.render(i) for i in range(2)])).permute(0, 3, 1, 2).float()
        seen = found[1]["rgb"][:, 0, :3].float()
        found += run(env, actions[1:])
        assert_same([alone.reset(0), *run(alone, actions[:, :1])], [{k: v[:1] for k, v in o.items()} for o in found])
        assert not torch.equal(found[0]["rgb"][0], found[0]["rgb"][1])
        assert not torch.equal(found[0]["rgb"][0, 0, :3], found[0]["rgb"][0, 0, 3:])
        drawn = torch.nn.functional.adaptive_avg_pool2d(pictures, 48)
        middle, column = seen[..., 28:36].mean(-1), drawn[..., 20:28].mean(-1)  # the height is the same, the width not
        assert (middle - column).abs().mean() < 10
        assert (middle.flip(-1) - column).abs().mean() > 30


@has_gl
def test_training_on_images(tmp_path: Path) -> None:
    config = "cfg=robomimic/finetune/lift/ft_ppo_diffusion_mlp_img"
    assert train(config, *TINY_IMAGES, f"logdir={tmp_path}/run") == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


def versions(**installed: str) -> Any:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    return version


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"mujoco": "4.0.0"}, r"env\.id=can: robosuite is not installed: pip install 'dppo-fast\[robomimic\]'"),
        ({"robosuite": "1.5.1", "mujoco": "4.0.0"}, "robosuite is 1.5.1, needed is 1.4.1: pip install"),
        ({"robosuite": "1.4.1", "mujoco": "3.1.5"}, r"mujoco is 3\.1\.5, needed is one from 3\.1\.6 to 4\.0"),
        ({"robosuite": "1.4.1", "mujoco": "4.1.0"}, r"mujoco is 4\.1\.0, needed is one from 3\.1\.6 to 4\.0"),
    ],
)
def test_packages_that_do_not_fit(installed: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _require_versions("can", versions(**installed))


@pytest.mark.parametrize("mujoco", ["3.1.6", "3.2.7", "4.0.2"])
def test_packages_that_fit(mujoco: str) -> None:
    _require_versions("can", versions(robosuite="1.4.1", mujoco=mujoco))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"camera": []}, r"env\.options\.camera is unknown to env\.id=lift \(did you mean cameras"),
        ({"image_size": [96]}, r"env\.options\.image_size=\[96\]: must be \[height, width\]"),
        ({"low_dim_keys": ["objct"]}, r"env\.options\.low_dim_keys: Lift has no objct; choose from .*object"),
        pytest.param(
            {"cameras": ["behind"]}, r"env\.options\.cameras=\['behind'\]: .*behind.* .*agentview", marks=has_gl
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message), opened("lift", 1, **options):
        pass


def alone(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code``, run by an interpreter of its own that is told of no OpenGL but what ``environment`` says."""
    own = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    own |= {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own, timeout=300)


def test_images_with_osmesa() -> None:
    osmesa = {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"}
    if alone(gl.DRAW, **osmesa).returncode != 0:
        pytest.skip("has no OSMesa")
    code = f"""
from dppo_fast.envs import EnvConfig, make_env
if __name__ == "__main__":
    env = make_env(EnvConfig("lift", 1, 4, options={json.dumps(IMAGES)}), "cpu", 0)
    picture = env.reset()["rgb"].float()
    print(tuple(picture.shape), bool(picture.std() > 5), env.render(0).std() > 5)
    env.close()
"""
    found = alone(code, MUJOCO_GL="osmesa")
    assert found.returncode == 0, found.stderr
    assert found.stdout.split("\n")[0] == "(1, 1, 6, 48, 64) True True"


def test_without_opengl_there_are_states_but_no_images() -> None:
    """In a process of its own, as OpenGL is chosen once; nothing is drawn in it but by robosuite."""
    code = f"""
from unittest import mock
import torch
from dppo_fast.envs import EnvConfig, make_env
from dppo_fast.runtime import gl
from dppo_fast.types import UserError
if __name__ == "__main__":
    with mock.patch.object(gl.subprocess, "run", return_value=mock.Mock(returncode=1)):
        try:
            make_env(EnvConfig("lift", 1, 4, options={json.dumps(IMAGES)}), "cpu", 0)
        except UserError as error:
            print(error)
        env = make_env(EnvConfig("lift", 1, 4), "cpu", 0)
        print(tuple(env.reset()["state"].shape))
        env.close()
"""
    found = alone(code)
    lines = found.stdout.splitlines()
    assert "cannot be drawn without a screen: found neither EGL nor OSMesa" in lines[0], found.stderr
    assert lines[1] == "(1, 1, 19)", found.stderr
