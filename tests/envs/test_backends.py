"""EnvPool and gymnasium behind `make_env`."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from omegaconf import OmegaConf

from dppo_fast.envs import ChunkEnv, EnvConfig, MinMax, make_env
from dppo_fast.envs.envpool import EnvPoolSimulator
from dppo_fast.types import Step, UserError
from tests.envs.toy import random_actions

HOPPER = EnvConfig(id="Hopper-v4", num_envs=4, act_steps=4, obs_steps=2)
BACKENDS = ["envpool", "gymnasium"]


@contextmanager
def opened(config: EnvConfig, seed: int = 0) -> Iterator[ChunkEnv]:
    env = make_env(config, "cpu", seed)
    yield env
    env.close()


def run(env: ChunkEnv, actions: torch.Tensor) -> list[Step]:
    return [env.step(action) for action in actions]


def assert_same(steps: list[Step], others: list[Step]) -> None:
    for step, other in zip(steps, others, strict=True):
        assert (step.final_obs is None) == (other.final_obs is None)
        for name in ("reward", "terminated", "truncated"):
            assert torch.equal(getattr(step, name), getattr(other, name))
        for obs, expected in ((step.obs, other.obs), (step.final_obs or {}, other.final_obs or {})):
            assert all(torch.equal(obs[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_seed_fixes_everything(backend: str) -> None:
    config = replace(HOPPER, backend=backend, num_threads=1)
    with opened(config) as env, opened(replace(config, num_threads=3), seed=5) as other:
        actions = random_actions(env, 30)
        first = env.reset()["state"]
        steps = run(env, actions)
        assert sum(step.terminated.sum() for step in steps) > 4
        assert torch.equal(other.reset(seed=0)["state"], first)
        assert_same(run(other, actions), steps)
        assert not torch.equal(other.reset()["state"], first)
        assert torch.equal(other.reset(seed=0)["state"], first)
        assert not torch.equal(other.reset(seed=1)["state"], first)
        assert len(torch.unique(first[:, -1], dim=0)) == config.num_envs
    with opened(replace(config, num_envs=2)) as fewer:
        assert torch.equal(fewer.reset()["state"], first[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", ["Hopper-v4", "HalfCheetah-v4"])
def test_a_restored_env_continues_bit_for_bit(backend: str, task: str, tmp_path: Path) -> None:
    config = replace(HOPPER, id=task, backend=backend, max_episode_steps=90, normalization="running")
    with opened(config) as env:
        env.reset()
        actions = random_actions(env, 57)
        run(env, actions[:37])
        file = BytesIO()
        torch.save(env.state_dict(), file)
        expected = run(env, actions[37:])
    with opened(config, seed=9) as restored:
        file.seek(0)
        obs = restored.load_state_dict(torch.load(file, weights_only=True))
        second = restored.state_dict()
        assert_same(run(restored, actions[37:]), expected)
        assert torch.equal(restored.load_state_dict(second)["state"], obs["state"])
        assert_same(run(restored, actions[37:]), expected)


def test_envpool_and_gymnasium_agree_from_the_same_state() -> None:
    env = gymnasium.make(gymnasium.spec("Hopper-v4"))
    env.reset()
    pool = EnvPoolSimulator("Hopper-v4", replace(HOPPER, num_envs=3, num_threads=1))
    pool.seed(3, np.zeros(3, np.int64))
    start = pool.reset(np.arange(3))["state"][1]
    env.unwrapped.set_state(np.concatenate([[0], start[:5]]), start[5:])  # type: ignore[attr-defined]
    terminated, steps = False, 0
    while not terminated:
        action = np.random.default_rng(steps).uniform(-1.5, 1.5, 3)  # beyond the bounds too
        obs, reward, [terminated], _ = pool.step(action[None], np.array([1]))
        expected = env.step(action)
        np.testing.assert_allclose(obs["state"][0], expected[0], atol=1e-8)
        np.testing.assert_allclose(reward[0], float(expected[1]), atol=1e-6)
        assert terminated == expected[2]
        steps += 1
    assert steps > 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_cheetah_is_truncated_and_never_terminates(backend: str) -> None:
    """The simulators' own time limits (1000) are off, and ours is the only one."""
    config = EnvConfig(id="halfcheetah-medium-v2", num_envs=1, act_steps=350, backend=backend, max_episode_steps=1060)
    with opened(config) as env:
        env.reset()
        steps = run(env, random_actions(env, 4))
        assert [step.truncated.item() for step in steps] == [False, False, False, True]
        assert not any(step.terminated.item() for step in steps)
        final = steps[-1].final_obs
        assert final is not None
        assert (final["state"][0] - steps[-1].obs["state"][0]).abs().max() > 1


def test_a_time_limit_counts_as_termination_only_where_asked() -> None:
    config = EnvConfig(id="HalfCheetah-v4", num_envs=2, act_steps=4, max_episode_steps=8)
    for terminates in (False, True):
        with opened(replace(config, time_limit_terminates=terminates)) as env:
            env.reset()
            last = run(env, random_actions(env, 2))[-1]
            assert last.terminated.tolist() == [terminates] * 2
            assert last.truncated.tolist() == [not terminates] * 2
            assert last.final_obs is not None


