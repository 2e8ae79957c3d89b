from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributions import Normal

from dppo_fast.policies.gaussian import GaussianConfig, GaussianPolicy
from tests.small import ACTION_DIM, HORIZON, gaussian_policy, observations, perturb, seeded

B = 6
STDS: dict[str, dict[str, Any]] = {
    "fixed": {"fixed_std": 0.3},
    "learned": {"fixed_std": 0.3, "learn_fixed_std": True},
    "network": {"fixed_std": None},
}


@pytest.fixture(params=STDS.values(), ids=STDS.keys())
def policy(request: pytest.FixtureRequest) -> GaussianPolicy:
    return gaussian_policy(**request.param)


def test_acting_and_scoring_agree_with_torchs_normal(policy: GaussianPolicy) -> None:
    obs = observations(B)
    act = policy.act(obs)
    assert act.action.shape == (B, HORIZON, ACTION_DIM)
    mean, std = policy.actor_ft(obs)
    policy.noise.step -= 1
    noise = policy.draw_noise(B, 1).view_as(mean)
    torch.testing.assert_close(act.action.flatten(1), mean + std * noise)
    expected = Normal(mean, std).log_prob(act.action.flatten(1)).mean(-1)
    torch.testing.assert_close(act.record["log_prob"][:, 0], expected)
    row, k = torch.tensor([4, 0]), torch.zeros(2, dtype=torch.int64)
    again = policy.log_prob({"state": obs["state"][row]}, policy.select(act.record, row, k), k)
    torch.testing.assert_close(again, expected[row])
    torch.testing.assert_close(policy.entropy(obs), Normal(mean, std).entropy().mean())


def test_deterministic_actions_are_the_mean(policy: GaussianPolicy) -> None:
    obs = observations(B)
    act = policy.act(obs, deterministic=True)
    assert act.record == {}
    assert act.action.flatten(1).equal(policy.actor_ft(obs)[0])


def test_draws_are_bounded() -> None:
    policy, obs = gaussian_policy(), observations(B)
    bounded = GaussianPolicy(policy.actor_ft, GaussianConfig(randn_clip_value=0.1), HORIZON, ACTION_DIM)
    mean, std = policy.actor_ft(obs)
    assert ((bounded.act(obs).action.flatten(1) - mean) / std).abs().max() <= 0.1 + 1e-5


def test_losses_train_the_fine_tuned_network_only(policy: GaussianPolicy) -> None:
    obs = observations(B)
    perturb(policy.actor_ft, 0.1)
    action = policy.randn(B, HORIZON, ACTION_DIM)
    mean, std = policy.actor_ft(obs)
    supervised = policy.cloning_loss(obs, action)
    torch.testing.assert_close(supervised, -Normal(mean, std).log_prob(action.flatten(1)).mean())

    base_mean, base_std = policy.actor(obs)
    policy.generator = seeded(9)
    drawn = base_mean + base_std * torch.randn(base_mean.shape, generator=seeded(9))
    to_base = policy.behaviour_cloning_loss(obs)
    torch.testing.assert_close(to_base, -Normal(mean, std).log_prob(drawn).mean())

    (supervised + to_base).backward()
    assert all(parameter.grad is None for parameter in policy.actor.parameters())
    assert any(parameter.grad is not None for parameter in policy.actor_ft.parameters())
