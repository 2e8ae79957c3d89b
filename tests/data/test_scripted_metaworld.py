from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dppo_fast.collect import main
from dppo_fast.data import Trajectories
from dppo_fast.data.scripted import SCRIPTED, demonstrator
from dppo_fast.data.scripted.metaworld import MetaWorld, Reach

NAMES = [name for name in SCRIPTED if name.startswith("metaworld-")]


def record(name: str, out: Path, *arguments: str) -> Trajectories:
    assert main([f"scripted={name}", f"out={out}", "num_envs=4", "env.num_threads=1", "device=cpu", *arguments]) == 0
    return Trajectories.load(out / "train.npz")


@pytest.mark.parametrize("name", NAMES)
def test_it_solves_its_task(name: str, tmp_path: Path) -> None:
    limit = demonstrator(name).env["max_episode_steps"]
    trajectories = record(name, tmp_path, f"steps={4 * limit}")
    assert trajectories.traj_lengths.tolist() == [limit] * 4
    assert (trajectories.state_dim, trajectories.action_dim) == (39, 4)
    assert trajectories.returns is not None
    assert (trajectories.returns > 5).sum() >= 3  # steps in which it is solved


def test_displaced_places_make_it_fail_more_often(tmp_path: Path) -> None:
    solved = []
    for displacement in (0.0, 0.05):
        out = tmp_path / str(displacement)
        returns = record("metaworld-reach", out, "steps=800", f"options.displacement={displacement}").returns
        assert returns is not None
        solved.append((returns > 0).mean())
    assert solved[0] == 1
    assert 0 < solved[1] < 0.9


def states(*hands: list[float]) -> NDArray[np.float64]:
    state = np.zeros((len(hands), 39))
    state[:, :3] = hands
    state[:, 36:39] = 0.5
    return state


def test_an_episode_s_randomness_follows_from_seed_and_episode() -> None:
    def actions(num_envs: int, seed: int) -> Any:
        script = Reach(num_envs, seed, displacement=0.1)
        start, later = np.ones(num_envs, bool), np.zeros(num_envs, bool)
        state = states(*[[0.5, 0.5, 0.5]] * num_envs)
        return np.stack([script.act(state, first) for first in (start, later, start, later)])

    two = actions(2, 0)
    np.testing.assert_array_equal(two, actions(2, 0))
    assert not np.array_equal(two, actions(2, 1))
    one = actions(1, 0)
    np.testing.assert_array_equal(one[:2, 0], two[:2, 0])  # episode 0
    np.testing.assert_array_equal(one[2:, 0], two[:2, 1])  # episode 1
    assert not np.array_equal(two[:2], two[2:])


def test_it_goes_on_when_it_is_there() -> None:
    """Over the object, at it, with it in the gripper."""
    push = demonstrator("metaworld-push")(num_envs=3, seed=0, noise=0.0)  # type: ignore[call-arg]
    assert isinstance(push, MetaWorld)
    state = states([0.2, 0, 0.15], [0, 0, 0.15], [0, 0, 0.01])
    state[:, 3] = [1, 1, 0.5]
    actions = push.act(state, np.ones(3, bool))
    np.testing.assert_allclose(actions, [[-1, 0, 0, -1], [0, 0, -1, -1], [1, 1, 1, 1]], atol=1e-12)


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, message in {"noise=-1": "noise=-1.0: must lie in", "noises=1": "options.noises is unknown"}.items():
        assert main(["scripted=metaworld-reach", f"out={tmp_path}", f"options.{option}"]) == 2
        assert message in capsys.readouterr().err
