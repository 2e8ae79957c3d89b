from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dppo_fast import advantage as module
from dppo_fast.advantage import estimate_advantages, evaluate_critic, normalize_advantage
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.types import Obs
from tests.small import critic, gaussian_policy, observations, rollout, seeded

GAMMA, LAM = 0.9, 0.8


class TimeCritic(nn.Module):
    """V = 1 + the number of steps taken in the episode, which the toy environment shows."""

    def forward(self, obs: Obs) -> Tensor:
        return 1 + obs["state"][:, -1, 1]


@pytest.fixture
def toy_rollout() -> RolloutBuffer:
    """Chunks of 4 steps: a first episode terminates after 5 steps, a second one is cut by its time limit after 9."""
    buffer = rollout(gaussian_policy(), steps=8)
    assert buffer.terminated[:, 0].nonzero().flatten().tolist() == [1]
    assert buffer.truncated[:, 0].nonzero().flatten().tolist() == [4]
    return buffer


def by_hand(buffer: RolloutBuffer, following: list[float], ended: list[bool]) -> list[float]:
    """The advantages of env 0 with V(s_{t+1}) as given."""
    values = [0, 4, 0, 4, 8, 0, 4, 8]
    result, carry = [], 0.0
    for t in reversed(range(8)):
        delta = float(buffer.reward[t, 0]) + GAMMA * following[t] - (1 + values[t])
        carry = delta if ended[t] else delta + GAMMA * LAM * carry
        result.append(carry)
    return result[::-1]


def test_a_time_limit_bootstraps_from_the_final_observation(toy_rollout: RolloutBuffer) -> None:
    """The value at a time limit is that of the episode's last observation, not 0 and not the next episode's."""
    following = [5.0, 0.0, 5.0, 9.0, 10.0, 5.0, 9.0, 13.0]  # 10: after the 9 steps of the truncated episode
    ended = [False, True, False, False, True, False, False, False]
    result = estimate_advantages(toy_rollout, TimeCritic(), toy_rollout.reward, GAMMA, LAM)
    torch.testing.assert_close(result.advantage[:, 0], torch.tensor(by_hand(toy_rollout, following, ended)))
    torch.testing.assert_close(result.returns, result.advantage + result.value)


def test_the_references_way_runs_into_the_next_episode(toy_rollout: RolloutBuffer) -> None:
    following = [5.0, 0.0, 5.0, 9.0, 1.0, 5.0, 9.0, 13.0]  # 1: the first observation after the reset
    ended = [False, True, False, False, False, False, False, False]
    ours, theirs = (
        estimate_advantages(toy_rollout, TimeCritic(), toy_rollout.reward, GAMMA, LAM, bootstrap_truncated).advantage
        for bootstrap_truncated in (True, False)
    )
    torch.testing.assert_close(theirs[:, 0], torch.tensor(by_hand(toy_rollout, following, ended)))
    assert not theirs[2:5].isclose(ours[2:5]).any()
    torch.testing.assert_close(theirs[5:], ours[5:])
    torch.testing.assert_close(theirs[:2], ours[:2])


def test_a_rollout_without_an_end() -> None:
    buffer = rollout(gaussian_policy(), steps=1)
    assert not buffer.final
    result = estimate_advantages(buffer, TimeCritic(), buffer.reward, GAMMA, LAM)
    torch.testing.assert_close(result.advantage[0], buffer.reward[0] + GAMMA * 5 - 1)


def test_the_critic_sees_everything_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller ones where there are images."""
    value, obs = critic(), observations(10)
    whole = evaluate_critic(value, obs)
    assert whole.shape == (10,)
    assert not whole.requires_grad
    monkeypatch.setattr(module, "CRITIC_BATCH", 4)
    monkeypatch.setattr(module, "IMAGE_CRITIC_BATCH", 3)
    seen: list[int] = []
    value.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]["state"])))
    torch.testing.assert_close(evaluate_critic(value, obs), whole)
    torch.testing.assert_close(evaluate_critic(value, obs | {"rgb": torch.zeros(10, 2)}), whole)
    assert seen == [4, 4, 2, 3, 3, 3, 1]


def test_values_are_without_dropout() -> None:
    value, obs = critic(), observations(10)
    value.Q1.moduleList.insert(1, nn.Dropout(0.5))
    assert evaluate_critic(value, obs).equal(evaluate_critic(value, obs))
    assert not value(obs).equal(value(obs))


def test_normalising_and_clipping_to_quantiles() -> None:
    raw = 3 + 2 * torch.randn(101, generator=seeded(0))
    standard = (raw.double().numpy() - raw.double().mean().item()) / (raw.double().numpy().std(ddof=1) + 1e-8)
    np.testing.assert_allclose(normalize_advantage(raw, True, 0.0, 1.0), standard, rtol=1e-4, atol=1e-5)
    low, high = np.quantile(standard, [0.1, 0.8])
    clipped = normalize_advantage(raw, True, 0.1, 0.8)
    np.testing.assert_allclose(clipped, standard.clip(low, high), rtol=1e-4, atol=1e-5)
    assert normalize_advantage(raw, False, 0.0, 1.0).equal(raw)
    bounds = raw.quantile(0.25), raw.quantile(0.75)
    assert normalize_advantage(raw, False, 0.25, 0.75).equal(raw.clamp(*bounds))
    assert normalize_advantage(raw, False, 0.25, 1.0).equal(raw.clamp(min=bounds[0]))
    assert normalize_advantage(raw, False, 0.0, 0.75).equal(raw.clamp(max=bounds[1]))


def test_equal_advantages_are_not_blown_up() -> None:
    tiny = torch.tensor([1e-8, -1e-8])
    expected = tiny / (2**0.5 * 1e-8 + 1e-8)
    torch.testing.assert_close(normalize_advantage(tiny, True, 0.0, 1.0), expected)
    assert normalize_advantage(torch.ones(3), True, 0.0, 1.0).tolist() == [0.0] * 3
