"""Furniture-Bench against a stand-in for its simulator, in a second process and in this one.

The second process is this Python's, or that of ``DPPO_FAST_FURNITURE_PYTHON``, an older one with PyTorch.
"""

from __future__ import annotations

import ast
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dppo_fast.envs import EnvConfig, furniture_server, make_env
from dppo_fast.envs.furniture import to_state
from dppo_fast.envs.normalize import BoundedMinMax, normalization_from_state
from dppo_fast.types import UserError
from tests.envs import furniture_stand_in
from tests.runs import COMMON, rows, train

PYTHON = os.environ.get("DPPO_FAST_FURNITURE_PYTHON", sys.executable)
CONFIG = EnvConfig(id="one_leg", num_envs=3, act_steps=4, max_episode_steps=10, options={"python": PYTHON})
IN_PROCESS = replace(CONFIG, options={})
HALF = 0.5
NAN, KILL, RAISE = 7.0, 8.0, 9.0
"""First number of an action, which makes the stand-in do that."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furniture_stand_in.install(tmp_path_factory.mktemp("python38"))


@pytest.fixture(autouse=True)
def _importable(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By the server's process and by this one."""
    monkeypatch.setenv("PYTHONPATH", f"{installed}")
    monkeypatch.syspath_prepend(installed)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "furniture_bench"]:
        del sys.modules[name]


@contextmanager
def opened(config: EnvConfig = CONFIG, seed: int = 0) -> Iterator[Any]:
    env = make_env(config, "cpu", seed)
    yield env
    env.close()


def actions() -> torch.Tensor:
    return torch.full((CONFIG.num_envs, CONFIG.act_steps, 10), HALF)


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    """A file like the reference's."""
    low, high = -torch.arange(1.0, 59), torch.arange(1.0, 59)
    low[0], high[0] = 0.4995, 0.5001
    tensors = {"observations": (low, high), "actions": (torch.full((10,), -2.0), torch.full((10,), 4.0))}
    state = {f"stats.{name}.{end}": pair[end == "max"] for name, pair in tensors.items() for end in ("min", "max")}
    torch.save(state, tmp_path / "normalization.pth")
    return tmp_path / "normalization.pth"


@pytest.mark.parametrize(("task", "dim"), [("one_leg", 58), ("lamp", 44), ("round_table", 44)])
def test_dims(task: str, dim: int) -> None:
    with opened(replace(CONFIG, id=task, obs_steps=2, options={"randomness": "med"})) as env:
        assert env.obs_shapes == {"state": (2, dim)}
        assert env.action_dim == 10
        assert env.reset()["state"].shape == (3, 2, dim)
        assert env.step(actions()).obs["state"].shape == (3, 2, dim)


def test_the_bridge_gives_what_the_simulator_gives() -> None:
    """Every observation and reward, in several episodes, from the same seed; another seed gives others. Its process
    ends with the environment.
    """
    generator = torch.Generator().manual_seed(0)
    chunks = torch.rand(7, 3, 4, 10, generator=generator) * 0.93
    steps: dict[str, list[torch.Tensor]] = {}
    for name, config in (("here", IN_PROCESS), ("there", CONFIG)):
        with opened(config, seed=5) as env:
            steps[name] = [env.reset()["state"]]
            for chunk in chunks:
                step = env.step(chunk)
                steps[name] += [step.obs["state"], step.reward, step.truncated]
            assert not torch.equal(env.reset(6)["state"], steps[name][0])
            assert torch.equal(env.reset(5)["state"], steps[name][0])
    assert all(torch.equal(a, b) for a, b in zip(steps["here"], steps["there"], strict=True))
    assert sum(float(reward.sum()) for reward in steps["here"][2::3]) > 0
    assert env._simulator._process.poll() == 0


def test_rotation_in_six_dimensions() -> None:
    """The first two rows of the rotation matrix, whatever the quaternion's length and sign."""
    quaternion = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    obs = torch.zeros(50, 20, dtype=torch.float64)
    obs[:, 3:7] = quaternion
    rotation = to_state(obs)[:, 3:9].reshape(50, 2, 3)
    x, y, z, w = (quaternion / quaternion.norm(dim=1, keepdim=True)).unbind(1)
    for axis in torch.eye(3, dtype=torch.float64):  # v' = v + 2 u x (u x v + w v)
        u, v = torch.stack((x, y, z), 1), axis.expand(50, 3)
        turned = v + 2 * torch.linalg.cross(u, torch.linalg.cross(u, v) + w[:, None] * v)
        torch.testing.assert_close(rotation @ axis, turned[:, :2])
    obs[:, 3:7] *= -3
    torch.testing.assert_close(to_state(obs)[:, 3:9].reshape(50, 2, 3), rotation)
    moved = torch.arange(56.0)
    assert to_state(moved)[[0, 1, 2, *range(9, 58)]].tolist() == [0.0, 1.0, 2.0, *np.arange(7.0, 56)]


