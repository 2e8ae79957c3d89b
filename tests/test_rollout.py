from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from dppo_fast.buffer import RolloutBuffer
from dppo_fast.rollout import Collector, EpisodeStatistics
from dppo_fast.types import Act, NoiseStream, Obs, Step

Rewards = NDArray[np.float64]
Flags = NDArray[np.bool_]


def by_hand(
    rewards: Rewards, first: Flags, begin: int, end: int, sparse: bool, whole_only: bool
) -> dict[str, float] | None:
    """The statistics of the rollout [begin, end) of a run whose ``rewards`` are [M, N] and ``first`` [M + 1, N]."""
    episodes = []
    for env in range(rewards.shape[1]):
        starts = np.flatnonzero(first[:, env])
        for start, stop in pairwise(starts):
            if begin < stop <= end and (not whole_only or (start >= begin and stop - start > 1)):
                episodes.append(rewards[start:stop, env])
    if not episodes:
        return None
    returns = [episode.sum() for episode in episodes]
    scores = returns if sparse else [episode.max() / 4 for episode in episodes]
    return {
        "episodes": len(episodes),
        "return": np.mean(returns),
        "return_std": np.std(returns),
        "best_reward": np.mean(scores),
        "success_rate": np.mean([score >= 0.2 for score in scores]),
        "episode_chunks": np.mean([len(episode) for episode in episodes]),
    }


@given(
    seed=st.integers(0, 2**32),
    envs=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    ends=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    sparse=st.booleans(),
    whole_only=st.booleans(),
)
def test_statistics_of_consecutive_rollouts(
    seed: int, envs: int, lengths: list[int], ends: float, sparse: bool, whole_only: bool
) -> None:
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(sum(lengths), envs))
    first = np.concatenate((np.ones((1, envs), bool), rng.random((sum(lengths), envs)) < ends))
    statistics = EpisodeStatistics(envs, 4, 0.2, sparse, whole_only)
    begin = 0
    for length in lengths:
        end = begin + length
        result = statistics.update(rewards[begin:end], first[begin : end + 1])
        expected = by_hand(rewards, first, begin, end, sparse, whole_only) or {"episodes": 0}
        assert result == pytest.approx(expected)
        restored = EpisodeStatistics(envs, 4, 0.2, sparse, whole_only)
        restored.load_state_dict(statistics.state_dict())
        statistics, begin = restored, end


def test_an_episode_of_one_chunk_counts() -> None:
    rewards, first = np.array([[2.0], [3.0]]), np.array([[True], [True], [True]])
    assert EpisodeStatistics(1, 1, 0.0).update(rewards, first)["episodes"] == 2
    assert EpisodeStatistics(1, 1, 0.0, whole_only=True).update(rewards, first) == {"episodes": 0}


class CountingEnv:
    """Shows (env, step of the run, step of the episode); env i terminates after i + 2 chunks, env 0 is cut instead.

    Everything that it hands out is kept in ``handed_out``, with a copy. With ``reuse`` it writes every answer over the
    last one.
    """

    num_envs, action_dim, act_steps, max_episode_steps = 3, 2, 2, 100

    def __init__(self, reuse: bool) -> None:
        self.reuse = reuse
        self.memory: dict[str, Tensor] = {}
        self.obs_shapes = {"state": (1, 3)}
        self.age = torch.zeros(3)
        self.t = 0
        self.actions: list[Tensor] = []
        self.handed_out: list[tuple[Tensor, Tensor]] = []

    def reset(self, seed: int | None = None) -> Obs:
        self.age.zero_()
        return self._obs()

    def step(self, action: Tensor) -> Step:
        self.actions.append(action.clone())
        self.t += 1
        self.age += 1
        over = self.age >= torch.tensor([2, 3, 4])
        final = self._obs("final") if over.any() else None
        self.age[over] = 0
        cut = torch.tensor([True, False, False])
        reward = self._keep("reward", 10.0 * self.t + torch.arange(3))
        return Step(self._obs(), final, reward, over & ~cut, over & cut)

    def _obs(self, name: str = "obs") -> Obs:
        state = torch.stack((torch.arange(3.0), torch.full((3,), self.t), self.age), 1)[:, None]
        return {"state": self._keep(name, state)}

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        if self.reuse:
            return self.memory.setdefault(name, tensor.clone()).copy_(tensor)
        self.handed_out.append((tensor, tensor.clone()))
        return tensor

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        raise NotImplementedError

    def close(self) -> None: ...


class EchoActor:
    """Acts with what it sees, over a longer horizon than the environment executes; its memory is one tensor."""

    def __init__(self) -> None:
        self.noise = NoiseStream(0)
        self.memory = torch.zeros(3, 1)

    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        self.memory += 1
        seen = obs["state"][:, 0, :2]
        action = torch.stack([seen + step for step in (0.0, 0.1, 0.2)], 1)
        return Act(action, {} if deterministic else {"memory": self.memory, "action": action})


