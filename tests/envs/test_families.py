"""What is particular to a family: dims, reward, success, ends, options."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch

from dppo_fast.envs import BACKENDS, Backend, EnvConfig, Identity, make_env, normalization_of, read_options
from dppo_fast.envs.envpool import EnvPoolSimulator
from dppo_fast.envs.kitchen import GOALS, TASKS, KitchenSimulator
from dppo_fast.types import UserError, VecEnv
from tests.envs.test_backends import opened, run
from tests.envs.toy import ToySimulator, chunk_env, random_actions
from tests.runs import DPPO, rows, train

SIZES = {
    "kitchen-mixed-v0": (60, 9),
    "MetaWorld/DrawerOpen-v3": (39, 4),
    "AdroitHandDoor-v1": (39, 28),
    "AdroitHandPenSparse-v1": (45, 24),
    "FetchReach-v4": (16, 4),
    "FetchPickAndPlaceDense-v4": (31, 4),
}
"""Do and Da."""


def config_of(task: str, **changes: Any) -> EnvConfig:
    return EnvConfig(task, num_envs=2, act_steps=4, num_threads=1, **changes)


@pytest.mark.parametrize("task", SIZES)
def test_dims_seeds_chunks_and_time_limits(task: str) -> None:
    """Only the time limit ends these episodes. A chunk of 4 is four of 1, and one seed fixes everything."""
    config = config_of(task, max_episode_steps=24)
    with opened(config) as env:
        assert env.obs_shapes == {"state": (1, SIZES[task][0])}
        assert env.action_dim == SIZES[task][1]
        env.reset(seed=1)
        actions = random_actions(env, 13)
        steps = run(env, actions)
        assert [step.truncated.tolist() for step in steps] == [[t in (5, 11)] * 2 for t in range(13)]
        assert not any(step.terminated.any() for step in steps)
    with opened(replace(config, act_steps=1)) as single:
        single.reset(seed=1)
        singles = run(single, actions.transpose(1, 2).flatten(0, 1)[:, :, None])
    for t, step in enumerate(steps):
        torch.testing.assert_close(step.reward, sum(one.reward for one in singles[4 * t : 4 * t + 4]))
        assert torch.equal(step.obs["state"], singles[4 * t + 3].obs["state"])


def test_every_metaworld_task_is_there() -> None:
    assert sum(task.startswith("MetaWorld/") for task in BACKENDS["envpool"].load().task_ids()) == 50


def test_metaworld_shows_the_goal_where_asked() -> None:
    goals = []
    for hidden in (True, False):
        with opened(config_of("MetaWorld/DrawerOpen-v3", options={"partially_observable": hidden})) as env:
            goals.append(env.reset(seed=0)["state"][:, 0, 36:])
    assert goals[0].eq(0).all()
    assert goals[1].ne(0).any(1).all()


def reach(task: str, reward: str, hand: slice, goal: slice, gain: float) -> tuple[np.ndarray[Any, Any], float]:
    """Rewards of steering the hand to the goal [40, 2], and how far it is from it in the end."""
    options = {"reward": reward} | ({"partially_observable": False} if "Meta" in task else {})
    simulator, ids = EnvPoolSimulator(task, config_of(task, options=options)), np.arange(2)
    simulator.seed(0, np.zeros(2, np.int64))
    state, rewards = simulator.reset(ids)["state"], []
    for _ in range(40):
        action = np.zeros((2, 4))
        action[:, :3] = gain * (state[:, goal] - state[:, hand])
        obs, reward_now, terminated, _ = simulator.step(action.clip(-1, 1), ids)
        assert not terminated.any()
        rewards.append(reward_now)
        state = obs["state"]
    return np.array(rewards), float(np.abs(state[:, goal] - state[:, hand]).max())


def test_success_of_metaworld_is_what_its_info_says() -> None:
    """The reward is shaped, 10 at the goal; ``reward=success`` is 0 and then 1."""
    where = (slice(0, 3), slice(36, 39), 10.0)
    shaped, distance = reach("MetaWorld/Reach-v3", "task", *where)
    success, _ = reach("MetaWorld/Reach-v3", "success", *where)
    assert distance < 0.05
    assert shaped[-1].min() > 9
    assert set(success.ravel()) == {0, 1}
    assert (np.diff(success, axis=0) >= 0).all()
    assert success[-1].all()
    assert not success[0].any()


def test_success_of_fetch_is_a_reward_of_zero() -> None:
    """Its own sparse reward is -1 until the goal is reached, so ``best_reward_threshold_for_success: 0`` does, too."""
    where = (slice(10, 13), slice(13, 16), 8.0)
    sparse, distance = reach("FetchReach-v4", "task", *where)
    success, _ = reach("FetchReach-v4", "success", *where)
    assert distance < 0.05
    assert sparse[-1].tolist() == [0, 0]
    assert np.array_equal(success, sparse + 1)


def test_success_of_adroit_is_the_top_of_its_sparse_reward() -> None:
    """-0.1 until then."""
    for reward, least in (("task", -0.1), ("success", 0.0)):
        with opened(config_of("AdroitHandDoorSparse-v1", options={"reward": reward})) as env:
            env.reset()
            assert env.step(random_actions(env, 1)[0]).reward.tolist() == pytest.approx([4 * least] * 2)


def test_the_kitchen_is_that_of_the_reference() -> None:
    """Positions where D4RL's data begins, and a goal that is zero but for the four tasks."""
    simulator = KitchenSimulator("kitchen-complete-v0", config_of("kitchen-complete-v0"))
    simulator.seed(0, np.zeros(2, np.int64))
    state = simulator.reset(np.arange(2))["state"]
    start = [0.148, -1.768, 1.844, -2.477, 0.26, 0.713, 1.595, 0.048, 0.037]
    np.testing.assert_allclose(state[:, :9], [start] * 2, atol=0.011)  # with D4RL's noise
    assert np.abs(state[0, :9] - state[1, :9]).max() > 0.001
    np.testing.assert_allclose(state[:, 22], 0, atol=0.011)  # the microwave is closed
    np.testing.assert_allclose(state[:, 23:26], [[-0.269, 0.35, 1.619]] * 2, atol=0.011)  # the kettle
    goal = np.zeros(30)
    goal[17:20] = -0.69, -0.05, 0.37
    goal[22:30] = -0.75, -0.23, 0.75, 1.62, 0.99, 0, 0, -0.06
    assert np.array_equal(state[:, 30:], [goal] * 2)
    told = simulator._pool.reset(np.arange(2, dtype=np.int32))[0]["desired_goal"]
    for name, (_, values) in GOALS.items():
        np.testing.assert_allclose(told[name][0], values)
    assert TASKS["kitchen-partial-v0"] == TASKS["kitchen-complete-v0"]
    assert set(TASKS["kitchen-mixed-v0"]) == {"microwave", "kettle", "bottom burner", "light switch"}


