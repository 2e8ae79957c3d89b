"""What DPPO adds to PPO: denoising steps as decisions, their discounts and clip ranges, and what is annealed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dppo_fast.algorithms.dppo import DPPO
from dppo_fast.networks.eta import Eta, EtaAction, EtaFixed
from dppo_fast.networks.mlp import DiffusionMLP
from dppo_fast.optim import LRConfig
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from tests.small import (
    algorithm,
    collector,
    diffusion_policy,
    distance,
    learn_bandit,
    observations,
    rollout,
    seeded,
    toy_env,
    weights,
)

S = 4
DDIM = {"denoising_steps": 20, "ddim_steps": S}


def dppo(policy: DiffusionPolicy, **config: Any) -> DPPO:
    learner = algorithm(policy, rollout(policy), **config)
    assert isinstance(learner, DPPO)
    return learner


@pytest.mark.parametrize("F", [2, 3, S])
def test_clip_ranges_and_discounts_of_the_denoising_steps(F: int) -> None:
    options = {"clip_ploss_coef": 0.2, "clip_ploss_coef_base": 0.01, "clip_ploss_coef_rate": 2.5}
    learner = dppo(diffusion_policy(ft_denoising_steps=F), gamma_denoising=0.9, **options)
    clips = [0.01 + 0.19 * (math.exp(2.5 * i / (F - 1)) - 1) / (math.exp(2.5) - 1) for i in range(F)]
    torch.testing.assert_close(learner.clip_table, torch.tensor(clips))
    torch.testing.assert_close(learner.discount_table, torch.tensor([0.9 ** (F - 1 - i) for i in range(F)]))


def test_one_fine_tuned_step_is_clipped_at_the_coefficient() -> None:
    """Where the reference divides 0 by 0."""
    policy = diffusion_policy(ft_denoising_steps=1)
    learner = dppo(policy, clip_ploss_coef=0.2, clip_ploss_coef_base=0.01)
    assert learner.clip_table.tolist() == [pytest.approx(0.2)]
    assert learner.discount_table.tolist() == [1]
    before = weights(policy.actor_ft)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in learner.update(0).values())
    assert distance(weights(policy.actor_ft), before) > 1e-3


def test_all_steps_may_be_fine_tuned() -> None:
    policy = diffusion_policy(ft_denoising_steps=S)
    base, tuned = weights(policy.actor), weights(policy.actor_ft)
    learner = dppo(policy)
    assert learner.buffer.record["chain"].shape[2] == S + 1
    learner.update(0)
    assert distance(weights(policy.actor), base) == 0
    assert distance(weights(policy.actor_ft), tuned) > 1e-3


class TestAnnealing:
    """F falls by d every t iterations."""

    def test_goes_down_to_one_and_rebuilds_the_tables(self) -> None:
        policy = diffusion_policy(ft_denoising_steps=S)
        learner = dppo(policy, ft_denoising_steps_d=2, ft_denoising_steps_t=3)
        seen = []
        for iteration in range(12):
            seen.append(policy.ft_steps)
            learner.after_update(iteration)
            assert len(learner.clip_table) == len(learner.discount_table) == policy.ft_steps
        assert seen == [4, 4, 4, 2, 2, 2, 1, 1, 1, 1, 1, 1]

    def test_training_goes_on(self) -> None:
        policy = diffusion_policy(ft_denoising_steps=3)
        env = toy_env()
        collect = collector(env, policy).collect
        learner = dppo(policy, ft_denoising_steps_d=1, ft_denoising_steps_t=1)
        for iteration, F in enumerate((3, 2, 1, 1)):
            collect(learner.buffer)
            record = learner.buffer.record
            assert policy.ft_steps == F
            assert record["chain"].shape[2] == F + 1
            assert record["log_prob"].shape[2] == F
            base, tuned = weights(policy.actor), weights(policy.actor_ft)
            metrics = learner.update(iteration)
            assert distance(weights(policy.actor_ft), tuned) > 1e-3
            assert float(metrics["ppo/first_clip_fraction"]) == 0
            if policy.ft_steps < F:
                assert distance(weights(policy.actor), weights(policy.actor_ft)) == 0
            else:
                assert distance(weights(policy.actor), base) == 0

    def test_is_restored(self) -> None:
        policy, fresh = diffusion_policy(ft_denoising_steps=3), diffusion_policy(ft_denoising_steps=3)
        options = {"ft_denoising_steps_d": 1, "ft_denoising_steps_t": 1, "min_sampling_denoising_std_final": 0.05}
        learner, other = dppo(policy, **options), dppo(fresh, **options)
        learner.update(0)
        other.load_state_dict(learner.state_dict())
        assert fresh.ft_steps == policy.ft_steps == 2
        assert fresh.min_sampling_std == policy.min_sampling_std == 0.05
        assert other.clip_table.equal(learner.clip_table)


def test_the_sampling_stds_floor_moves_linearly() -> None:
    policy = diffusion_policy(min_sampling_denoising_std=0.1)
    learner = dppo(policy, min_sampling_denoising_std_final=0.02, min_sampling_denoising_std_iterations=4)
    floors = []
    for iteration in range(6):
        floors.append(policy.min_sampling_std)
        learner.after_update(iteration)
    assert floors == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.02])


class TestEta:
    @pytest.mark.parametrize("make", [lambda: EtaFixed(0.6), lambda: EtaAction(2, 0.6)])
    def test_learns_where_it_is_asked_to(self, make: Callable[[], Eta]) -> None:
        for learn_eta in (False, True):
            policy = diffusion_policy(make(), learn_eta=learn_eta, **DDIM)
            assert policy.eta is not None
            before = weights(policy.eta)
            dppo(policy).update(0)
            assert (distance(weights(policy.eta), before) > 0) == learn_eta

    def test_ent_coef_raises_it(self) -> None:
        """With nothing else in the loss, eta grows, and not before the critic's warm-up is over."""
        policy = diffusion_policy(EtaFixed(0.6), learn_eta=True, **DDIM)
        learner = dppo(policy, ent_coef=1.0, n_critic_warmup_itr=1, norm_adv=False, reward_scale_const=1e-9)
        assert float(learner.update(0)["ppo/entropy"]) == pytest.approx(0.6, abs=1e-6)
        assert policy.entropy(observations(2)).item() == pytest.approx(0.6, abs=1e-6)
        learner.update(1)
        assert policy.entropy(observations(2)).item() > 0.6

    def test_steps_at_every_so_many_minibatches_of_an_epoch(self) -> None:
        policy = diffusion_policy(EtaFixed(0.6), learn_eta=True, **DDIM)
        learner = dppo(policy, eta_update_interval=3, batch_size=16, update_epochs=2)  # 64 pairs: 4 minibatches
        steps = []
        step = learner.trainables["eta"].step
        learner.trainables["eta"].step = lambda skip: step(skip) or steps.append(skip)
        learner.update(0)
        assert len(steps) == 2 * 2


def test_a_diffusion_policy_learns() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiffusionMLP(2, 1, cond_dim=1, mlp_dims=(32, 32, 32), residual_style=True)
        policy = DiffusionPolicy(network, DiffusionConfig(denoising_steps=S, ft_denoising_steps=S), 1, 2)
    policy.generator = seeded(0)
    clip = {"clip_ploss_coef": 0.2, "clip_ploss_coef_base": 0.2}
    rate = LRConfig(min_lr=3e-3)
    before, after = learn_bandit(policy, 12, batch_size=64, update_epochs=4, actor_lr_scheduler=rate, **clip)
    assert before < -1
    assert after > -0.3
