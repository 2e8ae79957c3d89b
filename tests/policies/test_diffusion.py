from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dppo_fast.networks.eta import Eta, EtaAction, EtaFixed, EtaState, EtaStateAction
from dppo_fast.policies.diffusion import DiffusionPolicy
from dppo_fast.types import NoiseStream, Obs, UserError
from tests.small import ACTION_DIM, HORIZON, diffusion_policy, distance, observations, weights

S, B = 4, 6
DDIM = {"denoising_steps": 20, "ddim_steps": S}
ETAS: dict[str, Callable[[], Eta]] = {
    "fixed": lambda: EtaFixed(0.6),
    "action": lambda: EtaAction(ACTION_DIM, 0.6),
    "state": lambda: EtaState(6, [8], base_eta=0.6),
    "state_action": lambda: EtaStateAction(6, ACTION_DIM, [8], base_eta=0.6),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rescored(policy: DiffusionPolicy, obs: Obs, record: dict[str, Tensor]) -> Tensor:
    """Log-probs [B, F] of a record, as the update computes them."""
    row = torch.arange(B).repeat_interleave(policy.decisions)
    k = torch.arange(policy.decisions).repeat(B)
    part = policy.select(record, row, k)
    return policy.log_prob({"state": obs["state"][row]}, part, k).view(B, policy.decisions)


@pytest.mark.parametrize("F", range(1, S + 1))
@pytest.mark.parametrize("options", [{}, DDIM, {**DDIM, "eps_clip_value": 0.5, "final_action_clip_value": 0.3}])
def test_the_sampler_emits_what_the_update_computes(F: int, options: dict[str, Any]) -> None:
    policy, obs = diffusion_policy(ft_denoising_steps=F, reward_horizon=2, **options), observations(B)
    act = policy.act(obs)
    assert act.record["chain"].shape == (B, F + 1, HORIZON, ACTION_DIM)
    assert act.record["chain"][:, -1].equal(act.action)
    assert len(act.record["log_prob"].unique()) == B * F
    torch.testing.assert_close(act.record["log_prob"], rescored(policy, obs, act.record), rtol=0, atol=1e-5)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS.keys())
def test_the_same_with_every_eta(eta: Callable[[], Eta], learn: bool) -> None:
    policy, obs = diffusion_policy(eta(), learn_eta=learn, **DDIM), observations(B)
    act = policy.act(obs)
    log_prob = rescored(policy, obs, act.record)
    torch.testing.assert_close(act.record["log_prob"], log_prob, rtol=0, atol=1e-5)
    log_prob.sum().backward()
    assert policy.eta is not None
    gradients = [parameter.grad for parameter in policy.eta.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients) == learn
    assert all(gradient is None for gradient in gradients) == (not learn)


@pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS.keys())
def test_eta_changes_the_chain_and_nothing_deterministic(eta: Callable[[], Eta]) -> None:
    obs, options = observations(B), {**DDIM, "min_sampling_denoising_std": 0.0}
    policy, plain = diffusion_policy(eta(), **options), diffusion_policy(**options)
    assert not policy.act(obs).action.allclose(plain.act(obs).action, atol=1e-3)
    assert policy.act(obs, deterministic=True).action.equal(plain.act(obs, deterministic=True).action)


def test_the_base_policy_is_frozen_and_used_early() -> None:
    policy, obs = diffusion_policy(ft_denoising_steps=2), observations(B)
    rescored(policy, obs, policy.act(obs).record).sum().backward()
    assert all(parameter.grad is None for parameter in policy.actor.parameters())
    assert all(parameter.grad is not None for parameter in policy.actor_ft.parameters())
    noise = policy.draw_noise(B, S + 1)
    base = policy.sample(obs, noise, score=True, base_policy=True)
    tuned = policy.sample(obs, noise, score=True)
    assert base.points is not None
    assert tuned.points is not None
    torch.testing.assert_close(base.points[:, 0], tuned.points[:, 0])
    assert not base.action.allclose(tuned.action, atol=1e-3)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_policy_without_fine_tuned_steps_acts(deterministic: bool) -> None:
    policy = diffusion_policy(ft_denoising_steps=0)
    act = policy.act(observations(B), deterministic)
    assert act.action.shape == (B, HORIZON, ACTION_DIM)
    assert act.record == {}


@pytest.mark.parametrize("std", [1, 1.0])
def test_stds_may_be_integers(std: float) -> None:
    options = {"min_sampling_denoising_std": std, "min_logprob_denoising_std": std}
    policy, obs = diffusion_policy(**options), observations(B)
    act = policy.act(obs)
    torch.testing.assert_close(act.record["log_prob"], rescored(policy, obs, act.record), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, DDIM])