class TestCollector:
    @pytest.fixture(autouse=True, params=[False, True], ids=["new tensors", "reused tensors"])
    def _collect(self, request: pytest.FixtureRequest) -> None:
        self.env = CountingEnv(reuse=request.param)
        self.collector = Collector(self.env, EchoActor(), EpisodeStatistics(3, 2, 0.0))
        self.collector.reset()
        self.buffer = RolloutBuffer(5, 3)
        self.statistics = self.collector.collect(self.buffer)

    def test_stores_the_observation_before_the_action(self) -> None:
        state = self.buffer.obs["state"]
        assert state.shape == (5, 3, 1, 3)
        assert state[:, 0, 0, 1].tolist() == [0, 1, 2, 3, 4]
        assert state[:, 1, 0, 2].tolist() == [0, 1, 2, 0, 1]
        assert self.buffer.record["action"][:, :, 0].equal(state[:, :, 0, :2])
        assert self.buffer.last_obs["state"][:, 0, 1].tolist() == [5, 5, 5]
        assert self.buffer.reward[:, 2].tolist() == [12, 22, 32, 42, 52]

    def test_executes_the_beginning_of_the_chunk(self) -> None:
        assert torch.stack(self.env.actions).equal(self.buffer.record["action"][:, :, :2])

    def test_marks_ends_and_beginnings(self) -> None:
        assert self.buffer.truncated.nonzero().tolist() == [[1, 0], [3, 0]]
        assert self.buffer.terminated.nonzero().tolist() == [[2, 1], [3, 2]]
        assert self.buffer.first.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [2, 0], [3, 1], [4, 0], [4, 2]]
        assert self.buffer.valid.all()
        assert not self.buffer.invalid

    def test_keeps_final_observations(self) -> None:
        assert [t for t, _ in self.buffer.final] == [1, 2, 3]
        (_, one), (_, two), (_, three) = self.buffer.final
        assert one["state"][0, 0].tolist() == [0, 2, 2]
        assert two["state"][1, 0].tolist() == [1, 3, 3]
        assert three["state"][[0, 2], 0].tolist() == [[0, 4, 2], [2, 4, 4]]

    def test_counts_what_ended_and_carries_the_rest(self) -> None:
        assert self.statistics["episodes"] == 4
        assert self.statistics["return"] == (10 + 20 + 11 + 21 + 31 + 30 + 40 + 12 + 22 + 32 + 42) / 4
        later = self.collector.collect(self.buffer)
        assert later["episodes"] == 6
        assert self.buffer.first[0].tolist() == [False, False, False]
        assert self.buffer.obs["state"][0, :, 0, 2].tolist() == [1, 2, 1]

    def test_copies_what_others_may_change(self) -> None:
        assert self.buffer.record["memory"][:, 0, 0].tolist() == [1, 2, 3, 4, 5]
        held = [self.buffer.obs["state"], self.buffer.reward, self.buffer.final[0][1]["state"]]
        stored = [tensor.clone() for tensor in held]
        for tensor, copy in self.env.handed_out:
            assert tensor.equal(copy), "the collector wrote into the environment's tensors"
            tensor.fill_(-1)
        assert all(a.equal(b) for a, b in zip(held, stored, strict=True))

    def test_a_new_rollout_starts_a_clean_buffer(self) -> None:
        self.buffer.invalid = True
        self.buffer.valid[:] = False
        storage = self.buffer.obs["state"].data_ptr()
        self.collector.collect(self.buffer)
        assert self.buffer.valid.all()
        assert not self.buffer.invalid
        assert [t for t, _ in self.buffer.final] == [0, 2, 3, 4]
        assert self.buffer.obs["state"].data_ptr() == storage

    def test_deterministic_collecting_records_no_decisions(self) -> None:
        before = self.buffer.record["memory"].clone()
        statistics = self.collector.collect(self.buffer, deterministic=True)
        assert statistics["episodes"] == 6
        assert self.buffer.record["memory"].equal(before)


class RestoredEnv(CountingEnv):
    """Comes back to the same moment, or starts fresh episodes."""

    def __init__(self, restarted: bool) -> None:
        super().__init__(reuse=False)
        self.restarted = restarted

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "age": self.age.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        self.t, self.age = state["t"], state["age"].clone()
        return self.reset() if self.restarted else self._obs()


@pytest.mark.parametrize(
    ("restarted", "steps", "returns"),
    [
        (False, 1, [30 + 40, 12 + 22 + 32 + 42]),  # of envs 0 and 2
        (True, 3, [40 + 50, 41 + 51 + 61]),  # of envs 0 and 1
    ],
)
def test_what_a_restored_env_cannot_continue_is_not_counted(restarted: bool, steps: int, returns: list[float]) -> None:
    first, second = (Collector(RestoredEnv(restarted), EchoActor(), EpisodeStatistics(3, 2, 0.0)) for _ in range(2))
    first.reset()
    first.collect(RolloutBuffer(3, 3))
    second.load_state_dict(deepcopy(first.state_dict()))
    buffer = RolloutBuffer(steps, 3)
    statistics = second.collect(buffer)
    assert buffer.first[0].tolist() == [restarted, True, restarted]
    assert (statistics["episodes"], statistics["return"]) == (2, np.mean(returns))


def test_the_buffer_follows_a_record_that_changes_its_shape() -> None:
    buffer = RolloutBuffer(1, 2)
    obs = {"state": torch.zeros(2, 1, 1)}
    flags = torch.zeros(2, dtype=torch.bool)
    for F in (3, 2):
        buffer.clear()
        buffer.add(obs, {"log_prob": torch.full((2, F), float(F))}, flags)
        assert buffer.record["log_prob"].equal(torch.full((1, 2, F), float(F)))


def test_invalid_rows_are_marked() -> None:
    buffer = RolloutBuffer(2, 2)
    obs = {"state": torch.zeros(2, 1, 1)}
    flags = torch.zeros(2, dtype=torch.bool)
    valid = torch.tensor([True, False])
    for truncated, mask in ((~valid, valid), (flags, None)):
        buffer.add(obs, {}, flags)
        buffer.complete(Step(obs, obs, torch.zeros(2), flags, truncated, mask))
    assert buffer.invalid
    assert buffer.valid.tolist() == [[True, False], [True, True]]
