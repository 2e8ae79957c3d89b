"""Demonstrations as transitions, against the reference's and against what they mean."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dppo_fast.data.trajectories import Trajectories
from dppo_fast.data.transitions import chunk_transitions
from dppo_fast.types import UserError
from tests.algorithms.off_policy import demonstrations
from tests.golden_files import Case, golden_cases
from tests.tolerances import FORWARD

LENGTHS = (12, 9, 7)
"""Of the demonstrations; the second was cut off, and the reward of step t is t."""


def windows(act_steps: int) -> list[tuple[int, int, int]]:
    """(row, trajectory's first row, trajectory's end) of every window whose outcome is known."""
    result, end = [], 0
    for i, length in enumerate(LENGTHS):
        begin, end = end, end + length
        for row in range(begin, end - act_steps + 1):
            if i != 1 or row + act_steps < end:
                result.append((row, begin, end))
    return result


@pytest.mark.parametrize(("act_steps", "horizon", "obs_steps"), [(1, 1, 1), (4, 4, 2), (2, 4, 3), (4, 8, 1), (7, 7, 1)])
def test_windows(act_steps: int, horizon: int, obs_steps: int) -> None:
    data = demonstrations()
    got = chunk_transitions(data, horizon, act_steps, obs_steps)
    expected = windows(act_steps)
    assert len(got.reward) == len(expected)
    for i, (row, begin, end) in enumerate(expected):
        seen = [max(row - age, begin) for age in reversed(range(obs_steps))]
        np.testing.assert_array_equal(got.obs["state"][i], data.states[seen])
        predicted = [min(row + k, end - 1) for k in range(horizon)]
        np.testing.assert_array_equal(got.action[i], data.actions[predicted])
        assert got.reward[i] == sum(range(row, row + act_steps))
        assert got.terminated[i] == (row + act_steps == end)
        if row + act_steps < end:
            then = [max(row + act_steps - age, begin) for age in reversed(range(obs_steps))]
            np.testing.assert_array_equal(got.next_obs["state"][i], data.states[then])
    assert got.record == {}


@pytest.mark.parametrize("case", golden_cases("09_datasets", lambda case: "next_state" in case))
def test_windows_equal_the_reference(case: Case) -> None:
    """But for the rewards and ends of chunks, the histories before which there is nothing, and its last windows, whose
    next states it leaves out.
    """
    horizon, obs_steps = case.cfg["horizon_steps"], case.cfg["cond_steps"]
    data = {key: value for key, value in case.file.case("data").sub("").items() if key != "images"}
    trajectories = Trajectories(**data).first(case.cfg.get("max_n_episodes"))
    got = chunk_transitions(trajectories, horizon, horizon, obs_steps, gamma=case.cfg.get("discount_factor"))
    np.testing.assert_array_equal(got.obs["state"], case["state"])
    np.testing.assert_array_equal(got.action, case["actions"])
    inside = (got.terminated == 0).numpy() & (case["indices_start_before"][:, 1] >= obs_steps - 1)
    inside[len(inside) - horizon :] = False
    np.testing.assert_array_equal(got.next_obs["state"][inside], case["next_state"][inside])
    if horizon == 1:
        np.testing.assert_array_equal(got.reward[:, None], case["rewards"])
        np.testing.assert_array_equal(got.terminated[:, None], case["dones"])
        if "reward_to_gos" in case:
            FORWARD.check(got.record["reward_to_go"][:, None], case["reward_to_gos"])


def test_rewards_of_a_chunk_are_summed_and_its_end_is_seen() -> None:
    """Where the reference takes the first step's reward, and never sees an end, if a chunk has several steps."""
    got = chunk_transitions(demonstrations(), horizon=4, act_steps=4, obs_steps=1)
    assert got.reward[0] == 0 + 1 + 2 + 3
    assert got.terminated.sum() == 2


def test_endings_are_seen_by_policies_that_look_further_ahead_than_they_act() -> None:
    """The one decision that is rewarded is the last, and predicting further changes nothing but the predictions."""
    length = 20
    terminals = np.arange(length) == length - 1
    rng = np.random.default_rng(0)
    states, actions = rng.random((length, 3), np.float32), rng.random((length, 2), np.float32)
    data = Trajectories(states, actions, np.array([length]), terminals.astype(np.float32), terminals)
    got, expected = (chunk_transitions(data, horizon, 4, 2, gamma=0.9) for horizon in (8, 4))
    assert got.terminated.tolist() == got.reward.tolist() == [0.0] * 16 + [1.0]
    assert torch.equal(got.action[:, :4], expected.action)
    for (path, value), (_, other) in zip(got.items(), expected.items(), strict=True):
        assert path == "action" or torch.equal(value, other), path


def test_rewards_may_be_discounted_within_a_chunk() -> None:
    got = chunk_transitions(demonstrations(), 3, 3, 1, discount=0.5)
    assert got.reward[1] == 1 + 0.5 * 2 + 0.25 * 3


@pytest.mark.parametrize("act_steps", [1, 2, 5])
def test_reward_to_go(act_steps: int) -> None:
    """From decision to decision up to the trajectory's end, whose last chunk may be cut short."""
    got = chunk_transitions(demonstrations(), act_steps, act_steps, 1, gamma=0.9)
    for value, (row, _, end) in zip(got.record["reward_to_go"], windows(act_steps), strict=True):
        chunks = [sum(range(t, min(t + act_steps, end))) for t in range(row, end, act_steps)]
        assert value == pytest.approx(sum(0.9**k * reward for k, reward in enumerate(chunks)))


@pytest.mark.parametrize("act_steps", [1, 3])
def test_reward_to_go_stops_where_targets_do(act_steps: int) -> None:
    """At the first of several terminal steps, as where success is recorded until the demonstration ends."""
    gamma, length = 0.9, 20
    terminals = np.arange(length) >= 10
    states, actions = np.zeros((length, 3), np.float32), np.zeros((length, 2), np.float32)
    data = Trajectories(states, actions, np.array([length]), terminals.astype(np.float32), terminals)
    got = chunk_transitions(data, act_steps, act_steps, 1, gamma=gamma)
    returns = got.record["reward_to_go"].tolist()
    for t, (reward, over) in enumerate(zip(got.reward.tolist(), got.terminated.tolist(), strict=True)):
        assert returns[t] == pytest.approx(reward if over else reward + gamma * returns[t + act_steps])
    assert returns[10] == got.reward[10] == act_steps


@pytest.mark.parametrize("key", ["rewards", "terminals"])
def test_rewards_and_terminals_are_needed(key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        chunk_transitions(dataclasses.replace(demonstrations(), **{key: None}), 1, 1, 1)


def test_demonstrations_without_a_known_outcome_are_refused() -> None:
    states, actions = torch.zeros(4, 3).numpy(), torch.zeros(4, 2).numpy()
    cut = Trajectories(states, actions, np.array([4]), np.zeros(4), np.zeros(4, dtype=bool))
    with pytest.raises(UserError, match="no trajectory has 4 steps"):
        chunk_transitions(cut, 4, 4, 1)