PUSH = [
    [-1, 0, 0.5, 0.5, -1, -0.5, -0.5, 0.5, 0],
    [-0.5, -1, 1, 1, 0.5, 0, 0, 0, 0.5],
    [-1, 1, -1, -0.5, -0.5, -0.5, -0.5, 0, -1],
    [0, 0, 0, 0, 0, 0, 0, 0, 0],
]
"""Velocities of the joints, ten steps each, that push the kettle to where it belongs."""


@pytest.mark.parametrize("only", [False, True])
def test_the_kitchen_pays_for_a_task_once_and_ends_after_the_last(only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if only:
        monkeypatch.setitem(TASKS, "kitchen-mixed-v0", ["kettle"])
    simulator = KitchenSimulator("kitchen-mixed-v0", replace(config_of("kitchen-mixed-v0"), num_envs=1))
    simulator.seed(0, np.zeros(1, np.int64))
    simulator.reset(np.arange(1))
    rewards: list[float] = []
    ended = False
    while not ended and len(rewards) < 40:
        _, reward, [ended], _ = simulator.step(np.array([PUSH[len(rewards) // 10]]), np.arange(1))
        rewards.append(reward.item())
    assert sum(rewards) == 1
    assert max(rewards) == 1
    assert ended == only
    assert (rewards[-1] == 1) == only


@dataclass(frozen=True)
class Options:
    kind: Literal["low", "med"] = "low"
    cameras: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=lambda: [96, 96])
    scale: float = 1.0
    shift: float | None = None
    fast: bool = False


def test_options_become_a_dataclass() -> None:
    given = {"kind": "med", "cameras": ["wrist"], "scale": 2, "shift": None, "fast": True}
    assert read_options(Options, config_of("a", options=given)) == Options(
        kind="med", cameras=["wrist"], scale=2, shift=None, fast=True
    )
    assert read_options(Options, config_of("a")) == Options()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"camera": []},
            r"env\.options\.camera is unknown to env\.id=a \(did you mean cameras.*\?\); choose from kind, cam",
        ),
        ({"kind": "high"}, r"env\.options\.kind=high: must be low or med"),
        ({"cameras": "wrist"}, r"env\.options\.cameras=wrist: must be list\[str\]"),
        ({"size": [96, "a"]}, r"env\.options\.size=\[96, 'a'\]: must be list\[int\]"),
        ({"scale": True}, r"env\.options\.scale=True: must be float"),
        ({"fast": 1}, r"env\.options\.fast=1: must be bool"),
    ],
)
def test_mistyped_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_options(Options, config_of("a", options=options))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "kitchen-mixed-v0",
            {"reward": "success"},
            r"env\.options\.reward is unknown to env\.id=kitchen-.*; it takes none",
        ),
        ("MetaWorld/Reach-v3", {"partialy_observable": False}, "did you mean partially_observable"),
        ("MetaWorld/Reach-v3", {"partially_observable": "no"}, r"env\.options=.*Reach-v3 does not take these values"),
        ("MetaWorld/Reach-v3", {"num_envs": 3}, r"env\.options\.num_envs is unknown"),
        ("MetaWorld/Reach-v3", {"reward": "dense"}, r"env\.options\.reward=dense: choose task or success"),
        ("Hopper-v4", {"reward": "success"}, r"env\.options\.reward=success: choose task$"),
    ],
)
def test_options_that_a_task_does_not_have_are_refused(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_env(config_of(task, options=options), "cpu", 0)


def test_options_of_gymnasium_are_the_constructors_arguments() -> None:
    config = config_of("Hopper-v4", backend="gymnasium", options={"reset_noise_scale": 0.0})
    with opened(config) as env:
        state = env.reset()["state"]
        assert torch.equal(state[0], state[1])
    with pytest.raises(UserError, match=r"env\.options=\{'noise': 1\}: Hopper-v4 does not take them .*noise"):
        make_env(replace(config, options={"noise": 1}), "cpu", 0)


def test_a_family_may_make_whole_vector_envs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed all that `make_env` got, and what it gives is returned as it is."""
    family: Any = ModuleType("tests.envs.device_family")
    family.task_ids = lambda: ["Device-v0"]
    made = []

    def make_vec_env(*arguments: Any) -> VecEnv:
        made.append(arguments)
        return chunk_env(ToySimulator(2))

    family.make_vec_env = make_vec_env
    monkeypatch.setitem(sys.modules, family.__name__, family)
    monkeypatch.setitem(BACKENDS, "device", Backend(family.__name__, "dppo-fast[device]"))
    config, normalization = config_of("Device-v0", options={"a": 1}), Identity([-1], [1])
    env = make_env(config, "cpu", 3, normalization, training=False)
    assert made == [("Device-v0", config, torch.device("cpu"), 3, normalization, False)]
    assert normalization_of(env) is not None

    def needs_a_package(*arguments: Any) -> VecEnv:
        raise ModuleNotFoundError("No module named 'isaacgym'")

    family.make_vec_env = needs_a_package
    with pytest.raises(
        UserError,
        match=r"env\.id=Device-v0: not usable here \(No module named 'isaacgym'\): pip install 'dppo-fast\[device\]'",
    ):
        make_env(config, "cpu", 3)


@pytest.mark.parametrize("piece", ["metaworld", "adroit", "fetch", "kitchen"])
def test_a_piece_of_configuration_is_all_it_takes(piece: str, tmp_path: Path) -> None:
    env = [f"piece/env@env={piece}", "env.normalization=none", "env.max_episode_steps=8"]
    short = ["train.n_train_itr=1", "train.n_steps=2", "train.eval_episodes=1", "algorithm.batch_size=6"]
    assert train(*DPPO, *env, *short, f"logdir={tmp_path}/run") == 0
    first, last = rows(tmp_path / "run")
    assert last["env_steps"] == 2 * 3 * 4
    assert first["eval/episode_length"] == 8
    assert last["eval/success_rate"] == 0
