"""Episode statistics: the reference's, and what ours count beyond them."""

from __future__ import annotations

import numpy as np
import pytest

from dppo_fast.rollout import EpisodeStatistics
from tests.golden_files import Case, golden_cases
from tests.tolerances import FLOAT64

NAMES = {
    "num_episode": "episodes",
    "avg_episode_reward": "return",
    "avg_best_reward": "best_reward",
    "success_rate": "success_rate",
}
"""The reference's names -> ours."""


@pytest.mark.parametrize("case", golden_cases("07_episode_summary"))
def test_whole_episodes_only(case: Case) -> None:
    reward, first = case["reward"], case["firsts"].astype(bool)
    threshold, sparse = float(case["threshold"]), bool(case["sparse"])
    statistics = EpisodeStatistics(reward.shape[1], int(case["act_steps"]), threshold, sparse, whole_only=True)
    ours = statistics.update(reward, first)
    for theirs, name in NAMES.items():
        FLOAT64.check(ours.get(name, 0.0), case[theirs], name)


def test_one_chunk_episodes_count() -> None:
    reward = np.array([[1.0], [2.0], [4.0]])
    first = np.array([[True], [True], [False], [True]])
    assert EpisodeStatistics(1, 1, 0.0, whole_only=True).update(reward, first)["episodes"] == 1
    ours = EpisodeStatistics(1, 1, 0.0).update(reward, first)
    assert (ours["episodes"], ours["return"], ours["episode_chunks"]) == (2, 3.5, 1.5)


@pytest.mark.parametrize("cut", range(1, 7))
def test_an_unfinished_episode_goes_on_in_the_next_rollout(cut: int) -> None:
    rng = np.random.default_rng(0)
    reward = rng.standard_normal((7, 3))
    first = rng.random((8, 3)) < 0.3
    first[0], first[-1] = True, True
    whole = EpisodeStatistics(3, 2, 0.1).update(reward, first)
    pieces = EpisodeStatistics(3, 2, 0.1)
    parts = [pieces.update(reward[:cut], first[: cut + 1]), pieces.update(reward[cut:], first[cut:])]
    assert sum(part["episodes"] for part in parts) == whole["episodes"]
    for name in ("return", "best_reward", "success_rate", "episode_chunks"):
        total = sum(part["episodes"] * part[name] for part in parts if part["episodes"])
        assert total == pytest.approx(whole["episodes"] * whole[name])
