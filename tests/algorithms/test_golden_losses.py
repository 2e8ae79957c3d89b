"""The losses of DPPO and of PPO with a Gaussian, their parts and gradients, against the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.advantage import normalize_advantage
from dppo_fast.algorithms.dppo import DPPO, DPPOConfig
from dppo_fast.algorithms.ppo import PPO, Batch, PPOConfig
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.kernels.denoise_step import LOG_PROB_RANGE, chunk_log_prob
from dppo_fast.policies.diffusion import DiffusionPolicy
from tests.golden_files import Case
from tests.golden_models import (
    check_gradients,
    diffusion_cases,
    diffusion_policy,
    gaussian_cases,
    gaussian_of,
    load_critic,
    observations,
    options,
)
from tests.tolerances import LOSS

COEFFICIENTS = {"ent_coef": 0.1, "vf_coef": 0.5}
"""Of the sum whose gradient the cases hold."""

PARTS = {
    "pg_loss": ("loss/policy", 1),
    "v_loss": ("loss/value", 1),
    "clipfrac": ("ppo/clip_fraction", 1),
    "approx_kl": ("ppo/approx_kl", 1),
    "ratio": ("ppo/ratio", 1),
    "entropy_loss": ("ppo/entropy", -1),
}
"""The reference's names -> ours, and the sign between them."""


def check_parts(ours: dict[str, Tensor], theirs: dict[str, Any]) -> None:
    for name, (key, sign) in PARTS.items():
        if name in theirs:
            LOSS.check(sign * ours[key], theirs[name], name)


def batch_of(case: Case, record: dict[str, Tensor]) -> Batch:
    advantage, returns, value = (case.tensor(f"in/{name}") for name in ("advantages", "returns", "oldvalues"))
    return Batch(observations(case), record, advantage, returns, value)


def loss_of(algorithm: PPO, batch: Batch, k: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch as one minibatch."""
    c = algorithm.config
    advantage = normalize_advantage(
        batch.advantage, c.norm_adv, c.clip_advantage_lower_quantile, c.clip_advantage_upper_quantile
    )
    return algorithm.loss(batch, torch.arange(len(k)), k, advantage)


def pairs(case: Case, policy: DiffusionPolicy) -> tuple[Batch, Tensor]:
    """The case's (decision, denoising step) pairs, as decisions of which nothing but step k [B] is filled in."""
    x, x_next, k, density = (
        case.tensor(f"in/{name}") for name in ("chains_prev", "chains_next", "denoising_inds", "oldlogprobs")
    )
    rows = torch.arange(len(k))
    chain = torch.full((len(k), policy.ft_steps + 1, *x.shape[1:]), torch.nan)
    chain[rows, k], chain[rows, k + 1] = x, x_next
    log_prob = torch.full((len(k), policy.ft_steps), torch.nan)
    log_prob[rows, k] = chunk_log_prob(density, policy.reward_horizon)
    return batch_of(case, {"chain": chain, "log_prob": log_prob}), k


def dppo_case(case: Case) -> tuple[DPPO, nn.ModuleDict]:
    """The algorithm, and what its gradients are named after."""
    weights = case.tensors("w/")
    policy, critic = diffusion_policy(case.cfg, weights), load_critic(weights)
    algorithm = DPPO(policy, critic, options(DPPOConfig, case.cfg, COEFFICIENTS), RolloutBuffer(1, 1))
    named = {"actor_ft": policy.actor_ft, "critic": critic, "eta": policy.eta}
    return algorithm, nn.ModuleDict({name: module for name, module in named.items() if module is not None})


@pytest.mark.parametrize("case", diffusion_cases("06_ppo_loss", "out/v_loss"))
def test_dppo_loss(case: Case) -> None:
    algorithm, named = dppo_case(case)
    loss, parts = loss_of(algorithm, *pairs(case, algorithm.policy))
    theirs = {**case.sub("out/"), **case.sub("sane/")}
    check_parts(parts, theirs)
    LOSS.check(algorithm.policy.entropy(observations(case)), theirs["eta"], "eta")
    loss.backward()
    check_gradients(case.tensors("grad/"), named)


@pytest.mark.parametrize("case", diffusion_cases("06_ppo_loss", "sane/pg_loss"))
def test_one_fine_tuned_step_is_clipped_with_the_last_steps_coefficient(case: Case) -> None:
    """Where the reference divides 0 by 0."""
    algorithm, named = dppo_case(case)
    LOSS.check(algorithm.clip_table[0], case["sane/clip_coef"])
    _, parts = loss_of(algorithm, *pairs(case, algorithm.policy))
    parts["loss/policy"].backward()
    check_gradients(case.tensors("sane/grad_pg/"), named)


@pytest.mark.parametrize("case", diffusion_cases("06_ppo_loss", "bc/loss"))
def test_dppo_behaviour_cloning_loss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, named = dppo_case(case)
    policy = algorithm.policy
    monkeypatch.setattr(policy, "randn", lambda *shape: case.tensor("bc/noise"))
    loss = policy.behaviour_cloning_loss(observations(case))
    LOSS.check(loss, case["bc/loss"])
    loss.backward()
    check_gradients(case.tensors("bc/grad/"), named)


def ppo_case(case: Case) -> tuple[PPO, nn.ModuleDict]:
    policy, critic = gaussian_of(case, clamp_log_prob=True), load_critic(case.tensors("w/"))
    algorithm = PPO(policy, critic, options(PPOConfig, case.cfg, COEFFICIENTS), RolloutBuffer(1, 1))
    return algorithm, nn.ModuleDict({"network": policy.actor_ft, "critic": critic})


@pytest.mark.parametrize("case", gaussian_cases("08_gaussian_gmm_ppo", "out/v_loss"))
def test_ppo_loss(case: Case) -> None:
    algorithm, named = ppo_case(case)
    log_prob = case.tensor("in/oldlogprobs").clamp(*LOG_PROB_RANGE)
    record = {"action": case.tensor("in/actions"), "log_prob": log_prob[:, None]}
    batch = batch_of(case, record)
    loss, parts = loss_of(algorithm, batch, torch.zeros(len(batch.advantage), dtype=torch.int64))
    check_parts(parts, case.sub("out/"))
    loss.backward()
    check_gradients(case.tensors("grad/"), named)


@pytest.mark.parametrize("case", gaussian_cases("08_gaussian_gmm_ppo", "bc_term/loss"))
def test_ppo_behaviour_cloning_loss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, named = ppo_case(case)
    policy = algorithm.policy
    monkeypatch.setattr(policy, "randn", lambda *shape: case.tensor("bc_term/noise")[0])
    loss = policy.behaviour_cloning_loss(observations(case))
    LOSS.check(loss, case["bc_term/loss"])
    loss.backward()
    check_gradients(case.tensors("bc_term/grad/"), named)
