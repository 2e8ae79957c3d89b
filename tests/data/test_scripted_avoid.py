"""The demonstrator of D3IL avoid, and its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dppo_fast.collect import main as collect
from dppo_fast.data.scripted.avoid import SUBSETS, Avoid
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.envs import MinMax
from dppo_fast.envs.avoid import AvoidSimulator
from dppo_fast.envs.avoid_task import ACTION_HIGH, ACTION_LOW, GOAL_SIDE, MODES, sides_of
from dppo_fast.types import UserError


@pytest.mark.parametrize("seed", [0, 1])
def test_every_mode_is_shown_without_a_collision(seed: int) -> None:
    """Two episodes of each mode; then the next episodes, of other modes, vary."""
    n = 2 * len(MODES)
    simulator, demonstrator, ids = AvoidSimulator(n), Avoid(n, seed), np.arange(n)
    state, first = simulator.reset(ids)["state"], np.ones(n, np.bool_)
    paths, actions = [], []
    for _ in range(100):
        actions.append(demonstrator.act(state, first))
        obs, reward, *_ = simulator.step(actions[-1], ids)
        state, first = obs["state"], np.zeros(n, np.bool_)
        paths.append(state[:, 2:])
        assert reward.min() >= 0
    rods = np.stack(paths, 1)
    shown = [sides_of(path) for path in rods]
    assert shown == [*MODES, *MODES]
    np.testing.assert_array_equal(reward, [2 if GOAL_SIDE in mode else 1 for mode in shown])
    assert np.abs(rods[:24] - rods[24:]).max(axis=(1, 2)).min() > 0.005
    taken = np.stack(actions)
    assert (taken >= ACTION_LOW - 1e-12).all()
    assert (taken <= ACTION_HIGH + 1e-12).all()


def test_an_env_goes_on_to_the_next_mode_with_its_next_episode() -> None:
    """Nothing depends on how many envs there are at once: episode k is the same."""
    start = np.tile([0.525, -0.28, 0.525, -0.28], (5, 1))
    many, one = Avoid(5, seed=3, subset="m3"), Avoid(1, seed=3, subset="m3")
    together = many.act(start, np.ones(5, np.bool_))
    alone = [one.act(start[:1], np.ones(1, np.bool_))[0] for _ in range(5)]
    np.testing.assert_array_equal(together, alone)


def test_subsets() -> None:
    assert SUBSETS["m1"] == ((1, 2, 5), (1, 2, 6))
    assert SUBSETS["m2"] == ((1, 2, 5), (1, 2, 7))
    assert SUBSETS["m3"] == ((1, 2, 5), (1, 2, 8))
    assert set(SUBSETS["all"]) == set(MODES)
    with pytest.raises(UserError, match="subset=m4 is unknown; choose from m1, m2, m3, all"):
        Avoid(1, 0, "m4")


@pytest.mark.parametrize("subset", ["m1", "m2", "m3"])
def test_the_files_hold_eight_demonstrations_half_of_them_in_the_mode_that_pays(subset: str, tmp_path: Path) -> None:
    arguments = ["scripted=avoid", f"options.subset={subset}", "num_envs=8", "steps=800", f"out={tmp_path}"]
    assert collect(arguments) == 0
    data = Trajectories.load(tmp_path / "train.npz")
    assert data.traj_lengths.tolist() == [100] * 8
    ranges = MinMax.load(tmp_path / "normalization.npz", 4, 2)
    np.testing.assert_allclose(ranges.action_min, ACTION_LOW, atol=1e-6)
    assert (ranges.action_max <= ACTION_HIGH + 1e-6).all()
    assert (ranges.action_max > 0.6 * ACTION_HIGH).all()
    low, high = ranges.obs_min, ranges.obs_max
    rods = ((data.states + 1) / 2 * (high - low) + low)[:, 2:].reshape(8, 100, 2)
    assert [sides_of(path) for path in rods] == list(SUBSETS[subset]) * 4
