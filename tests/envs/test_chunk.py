"""Chunked stepping over simulators whose numbers are known."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from dppo_fast.envs import Running
from dppo_fast.types import UserError
from tests.envs.toy import ToySimulator, chunk_env, random_actions
from tests.golden_files import Case, golden_cases

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("case", golden_cases("10_multistep"))
def test_chunks_agree_with_the_reference(case: Case) -> None:
    """Where the reference needs an explicit reset after an end, its next row is what `Step.obs` holds here."""
    cfg = case.cfg
    done_at, limit_at = ({int(e): steps for e, steps in cfg[key].items()} for key in ("done_at", "timelimit_at"))
    simulator = ToySimulator(1, done_at, limit_at)
    env = chunk_env(
        simulator,
        act_steps=cfg["n_action_steps"],
        obs_steps=cfg["n_obs_steps"],
        max_episode_steps=cfg["max_episode_steps"] or 10**9,
    )
    rows = iter(case["obs"])

    def assert_obs(obs: dict[str, torch.Tensor] | None, expected: Any) -> None:
        assert obs is not None
        np.testing.assert_allclose(obs["state"][0], expected, rtol=1e-6, atol=1e-6)

    assert_obs(env.reset(), case["reset_obs"])
    for i, action in enumerate(case.tensor("actions")):
        step = env.step(action[None])
        ended = case["terminated"][i] | case["truncated"][i]
        if ended and not cfg["reset_within_step"]:
            assert_obs(step.final_obs, next(rows))
        elif case["has_final_obs"][i]:
            assert_obs(step.final_obs, case["nan_ok/final_obs"][i])
        assert_obs(step.obs, next(rows))
        assert (step.final_obs is not None) == ended
        np.testing.assert_allclose(step.reward[0], case["reward"][i], rtol=1e-6, atol=1e-6)
        # gym's time limit sets both flags; here it is a truncation alone.
        assert step.truncated.item() == case["truncated"][i]
        assert step.terminated.item() == (case["terminated"][i] and not case["truncated"][i])
    executed = case["inner_log"][case["inner_log"][:, 0] >= 0, :2]
    assert [entry[1:] for entry in simulator.log] == [tuple(map(int, row)) for row in executed]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_envs_of_a_batch_do_not_depend_on_each_other(device: str) -> None:
    """Envs that end at different steps of a chunk give what each gives alone; rows that did not end repeat `obs`."""

    def make(n: int) -> Any:
        return chunk_env(ToySimulator(n, {0: [6], 2: [1]}, {1: [9]}), max_episode_steps=11, device=device)

    together, alone = make(3), [make(1) for _ in range(3)]
    actions = random_actions(together, 12).to(device)
    observed = [together.reset()["state"]]
    expected = [torch.cat([env.reset()["state"] for env in alone])]
    ends = 0
    for i, action in enumerate(actions):
        step = together.step(action)
        singles = [env.step(action[[n]]) for n, env in enumerate(alone)]
        observed.append(step.obs["state"])
        expected.append(torch.cat([s.obs["state"] for s in singles]))
        for name in ("reward", "terminated", "truncated"):
            assert torch.equal(getattr(step, name), torch.cat([getattr(s, name) for s in singles])), (i, name)
        if step.final_obs is not None:
            ends += 1
            over = step.terminated | step.truncated
            finals = torch.cat([(s.final_obs or s.obs)["state"] for s in singles])
            assert torch.equal(step.final_obs["state"], finals)
            assert torch.equal(step.final_obs["state"][~over], step.obs["state"][~over])
    assert ends > 3
    assert all(value.device.type == device for value in observed)
    assert all(torch.equal(a, b) for a, b in zip(observed, expected, strict=True))  # nothing was overwritten later


def test_a_termination_at_the_time_limit_is_a_termination() -> None:
    env = chunk_env(ToySimulator(2, done_at={0: [3]}), max_episode_steps=3)
    env.reset()
    step = env.step(random_actions(env, 1)[0])
    assert step.terminated.all()
    assert not step.truncated.any()
    env = chunk_env(ToySimulator(2), max_episode_steps=3)
    env.reset()
    step = env.step(random_actions(env, 1)[0])
    assert step.truncated.all()
    assert not step.terminated.any()
    assert step.final_obs is not None
    assert step.final_obs["state"][:, -1, 1].tolist() == [3, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["obs", "reward"])
def test_an_env_that_returns_nan_is_reset_and_masked(
    value: float, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def corrupt(ids: Any, state: Any, reward: Any) -> None:
        bad = (ids == 1) & (state[:, 0] == 0) & (state[:, 1] == 6)
        if where == "obs":
            state[bad, 2] = value
        else:
            reward[bad] = value

    env, clean = (chunk_env(ToySimulator(3, corrupt=c)) for c in (corrupt, None))
    actions = random_actions(env, 4)
    with caplog.at_level(logging.WARNING):
        env.reset()
        clean.reset()
        before = env.step(actions[0])
        clean.step(actions[0])
        step, expected = env.step(actions[1]), clean.step(actions[1])
    assert before.valid is None
    assert step.valid is not None
    assert step.valid.tolist() == [True, False, True]
    assert step.truncated.tolist() == [False, True, False]
    assert not step.terminated.any()
    assert step.reward[1] == 0
    assert step.final_obs is not None
    assert step.final_obs["state"][1, -1, 1] == 5  # the last finite observation
    assert step.obs["state"][1, -1].tolist() == [1, 0, 0]
    for n in (0, 2):
        assert step.reward[n] == expected.reward[n]
        assert torch.equal(step.obs["state"][n], expected.obs["state"][n])
    assert env.nan_count == 1
    assert sum("nan" in record.message for record in caplog.records) == 1
    assert env.step(actions[2]).valid is None


def test_a_simulator_that_never_resets_to_numbers_is_reported() -> None:
    def corrupt(ids: Any, state: Any, reward: Any) -> None:
        state[(ids == 2) & (state[:, 0] >= 0), 1] = np.nan

    with pytest.raises(RuntimeError, match=r"envs \[2\].*NaN"):
        chunk_env(ToySimulator(3, corrupt=corrupt)).reset()


def test_a_nan_at_a_reset_is_tried_again() -> None:
    def corrupt(ids: Any, state: Any, reward: Any) -> None:
        state[(ids == 2) & (state[:, 0] == 0)] = np.nan

    env = chunk_env(ToySimulator(3, corrupt=corrupt))
    assert env.reset()["state"][:, -1, 0].tolist() == [0, 0, 1]
    assert env.nan_count == 1


def test_wrong_actions_are_refused() -> None:
    env = chunk_env(ToySimulator(3))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(torch.zeros(3, 4, 2))
    env.reset()
    with pytest.raises(ValueError, match=r"\(3, 4, 3\).*\(3, 4, 2\)"):
        env.step(torch.zeros(3, 4, 3))
    with pytest.raises(FloatingPointError, match="NaN"):
        env.step(torch.full((3, 4, 2), torch.nan))


def test_running_normalization_learns_in_training_only_and_is_part_of_the_state() -> None:
    """The policy sees observations by the statistics of all observations so far, final ones by the same statistics."""
    simulator = ToySimulator(8, done_at={0: [7]})
    running = Running(simulator.action_low, simulator.action_high, 3)
    env = chunk_env(simulator, running, obs_steps=1)
    evaluation = chunk_env(ToySimulator(8), running, obs_steps=1, training=False)
    env.reset()
    raw = [env.raw_obs["state"][:, -1]]
    for action in random_actions(env, 5):
        step = env.step(action)
        raw.append(env.raw_obs["state"][:, -1])
    seen = np.concatenate(raw)
    expected = ((raw[-1] - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8)).clip(-10, 10)
    np.testing.assert_allclose(step.obs["state"][:, 0], expected, rtol=1e-3, atol=1e-3)  # the start counts as 1e-4 rows

    learned = {name: value.clone() for name, value in running.state_dict().items()}
    evaluation.reset()
    evaluation.step(random_actions(evaluation, 1)[0])
    assert all(torch.equal(value, learned[name]) for name, value in running.state_dict().items())

    fresh = Running(simulator.action_low, simulator.action_high, 3)
    restored = chunk_env(ToySimulator(8, done_at={0: [7]}), fresh, obs_steps=1)
    assert torch.equal(restored.load_state_dict(env.state_dict())["state"], step.obs["state"])


def test_a_simulator_that_cannot_be_restored_starts_fresh_episodes(caplog: pytest.LogCaptureFixture) -> None:
    env = chunk_env(ToySimulator(2))
    env.reset()
    env.step(random_actions(env, 1)[0])

    def drift(ids: Any, state: Any, reward: Any) -> None:
        state[:, 2] += 1e-9 * (state[:, 1] > 0)

    restored = chunk_env(ToySimulator(2, corrupt=drift))
    with caplog.at_level(logging.WARNING):
        obs = restored.load_state_dict(env.state_dict())
    assert "fresh episodes" in caplog.text
    assert restored.restarted
    assert not env.restarted
    assert obs["state"][:, -1].tolist() == [[1, 0, 0]] * 2


def test_a_state_of_another_size_is_refused() -> None:
    env = chunk_env(ToySimulator(2))
    with pytest.raises(RuntimeError, match="reset"):
        env.state_dict()
    first = env.reset()
    with pytest.raises(UserError, match=r"env\.num_envs=3: the run has 2"):
        chunk_env(ToySimulator(3)).load_state_dict(env.state_dict())
    with pytest.raises(UserError, match=r"act_steps=4.*act_steps=5"):
        chunk_env(ToySimulator(2), act_steps=5).load_state_dict(env.state_dict())
    assert torch.equal(chunk_env(ToySimulator(2)).load_state_dict(env.state_dict())["state"], first["state"])
