"""The replay buffer against what the environment saw."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dppo_fast.buffer import RolloutBuffer
from dppo_fast.replay import ReplayBuffer, Transitions
from dppo_fast.types import Act, NoiseStream, Obs, Step
from tests.small import collector, gaussian_policy, rollout, seeded, toy_env


def transitions(n: int, start: int = 0, record: bool = False) -> Transitions:
    """Transition number i is made of the number i."""
    i = torch.arange(start, start + n).float()
    obs = {"state": i.view(-1, 1, 1).expand(n, 2, 3)}
    following = {"state": obs["state"] + 1}
    return Transitions(obs, i.view(-1, 1, 1), i, following, i % 2, {"reward_to_go": i} if record else {})


def equal(a: ReplayBuffer, b: ReplayBuffer) -> bool:
    rows = torch.arange(len(a))
    pairs = zip(a.gather(rows).items(), b.gather(rows).items(), strict=True)
    same = all(x[0] == y[0] and torch.equal(x[1], y[1]) for x, y in pairs)
    return same and (a.size, a.head) == (b.size, b.head)


def test_transitions_of_a_rollout_are_those_that_the_environment_made() -> None:
    """Of the state (episode, t, acc): the next one is of the same episode, 4 steps later or where it ended."""
    buffer = rollout(gaussian_policy(), steps=8)
    replay = ReplayBuffer(100)
    replay.extend(buffer)
    assert len(replay) == 8 * 4
    got = replay.gather(torch.arange(32))
    episode, t, _ = got.obs["state"][:, -1].unbind(-1)
    next_episode, next_t, _ = got.next_obs["state"][:, -1].unbind(-1)
    torch.testing.assert_close(next_episode, episode)
    end = torch.tensor([5.0, 9.0, 13.0, 1e9])[episode.long()]
    torch.testing.assert_close(next_t, torch.minimum(t + 4, end))
    torch.testing.assert_close(got.terminated.bool(), (next_t == end) & (episode != 1))
    torch.testing.assert_close(got.action, buffer.record["action"].flatten(0, 1))
    executed = got.action.sum((1, 2)) + torch.stack([(t + k) * 0.1 for k in range(1, 5)]).sum(0)
    whole = next_t == t + 4
    torch.testing.assert_close(got.reward[whole], executed[whole])
    assert 0 < whole.sum() < 32


def test_episodes_that_end_with_the_rollout_keep_their_own_last_observation() -> None:
    env = toy_env()
    replay = ReplayBuffer(100)
    collect = collector(env, gaussian_policy()).collect
    first, second = RolloutBuffer(2, 4), RolloutBuffer(1, 4)
    collect(first)  # the first episode has 5 steps, so it ends in its second chunk
    replay.extend(first)
    collect(second)
    replay.extend(second)
    got = replay.gather(torch.arange(12))
    assert got.next_obs["state"][:, -1, 1].tolist() == [4.0] * 4 + [5.0] * 4 + [4.0] * 4
    assert got.terminated.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4
    assert got.obs["state"][8:, -1, :2].tolist() == [[1.0, 0.0]] * 4


class Silent:
    """Decides to do nothing, and records which env and decision it was."""

    noise = NoiseStream(0)

    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        env = torch.arange(len(obs["state"])).float() + 10 * self.noise.step
        self.noise.step += 1
        action = torch.zeros(len(env), 4, 2)
        return Act(action, {"action": action, "env": env, "unwanted": env})


def test_rows_that_must_not_be_learned_from_are_not_stored() -> None:
    env = toy_env()
    step = env.step

    def broken(action: Tensor) -> Step:
        result = step(action)
        return dataclasses.replace(result, valid=torch.tensor([True, False, True, True]))

    env.step = broken  # type: ignore[method-assign]
    buffer = RolloutBuffer(2, 4)
    collector(env, Silent()).collect(buffer)
    replay = ReplayBuffer(100, keep=["env"])
    replay.extend(buffer)
    assert replay.gather(torch.arange(len(replay))).record["env"].tolist() == [0.0, 2.0, 3.0, 10.0, 12.0, 13.0]
    assert set(replay.data) == {"obs/state", "action", "reward", "next_obs/state", "terminated", "record/env"}


@pytest.mark.parametrize("sizes", [[3, 4, 5], [7, 1], [25], [10, 10, 1]])
def test_the_newest_are_kept(sizes: list[int]) -> None:
    replay, start = ReplayBuffer(10), 0
    for n in sizes:
        replay.add(transitions(n, start))
        start += n
    kept = min(start, 10)
    assert len(replay) == kept
    got = replay.gather(torch.arange(kept))
    assert sorted(got.reward.tolist()) == [float(i) for i in range(start - kept, start)]
    torch.testing.assert_close(got.next_obs["state"][:, 0, 0], got.reward + 1)
    assert replay.data["reward"][replay.head - 1] == start - 1


def test_storage_stays_in_place() -> None:
    """Where a CUDA graph looks for it."""
    replay = ReplayBuffer(10)
    replay.add(transitions(4))
    before = {path: value.data_ptr() for path, value in replay.data.items()}
    replay.add(transitions(25))
    assert before == {path: value.data_ptr() for path, value in replay.data.items()}


def test_samples_are_uniform_over_what_is_stored() -> None:
    replay = ReplayBuffer(1000)
    replay.add(transitions(5))
    counts = replay.sample(5000, seeded(0)).reward.long().bincount(minlength=5)
    assert len(counts) == 5
    assert counts.sub(1000).abs().max() < 150


def test_the_same_generator_draws_the_same_sample() -> None:
    replay = ReplayBuffer(10)
    replay.add(transitions(10))
    a, b, c = (replay.sample(20, seeded(seed)).reward for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_joining_keeps_what_all_have() -> None:
    joined = Transitions.join([transitions(2, 0, record=True), transitions(3, 10)])
    assert joined.reward.tolist() == [0, 1, 10, 11, 12]
    assert joined.obs["state"].shape == (5, 2, 3)
    assert joined.record == {}


def test_rewritten_actions_are_sampled() -> None:
    replay = ReplayBuffer(10)
    replay.add(transitions(4))
    replay.rewrite("action", torch.tensor([1, 3]), torch.tensor([[[-1.0]], [[-3.0]]]))
    assert replay.gather(torch.arange(4)).action.flatten().tolist() == [0, -1, 2, -3]


def test_changes_make_an_equal_buffer() -> None:
    """Each holds what is new or rewritten since the last, and no more."""
    replay, copy = ReplayBuffer(10), ReplayBuffer(10)
    counts = []
    for start, n in ((0, 6), (6, 3), (9, 4)):
        replay.add(transitions(n, start))
        if start == 6:
            replay.rewrite("action", torch.tensor([0, 8]), -torch.ones(2, 1, 1))
        changes = replay.changes()
        counts.append(len(changes["rows"]))
        copy.apply(changes)
        assert equal(replay, copy)
    assert counts == [6, 3 + 1, 4]
    assert len(replay.changes()["rows"]) == 0