def test_normalization_file_reaches_the_env(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "normalization.npz"
    normalization = MinMax.from_data(rng.normal(size=(20, 11)), rng.uniform(-0.5, 0.5, size=(20, 3)))
    normalization.save(path)
    with opened(replace(HOPPER, obs_steps=1)) as env, opened(replace(HOPPER, normalization=str(path))) as normalized:
        raw, obs = env.reset()["state"], normalized.reset()["state"]
        np.testing.assert_allclose(obs[:, -1], normalization.normalize_obs(raw.numpy())[:, 0], atol=1e-5)
        action = random_actions(normalized, 1)[0]
        scaled = torch.from_numpy(normalization.unnormalize_action(action.numpy()))
        raw, obs = env.step(scaled).obs["state"], normalized.step(action).obs["state"]
        np.testing.assert_allclose(obs[:, -1], normalization.normalize_obs(raw.numpy())[:, 0], atol=1e-4)
    with pytest.raises(UserError, match=r"obs_min has shape \(11,\), expected \(17,\)"):
        make_env(EnvConfig("HalfCheetah-v4", 1, 1, normalization=str(path)), "cpu", 0)


def test_auto_prefers_envpool_and_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make_env(replace(HOPPER, id="hopper-medium-v2"), "cpu", 0)
    assert "Hopper-v4 through envpool" in caplog.text
    monkeypatch.setitem(sys.modules, "envpool", None)
    monkeypatch.delitem(sys.modules, "dppo_fast.envs.envpool")
    make_env(HOPPER, "cpu", 0).close()
    assert "Hopper-v4 through gymnasium" in caplog.text
    with pytest.raises(UserError, match=r"envpool is not usable here.*pip install 'envpool'"):
        make_env(replace(HOPPER, backend="envpool"), "cpu", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "Hoper-v4"}, r"env\.id=Hoper-v4.*nearest names: .*Hopper-v4"),
        ({"id": "hopper-medum-v2"}, "nearest names: .*hopper-medium-v2"),
        ({"id": "no_such_package:Env-v0"}, "cannot import no_such_package"),
        ({"id": "Hoper-v4", "backend": "gymnasium"}, "nearest names: .*Hopper-v4"),
        ({"backend": "envpol"}, r"env\.backend=envpol: unknown; choose from auto, .*envpool, gymnasium"),
        ({"id": "CartPole-v1", "backend": "gymnasium"}, "actions are Discrete"),
        ({"id": "Pong-v5"}, "observation state is Box"),
        ({"normalization": "nowhere.npz"}, r"env\.normalization=nowhere\.npz: no such file"),
    ],
)
def test_a_mistyped_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_env(replace(HOPPER, **change), "cpu", 0)


@pytest.mark.parametrize("key", ["num_envs", "act_steps", "obs_steps", "max_episode_steps", "num_threads"])
def test_counts_must_be_positive(key: str) -> None:
    with pytest.raises(UserError, match=rf"env\.{key}=-1: must be at least"):
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HOPPER), {key: -1}))


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(UserError, match="seed=-1"):
        make_env(HOPPER, "cpu", -1)


class Camera(gymnasium.Env[Any, Any]):
    """A state without action bounds, and a picture."""

    observation_space = Dict({"state": Box(-1, 1, (2,)), "wrist": Box(0, 255, (3, 4, 5), np.uint8)})
    action_space = Box(-np.inf, np.inf, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self._obs(), float(action.sum()), self.t == 3, False, {}

    def _obs(self) -> Any:
        return {"state": np.full(2, self.t, np.float32), "wrist": np.full((3, 4, 5), self.t, np.uint8)}


def test_a_gymnasium_env_of_ones_own_with_a_camera(tmp_path: Path) -> None:
    gymnasium.register("Camera-v0", Camera)
    path = tmp_path / "normalization.npz"
    MinMax([-1, -1], [1, 1], [-2, -2], [2, 2]).save(path)
    config = EnvConfig(
        id=f"{__name__}:Camera-v0", num_envs=2, act_steps=2, obs_steps=3, image_steps=3, normalization=str(path)
    )
    with opened(config) as env:
        assert env.obs_shapes == {"state": (3, 2), "wrist": (3, 3, 4, 5)}
        env.reset()
        step, last = run(env, torch.full((2, 2, 2, 2), 0.5))
    assert step.obs["wrist"].dtype == torch.uint8
    assert step.obs["wrist"][0, :, 0, 0, 0].tolist() == [0, 1, 2]
    assert step.reward.tolist() == [4, 4]
    assert last.terminated.all()
    assert last.final_obs is not None
    assert last.final_obs["wrist"][1, :, 2, 3, 4].tolist() == [1, 2, 3]
    assert last.obs["wrist"].eq(0).all()
    with pytest.raises(UserError, match="unbounded actions"):
        make_env(replace(config, normalization="none"), "cpu", 0)


def test_importing_the_package_imports_no_simulator() -> None:
    code = "import sys, dppo_fast.envs; assert not {'envpool', 'gymnasium', 'mujoco'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
