"""D3IL avoid: its rules, MuJoCo's version and PyTorch's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dppo_fast.data.scripted.avoid import Avoid
from dppo_fast.envs import ChunkEnv, EnvConfig, MinMax, make_env
from dppo_fast.envs.avoid import AvoidSimulator
from dppo_fast.envs.avoid_task import (
    ACTION_HIGH,
    ACTION_LOW,
    MODES,
    REACH,
    START,
    clearance,
    latch_sides,
    reward_of,
    sides_of,
)
from dppo_fast.types import UserError

CONFIG = EnvConfig(id="avoid", num_envs=4, act_steps=4, max_episode_steps=100)
BACKENDS = ["avoid", "avoid_torch"]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
ALL = np.arange(CONFIG.num_envs)


@contextmanager
def opened(config: EnvConfig = CONFIG, device: str = "cpu") -> Iterator[Any]:
    env = make_env(config, device, seed=0)
    yield env
    env.close()


def normalised(actions: np.typing.ArrayLike) -> torch.Tensor:
    """Actions in metres as the policy gives them."""
    return torch.tensor(2 * (np.asarray(actions) - ACTION_LOW) / (ACTION_HIGH - ACTION_LOW) - 1, dtype=torch.float32)


def bold_actions(num_envs: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """[N, 100, 2] in metres: up, across in stretches of ten steps; most of them run into an obstacle."""
    across = np.random.default_rng(seed).uniform(-0.008, 0.008, (num_envs, 10)).repeat(10, axis=1)
    return np.stack((across, np.full_like(across, 0.0115)), -1)


def drive(simulator: AvoidSimulator, actions: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """States [N, T, 4] and rewards [N, T] of an episode."""
    ids = np.arange(len(actions))
    simulator.reset(ids)
    states, rewards = [], []
    for action in actions.swapaxes(0, 1):
        obs, reward, terminated, truncated = simulator.step(action, ids)
        assert not (terminated | truncated).any()
        states.append(obs["state"])
        rewards.append(reward)
    return np.stack(states, 1), np.stack(rewards, 1)


# -- the rules


@pytest.mark.parametrize(
    ("rods", "sides"),
    [
        ([(0.45, -0.1)], (0,)),
        ([(0.55, -0.129)], (1,)),
        ([(0.55, -0.131), (0.55, -0.069)], ()),
        ([(0.42, 0.08)], (2,)),
        ([(0.5, 0.08)], (3,)),
        ([(0.6, 0.08)], (4,)),
        ([(0.5, 0.08), (0.6, 0.09)], (3,)),
        ([(0.3, 0.259)], ()),
        ([(0.3, 0.26)], (5,)),
        ([(0.4, 0.4)], (6,)),
        ([(0.6, 0.3), (0.3, 0.3)], (7,)),
        ([(0.7, 0.27)], (8,)),
        ([(0.55, -0.1), (0.4, 0.08), (0.3, 0.26)], (1, 2, 5)),
    ],
)
def test_the_first_side_taken_on_each_line_counts(rods: Sequence[tuple[float, float]], sides: tuple[int, ...]) -> None:
    assert sides_of(rods) == sides


def test_there_are_24_modes() -> None:
    assert len(set(MODES)) == 24
    assert {side for mode in MODES for side in mode} == set(range(9))


def test_rewards() -> None:
    rod = torch.tensor([[0.3, 0.3], [0.3, 0.41], [0.4, 0.41], [0.3, 0.41], [0.19, 0.41], [0.81, 0.0], [0.3, 0.0]])
    taken = latch_sides(torch.zeros(7, 9, dtype=torch.bool), rod)
    collided = torch.tensor([False, False, False, True, False, False, False])
    assert reward_of(taken, collided, rod).tolist() == pytest.approx([1, 2, 1, -0.1, -0.1, -0.1, 0])


# -- the plant


def test_it_starts_at_rest_and_sees_itself_one_control_step_late() -> None:
    simulator = AvoidSimulator(1)
    assert simulator.reset(np.arange(1))["state"][0] == pytest.approx([*START, *START], abs=1e-12)
    up = np.array([[0.0, 0.01]])
    first, second = (simulator.step(up, np.arange(1))[0]["state"][0] for _ in range(2))
    assert first == pytest.approx([START[0], START[1] + 0.01, *START], abs=1e-12)
    assert second[1] == pytest.approx(START[1] + 0.02)
    assert 0.001 < second[3] - START[1] < 0.01


def test_the_rod_follows_with_the_recorded_lag() -> None:
    """The response to a step of 5 cm, in the demonstrations' terms: across it peaks after 4 to 6 control steps, along
    the swivel's arc it overshoots by 20 to 50 % after 10 to 14.
    """
    simulator = AvoidSimulator(2)
    jump = np.zeros((2, 60, 2))
    jump[0, 0], jump[1, 0] = np.array(START) / np.hypot(*START) * 0.05, np.array([0.28, 0.525]) / 0.595 * 0.05
    states, _ = drive(simulator, jump)
    travelled = np.linalg.norm(states[:, :, 2:] - START, axis=-1) / 0.05
    assert 3 <= travelled[0].argmax() <= 6
    assert 9 <= travelled[1].argmax() <= 14
    assert 1.2 < travelled[1].max() < 1.7
    assert travelled[:, -1] == pytest.approx(1, abs=0.05)


def test_the_arm_reaches_only_so_far() -> None:
    states, _ = drive(AvoidSimulator(1), np.tile([0.012, 0.0], (1, 100, 1)))
    assert states[0, -1, 0] > 1.5
    assert np.hypot(*states[0, -1, 2:]) == pytest.approx(REACH[1], abs=0.005)


def test_obstacles_stop_the_rod_and_the_reward_for_ever() -> None:
    straight = np.tile([0.0, 0.01], (1, 100, 1))
    straight[0, :5, 0] = (0.5 - START[0]) / 5
    states, rewards = drive(AvoidSimulator(1), straight)
    near = clearance(torch.tensor(states[0, :, 2:])).min(1).values.numpy()
    assert -0.006 < near.min() < 0.001
    assert np.all(np.diff(rewards[0]) <= 0)
    assert rewards[0, 0] == 0
    assert rewards[0, -1] == -0.1
    assert near[rewards[0] == 0].min() > 0


def test_envs_do_not_depend_on_how_they_are_grouped() -> None:
    """Nor on the number of threads, nor on what was simulated before."""
    actions = bold_actions(4)
    together, threaded = AvoidSimulator(4, num_threads=1), AvoidSimulator(4, num_threads=3)
    expected, rewards = drive(together, actions)
    np.testing.assert_array_equal(drive(threaded, actions)[0], expected)
    np.testing.assert_array_equal(drive(together, actions)[0], expected)
    together.reset(np.arange(4))
    for t in range(30):
        for ids in ([0, 2], [1], [3]):
            obs, reward, *_ = together.step(actions[ids, t], np.array(ids))
            np.testing.assert_array_equal(obs["state"], expected[ids, t])
            np.testing.assert_array_equal(reward, rewards[ids, t])


def test_an_env_of_its_own_is_reset() -> None:
    simulator = AvoidSimulator(2)
    drive(simulator, bold_actions(2))
    simulator.reset(np.array([1]))
    obs, reward, *_ = simulator.step(np.zeros((2, 2)), np.arange(2))
    assert obs["state"][1] == pytest.approx([*START, *START])
    assert reward[1] == 0
    assert obs["state"][0, 1] > 0.5


DRAW = """
import numpy as np
from dppo_fast.runtime.gl import headless_gl
headless_gl()
from dppo_fast.envs.avoid import AvoidSimulator
simulator = AvoidSimulator(2)
simulator.reset(np.arange(2))
for _ in range(20):
    simulator.step(np.array([[0.0, 0.004]]), np.array([0]))
