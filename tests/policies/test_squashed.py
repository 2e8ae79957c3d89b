"""The squashed Gaussian against the density that follows from its definition."""

from __future__ import annotations

import pytest
import torch

from dppo_fast.policies.gaussian import GaussianConfig
from dppo_fast.types import UserError
from tests.algorithms.off_policy import squashed_policy
from tests.small import ACTION_DIM, HORIZON, observations, seeded


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, HORIZON, ACTION_DIM, generator=seeded(7))


def test_log_prob_is_that_of_the_transformed_normal() -> None:
    policy, obs = squashed_policy(), observations(6)
    action, log_prob = policy.sample_scored(obs, noise(6))
    mean, std = policy.actor_ft(obs)
    density = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, std), torch.distributions.TanhTransform()
    )
    expected = density.log_prob(action.flatten(1))
    torch.testing.assert_close(log_prob, expected.sum(-1), rtol=1e-3, atol=1e-3)
    scored = policy.log_prob(obs, {"action": action}, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(scored, expected.mean(-1), rtol=1e-3, atol=1e-3)


def test_samples_are_those_of_act(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, obs = squashed_policy(), observations(6)
    monkeypatch.setattr(policy, "draw_noise", lambda batch, draws: noise(batch)[None])
    act = policy.act(obs)
    action, log_prob = policy.sample_scored(obs, noise(6))
    torch.testing.assert_close(act.action, action)
    torch.testing.assert_close(act.record["log_prob"][:, 0], log_prob / (HORIZON * ACTION_DIM), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(policy.act(obs, deterministic=True).action.flatten(1), policy.actor_ft(obs)[0].tanh())


def test_draws_are_bounded() -> None:
    policy, obs = squashed_policy(), observations(6)
    policy.config = GaussianConfig(randn_clip_value=0.5)
    far, near = (policy.sample_scored(obs, torch.full((6, HORIZON, ACTION_DIM), z))[0] for z in (9.0, 0.5))
    torch.testing.assert_close(far, near)


def test_a_saturated_action_has_a_finite_density_and_gradient() -> None:
    policy, obs = squashed_policy(), observations(6)
    policy.config = GaussianConfig(randn_clip_value=1000.0)
    action, log_prob = policy.sample_scored(obs, torch.full((6, HORIZON, ACTION_DIM), 100.0))
    assert (action == 1).any()
    scored = policy.log_prob(obs, {"action": torch.ones_like(action)}, torch.zeros(6, dtype=torch.int64))
    (log_prob.sum() + scored.sum() + action.sum()).backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(scored).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.actor_ft.parameters())


def test_its_entropy_has_no_closed_form() -> None:
    with pytest.raises(UserError, match="ent_coef"):
        squashed_policy().entropy(observations(2))