def test_normalisation_is_the_references(pth: Path) -> None:
    """Without an epsilon, clamped to +-5; actions from [-1, 1] to the demonstrations' range."""
    config = replace(IN_PROCESS, normalization=str(pth))
    with opened(config) as env:
        state = env.reset()["state"][:, 0]
        assert torch.allclose(state[:, 0], torch.tensor(2 * (0.5 - 0.4995) / 0.0006 - 1), atol=1e-4)
        assert torch.allclose(state[:, 2], torch.tensor(0.1 / 3))
        action = torch.full((3, 4, 10), -1 / 3)  # 0 in the simulator's units
        action[0, -1, :3] = 0.25
        state = env.step(action).obs["state"][:, 0]
        assert state[0, 0] == 5
        assert torch.allclose(state[0, 1:3], torch.tensor([1.75 / 2, 1.75 / 3]))
        assert (state[1:, 0] == -5).all()
        saved = env.normalization.state_dict()
    with opened(replace(config, normalization="none")) as env:
        restored = normalization_from_state(saved)
        assert isinstance(restored, BoundedMinMax)
        again = make_env(config, "cpu", 0, restored)
        assert torch.equal(again.reset()["state"], make_env(config, "cpu", 0).reset()["state"])


def test_rewards_add_up_over_a_chunk_and_only_the_time_limit_ends_an_episode() -> None:
    """The pairs are the return of a success; what the simulator calls done is not an end."""
    for task, pairs in furniture_stand_in.PAIRS.items():
        with opened(replace(IN_PROCESS, id=task)) as env:
            env.reset()
            chunk = actions()
            chunk[1, :, 9] = 1
            first = env.step(chunk)
            assert first.reward.tolist() == [0, pairs, 0]
            second = env.step(chunk)
            assert second.reward.tolist() == [0, 0, 0]
            assert first.final_obs is second.final_obs is first.valid is None
            last = env.step(chunk)  # 12 steps: the chunk in which the limit of 10 is reached
            assert last.truncated.all()
            assert not last.terminated.any()
            assert (last.obs["state"][:, 0, 0] == HALF).all()
            assert torch.allclose(last.final_obs["state"][:, 0, 16], first.obs["state"][:, 0, 16] + 0.008)
            assert not torch.equal(last.obs["state"], last.final_obs["state"])
            assert env.step(chunk).reward.tolist() == [0, pairs, 0]