moved, still = simulator.render(0), simulator.render(1)
simulator.close()
assert (moved.dtype, moved.shape) == (np.uint8, (480, 480, 3))
assert np.array_equal(still, simulator.render(1))
assert 0.001 < np.mean((moved != still).any(-1)) < 0.3
simulator.close()
"""


def test_it_draws_what_it_sees() -> None:
    """In a process of its own, because MuJoCo chooses how to draw when it is imported."""
    subprocess.run([sys.executable, "-c", DRAW], check=True, cwd=Path(__file__).parents[2])


# -- behind VecEnv


@pytest.mark.parametrize("backend", BACKENDS)
def test_dims_horizon_and_chunks(backend: str) -> None:
    with opened(replace(CONFIG, backend=backend, obs_steps=2)) as env:
        assert (env.obs_shapes, env.action_dim, env.act_steps) == ({"state": (2, 4)}, 2, 4)
        start = env.reset()["state"]
        assert start.shape == (4, 2, 4)
        torch.testing.assert_close(start, torch.tensor([*START, *START]).expand(4, 2, 4))
        up = normalised(np.tile([0.0, 0.01], (4, 4, 1)))
        for chunk in range(25):
            step = env.step(up)
            assert (step.final_obs is not None) == bool(step.truncated.all()) == (chunk == 24)
            assert not step.terminated.any()
            if chunk == 0:
                torch.testing.assert_close(step.obs["state"][:, :, 1] - START[1], torch.tensor([[0.03, 0.04]] * 4))
        assert step.final_obs is not None
        torch.testing.assert_close(step.obs["state"], start)
        assert step.final_obs["state"][0, -1, 1] == pytest.approx(START[1] + 1)
        assert (step.reward == pytest.approx(-0.4)) == True  # noqa: E712


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_restored_env_continues_bit_for_bit(backend: str) -> None:
    config = replace(CONFIG, backend=backend)
    actions = normalised(bold_actions(4)).unflatten(1, (25, 4)).transpose(0, 1)
    with opened(config) as env, opened(config) as restored:
        env.reset()
        for action in actions[:17]:
            env.step(action)
        file = BytesIO()
        torch.save(env.state_dict(), file)
        expected = [env.step(action) for action in [*actions[17:], *actions[:3]]]
        file.seek(0)
        restored.load_state_dict(torch.load(file, weights_only=True))
        for step, action in zip(expected, [*actions[17:], *actions[:3]], strict=True):
            other = restored.step(action)
            assert torch.equal(other.obs["state"], step.obs["state"])
            assert torch.equal(other.reward, step.reward)
            assert torch.equal(other.truncated, step.truncated)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalization_reaches_the_env(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "normalization.npz"
    ranges = MinMax([0.2, -0.3, 0.2, -0.3], [0.8, 0.5, 0.8, 0.5], [-0.01, 0], [0.01, 0.012])
    ranges.save(path)
    with opened(replace(CONFIG, backend=backend, normalization=str(path))) as env:
        obs = env.reset()["state"][0, 0]
        np.testing.assert_allclose(obs, ranges.normalize_obs(np.array([*START, *START])), atol=1e-5)
        action = torch.tensor([0.5, -0.5]).expand(4, 4, 2)
        obs = env.step(action).obs["state"][0, 0]
        desired = START + 4 * np.array([0.005, 0.003])
        np.testing.assert_allclose(obs[:2], ranges.normalize_obs(np.array([*desired, 0, 0]))[:2], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_saved_normalization_is_the_restored_envs(backend: str, tmp_path: Path) -> None:
    """Also where the file has changed meanwhile."""
    path = tmp_path / "normalization.npz"
    config = replace(CONFIG, backend=backend, normalization=str(path))
    action = torch.tensor([0.5, -0.5]).expand(4, 4, 2)
    MinMax([0.2, -0.3, 0.2, -0.3], [0.8, 0.5, 0.8, 0.5], [-0.01, 0], [0.01, 0.012]).save(path)
    with opened(config) as env:
        expected = env.reset()["state"]
        state = env.state_dict()
        following = env.step(action).obs["state"]
    MinMax([0.1, -0.5, 0.1, -0.5], [0.9, 0.9, 0.9, 0.9], [-0.02, -0.01], [0.03, 0.04]).save(path)
    with opened(config) as restored:
        assert torch.equal(restored.load_state_dict(state)["state"], expected)
        assert torch.equal(restored.step(action).obs["state"], following)


def test_the_name_is_the_references_too() -> None:
    with opened(replace(CONFIG, id="avoiding-m5")) as env:
        assert isinstance(env, ChunkEnv)


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_are_refused(backend: str) -> None:
    with pytest.raises(UserError, match=r"env\.options\.randomness is unknown"):
        make_env(replace(CONFIG, backend=backend, options={"randomness": "low"}), "cpu", 0)


# -- PyTorch's version against MuJoCo's


def both(actions: np.ndarray[Any, Any], device: str) -> tuple[np.ndarray[Any, Any], ...]:
    """States and rewards of MuJoCo's version and of PyTorch's."""
    states, rewards = drive(AvoidSimulator(len(actions)), actions)
    config = replace(CONFIG, backend="avoid_torch", num_envs=len(actions), act_steps=1, max_episode_steps=1000)
    with opened(config, device) as env:
        env.reset()
        steps = [env.step(action[:, None].to(device)) for action in normalised(actions).unbind(1)]
    approximate = torch.cat([step.obs["state"] for step in steps], 1)
    return states, rewards, approximate.cpu().numpy(), torch.stack([step.reward for step in steps], 1).cpu().numpy()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_pytorchs_version_stays_within_its_stated_error(device: str) -> None:
    demonstrator, simulator = Avoid(24, seed=0), AvoidSimulator(24)
    ids = np.arange(24)
    state, first = simulator.reset(ids)["state"], np.ones(24, np.bool_)
    actions = np.zeros((24, 100, 2))
    for t in range(100):
        actions[:, t] = demonstrator.act(state, first)
        state, first = simulator.step(actions[:, t], ids)[0]["state"], np.zeros(24, np.bool_)
    states, rewards, approximate, approximate_rewards = both(actions, device)
    error = np.linalg.norm(approximate[..., 2:] - states[..., 2:], axis=-1)
    assert np.sqrt(np.mean(error**2)) < 0.0015
    assert error.max() < 0.004
    assert np.mean(np.abs(approximate_rewards - rewards) > 1e-6) < 0.01
    assert [sides_of(path[:, 2:]) for path in approximate] == [sides_of(path[:, 2:]) for path in states]


def test_pytorchs_version_collides_where_mujocos_does() -> None:
    states, rewards, approximate, approximate_rewards = both(bold_actions(96), "cpu")
    lost, other = ((own < 0).argmax(1) for own in (rewards, approximate_rewards))
    assert np.mean((rewards < 0).any(1)) > 0.5
    assert np.mean((rewards[:, -1] < 0) == (approximate_rewards[:, -1] < 0)) > 0.97
    assert np.mean(np.abs(lost - other) <= 1) > 0.95
    assert clearance(torch.tensor(approximate[..., 2:])).min() > -1e-4
    assert np.quantile(np.linalg.norm(approximate - states, axis=-1), 0.9) < 0.01


def test_a_rod_in_pytorch_is_never_inside_an_obstacle_nor_sped_up_by_it() -> None:
    """Pushed into the first obstacle from all sides, the rod stays at its surface."""
    with opened(replace(CONFIG, backend="avoid_torch", num_envs=64, max_episode_steps=1000)) as env:
        env.reset()
        angle = torch.linspace(0, 2 * torch.pi, 65)[:64]
        towards = torch.tensor([0.5, -0.1]) - 0.1 * torch.stack((angle.cos(), angle.sin()), 1)
        env._position = torch.stack((torch.hypot(*towards.T), torch.atan2(towards[:, 1], towards[:, 0])), 1)
        env._desired, env._target = towards, env._position.clone()
        inwards = normalised(0.005 * np.stack((angle.cos(), angle.sin()), 1))[:, None].expand(-1, 4, -1)
        for _ in range(8):
            obs = env.step(inwards).obs["state"][:, -1, 2:]
        assert clearance(obs).min() > -1e-4
        assert clearance(obs).min(1).values.quantile(0.5) < 0.06


def test_pytorchs_version_says_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match=r"env\.normalization=running: avoid_torch"):
        make_env(replace(CONFIG, backend="avoid_torch", normalization="running"), "cpu", 0)
    with opened(replace(CONFIG, backend="avoid_torch")) as env, opened(replace(CONFIG, num_envs=3)) as fewer:
        with pytest.raises(ValueError, match=r"action has shape \(3, 4, 2\), expected"):
            env.step(torch.zeros(3, 4, 2))
        fewer.reset()
        state = env.state_dict()
        with (
            pytest.raises(UserError, match="the saved history has shape"),
            opened(replace(CONFIG, backend="avoid_torch", num_envs=3)) as smaller,
        ):
            smaller.load_state_dict(state)