def test_min_sampling_std_holds_at_the_last_step_too(options: dict[str, int]) -> None:
    policy = diffusion_policy(min_sampling_denoising_std=0.25, **options)
    obs = observations(B)
    one, other = policy.draw_noise(B, S + 1), policy.draw_noise(B, S + 1)
    other[:-1] = one[:-1]
    moved = policy.sample(obs, one).action - policy.sample(obs, other).action
    torch.testing.assert_close(moved, 0.25 * (one[-1] - other[-1]), rtol=1e-4, atol=1e-5)


def test_reward_horizon_is_the_part_of_the_chunk_that_is_scored() -> None:
    obs = observations(B)
    short, whole = diffusion_policy(reward_horizon=1), diffusion_policy(reward_horizon=None)
    a, b = short.act(obs), whole.act(obs)
    assert a.action.equal(b.action)
    later = {"chain": a.record["chain"].clone(), "log_prob": a.record["log_prob"]}
    later["chain"][:, -1, 1:] += 0.3
    assert rescored(short, obs, later).allclose(a.record["log_prob"], atol=1e-5)
    assert not rescored(whole, obs, later).allclose(b.record["log_prob"], atol=1e-2)


def test_all_randomness_comes_from_the_noise_stream() -> None:
    policy, obs = diffusion_policy(), observations(B)
    policy.noise = NoiseStream(1, step=4)
    first = policy.act(obs).action
    policy.noise = NoiseStream(1, step=4)
    before = torch.get_rng_state()
    again = policy.act(obs).action
    assert torch.get_rng_state().equal(before)
    assert policy.noise == NoiseStream(1, step=5)
    assert again.equal(first)
    assert not policy.act(obs).action.equal(first)


def test_an_env_gets_the_same_noise_in_every_batch() -> None:
    policy = diffusion_policy()
    policy.noise = NoiseStream(1)
    few = policy.draw_noise(2, S + 1)
    policy.noise = NoiseStream(1)
    assert policy.draw_noise(B, S + 1)[:, :2].equal(few)


def test_entropy_is_the_mean_eta() -> None:
    obs = observations(B)
    assert float(diffusion_policy().entropy(obs)) == 1.0
    assert float(diffusion_policy(EtaFixed(0.6), **DDIM).entropy(obs)) == pytest.approx(0.6)
    policy = diffusion_policy(EtaState(6, [8], base_eta=0.6), **DDIM)
    assert policy.eta is not None
    assert float(policy.entropy(obs)) == pytest.approx(float(policy.eta(obs).mean()))


def test_the_pre_training_loss_is_that_of_predicting_the_noise() -> None:
    policy, obs = diffusion_policy(ft_denoising_steps=0), observations(B)
    action, noise = policy.randn(B, HORIZON, ACTION_DIM), policy.randn(B, HORIZON, ACTION_DIM)
    t = torch.arange(B) % S
    x = policy.schedule.add_noise(action, t, noise)
    expected = (policy.actor(x, t, obs) - noise).square().mean()
    torch.testing.assert_close(policy.denoising_loss(obs, action, t, noise), expected)
    assert torch.isfinite(policy.cloning_loss(obs, action))


def test_fewer_fine_tuned_steps_leave_the_policy_as_it_is() -> None:
    """The steps given up keep the fine-tuned weights, so the chain from one noise stays the same."""
    policy, obs = diffusion_policy(ft_denoising_steps=S), observations(B)
    noise, trained = policy.draw_noise(B, S + 1), weights(policy.actor_ft)
    tensors = list(policy.actor_ft.parameters())
    before = policy.sample(obs, noise).action
    policy.set_ft_steps(1)
    assert policy.decisions == 1
    torch.testing.assert_close(policy.sample(obs, noise).action, before)
    assert distance(weights(policy.actor), trained) == 0
    assert all(now is then for now, then in zip(policy.actor_ft.parameters(), tensors, strict=True))
    assert not any(parameter.requires_grad for parameter in policy.actor.parameters())
    with pytest.raises(ValueError, match="between 1 and the present 1"):
        policy.set_ft_steps(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ft_denoising_steps": 5}, "ft_denoising_steps=5 must lie between 0 and the 4"),
        ({"ddim_steps": 9}, "ddim_steps=9 must lie between 1 and denoising_steps=4"),
        ({"learn_eta": True}, "learn_eta=true needs DDIM"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        diffusion_policy(**options)