def test_history() -> None:
    with opened(replace(IN_PROCESS, obs_steps=3)) as env:
        obs = env.reset()["state"]
        assert torch.equal(obs[:, 0], obs[:, 2])
        chunk = actions()
        chunk[:, :, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
        assert torch.allclose(env.step(chunk).obs["state"][:, :, 0], torch.tensor([0.2, 0.3, 0.4]))


def test_time_limits_as_terminations() -> None:
    with opened(replace(IN_PROCESS, max_episode_steps=4, time_limit_terminates=True)) as env:
        env.reset()
        step = env.step(actions())
        assert step.terminated.all()
        assert not step.truncated.any()


def test_nan_ends_that_episode_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with opened(IN_PROCESS) as env:
        env.reset()
        chunk = actions()
        chunk[:, :, 9] = 1
        chunk[1, :, 0] = torch.tensor([0.1, 0.2, NAN, 0.4])
        step = env.step(chunk)
        assert step.valid.tolist() == [True, False, True]
        assert step.truncated.tolist() == [False, True, False]
        assert step.reward.tolist() == [1, 0, 1]
        assert step.final_obs["state"][1, 0, 0] == torch.tensor(0.2)
        assert step.obs["state"].isfinite().all()
        assert step.obs["state"][1, 0, 0] == HALF
        assert env.nan_count == 1
        assert "NaN or Inf from the simulator in 1 envs" in caplog.text
        later = env.step(actions())
        poses, before = later.obs["state"][:, 0, 16], step.obs["state"][:, 0, 16]
        assert torch.allclose(poses, before + 0.004), "the others' parts are where they were"
        step = env.step(actions())  # the others reach their limit, the one that began anew does not
        assert step.truncated.tolist() == [True, False, True]
        assert step.valid is None


def test_actions_are_checked() -> None:
    with opened(IN_PROCESS) as env:
        env.reset()
        with pytest.raises(ValueError, match=r"action has shape \(3, 4, 9\)"):
            env.step(torch.zeros(3, 4, 9))
        with pytest.raises(FloatingPointError, match="NaN"):
            env.step(torch.full((3, 4, 10), float("nan")))


def test_a_saved_state_starts_fresh_episodes(caplog: pytest.LogCaptureFixture, pth: Path) -> None:
    config = replace(IN_PROCESS, normalization=str(pth))
    with opened(config, seed=3) as env:
        first = env.reset()["state"]
        env.step(actions())
        saved = env.state_dict()
    with (
        opened(replace(config, normalization="none")) as other,
        pytest.raises(UserError, match="the saved state holds"),
    ):
        other.load_state_dict(saved)
    caplog.clear()
    with caplog.at_level(logging.WARNING), opened(config, seed=4) as env:
        assert torch.equal(env.load_state_dict(saved)["state"], first)
        assert [record.message for record in caplog.records] == [
            "IsaacGym cannot be brought back to a saved state: starting fresh episodes"
        ]


@pytest.mark.parametrize(
    ("first", "message"),
    [(KILL, "ended with -9; .*\n(.*\n)*PhysX: out of memory"), (RAISE, "ended with 1; .*\n(.*\n)*.*illegal memory")],
)
def test_a_simulator_that_dies(first: float, message: str) -> None:
    with opened() as env:
        env.reset()
        chunk = actions()
        chunk[0, 2, 0] = first
        with pytest.raises(UserError, match=message):
            env.step(chunk)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"python": "/no/such/python"}, "env.options.python=/no/such/python: cannot be run .No such file"),
        ({"python": PYTHON, "gpu_id": 8}, "ended with 1; .*\n(.*\n)*.*no GPU 8"),
        ({"randomness": "high"}, "env.options.randomness=high: must be low or med"),
        ({"pyhton": "python3.8"}, r"env.options.pyhton is unknown .*did you mean python"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_env(replace(CONFIG, options=options), "cpu", 0)


@pytest.mark.parametrize(("options", "key"), [({}, "env.id=one_leg"), (CONFIG.options, "env.options.python=")])
def test_without_isaacgym(options: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "furniture_bench"
    broken.mkdir()
    (broken / "__init__.py").write_text("import isaacgym")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"{key}.*No module named 'isaacgym'.*install IsaacGym and .*furniture-bench"):
        make_env(replace(CONFIG, options=options), "cpu", 0)


def test_other_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_MORE_PARTS", "1")
    with pytest.raises(UserError, match=r"have \[14, 49\] values, expected \[14, 42\]"):
        make_env(IN_PROCESS, "cpu", 0)


def test_bad_normalisation(pth: Path, tmp_path: Path) -> None:
    def refused(config: EnvConfig, message: str) -> None:
        with pytest.raises(UserError, match=message):
            make_env(config, "cpu", 0)

    config = replace(IN_PROCESS, normalization=str(pth))
    refused(replace(config, normalization="running"), "env.normalization=running: one_leg has none")
    refused(replace(config, normalization=str(tmp_path / "no.pth")), "no such file")
    refused(replace(config, id="lamp"), r"stats.observations.min is \[58\], expected a tensor of shape \[44\]")
    state = torch.load(pth, weights_only=True)
    state["stats.actions.max"][3] = state["stats.actions.min"][3]
    torch.save(state, pth)
    refused(config, r"action_max does not exceed action_min in columns \[3\]")
    torch.save({"model": 1}, pth)
    refused(config, "stats.observations.min is None")
    torch.save([config], pth)
    refused(config, "not readable as tensors alone")
    pth.write_bytes(b"nothing")
    refused(config, "not readable as tensors alone")


def test_the_server_is_for_python_3_8() -> None:
    """Its syntax is, and at its top it imports nothing that must come after IsaacGym, or is not in its Python."""
    tree = ast.parse(Path(furniture_server.__file__).read_text(), feature_version=(3, 8))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"numpy"}


def test_training_through_the_bridge(pth: Path, tmp_path: Path) -> None:
    """Two iterations with the configuration of the paper, but for its sizes."""
    code = train(
        "cfg=furniture/finetune/one_leg_low/ft_ppo_diffusion_mlp",
        "policy.checkpoint=null",
        *COMMON,
        f"env.normalization={pth}",
        f"env.options.python={PYTHON}",
        "env.num_envs=4",
        "env.max_episode_steps=32",
        "policy.network.mlp_dims=[16,16,16]",
        "policy.network.cond_mlp_dims=[16,8]",
        "critic.mlp_dims=[8,8,8]",
        "algorithm.batch_size=32",
        "algorithm.update_epochs=1",
        "train.n_train_itr=2",
        "train.n_steps=8",
        "train.val_freq=2",
        "train.eval_episodes=2",
        f"logdir={tmp_path / 'run'}",
    )
    assert code == 0
    metrics = rows(tmp_path / "run")
    assert len(metrics) >= 2
    assert all(np.isfinite(value) for row in metrics for value in row.values())
    assert metrics[-1]["train/nan_count"] == 0
