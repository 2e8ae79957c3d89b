"""Chains that the diffusion policy samples, and their log-probs, against the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dppo_fast.kernels.denoise_step import chunk_log_prob
from dppo_fast.policies.diffusion import DiffusionPolicy
from dppo_fast.types import Obs
from tests.golden_files import Case
from tests.golden_models import diffusion_cases, diffusion_policy, observations, weights_of
from tests.tolerances import FORWARD, LOG_PROB, SAMPLE, log_densities


def check_eta(policy: DiffusionPolicy, obs: Obs, expected: Tensor) -> None:
    """Ours is [B, 1 or Da] or one number for all; the reference's is broadcast further."""
    eta = policy.eta_of(obs)
    ours = policy.entropy(obs) if eta is None else eta[:, None]
    FORWARD.check(ours.expand_as(expected), expected, "eta")


def check_log_density(policy: DiffusionPolicy, x: Tensor, density: Tensor, expected: ArrayLike) -> None:
    log_densities(x, expected, policy.min_log_prob_std).check(density, expected, "log-density")


@pytest.mark.parametrize("case", diffusion_cases("04_base_sampling") + diffusion_cases("04_eval_sampling"))
def test_evaluation(case: Case) -> None:
    """The reference's evaluation ignores its deterministic flag, where it does not fail."""
    policy = diffusion_policy(case.cfg, weights_of(case))
    for mode in ("", "det/", "stoch/"):
        if mode + "noise" in case:
            chain = policy.sample(observations(case), case.tensor(mode + "noise"), deterministic=True)
            SAMPLE.check(chain.action, case[mode + "trajectories"], mode)


def chains() -> list[Any]:
    """(case, mode): every chain of every case; stochastic, deterministic, or of the base policy at every step."""
    return [
        pytest.param(case, mode, id=f"{param.id}-{mode}", marks=param.marks)
        for param in diffusion_cases("04_ppo_sampling_logprobs")
        for case in param.values
        for mode in ("stoch", "det", "base")
        if f"{mode}/noise" in case
    ]


@pytest.mark.parametrize(("case", "mode"), chains())
def test_sampling_and_log_probs(case: Case, mode: str) -> None:
    policy = diffusion_policy(case.cfg, weights_of(case))
    obs, F = observations(case), policy.ft_steps
    theirs = case.case(mode)
    noise, points = theirs.tensor("noise"), theirs.tensor("chains")
    stochastic = mode != "det"
    chain = policy.sample(obs, noise, not stochastic, score=stochastic, base_policy=mode == "base")
    SAMPLE.check(chain.action, theirs["trajectories"], "action")

    k = torch.arange(F).repeat(len(points))
    repeated = {name: value.repeat_interleave(F, 0) for name, value in obs.items()}
    x, x_next = points[:, :-1].flatten(0, 1), points[:, 1:].flatten(0, 1)
    density = policy.log_density(repeated, x, x_next, k)
    base_density = policy.log_density(repeated, x, x_next, k, base_policy=True)
    check_log_density(policy, points, density, theirs["logprobs"])
    check_log_density(policy, points, base_density, theirs["logprobs_base"])
    check_eta(policy, repeated, theirs.tensor("eta"))

    if stochastic:
        SAMPLE.check(chain.points, points, "chain")
        scored = theirs.tensor("logprobs_base" if mode == "base" else "logprobs")
        expected = chunk_log_prob(scored, policy.reward_horizon).view(-1, F)
        LOG_PROB.check(chain.log_prob, expected, "log-prob that the sampler emits")


@pytest.mark.parametrize("case", diffusion_cases("05_logprobs_subsample"))
def test_log_probs_of_single_steps(case: Case) -> None:
    policy = diffusion_policy(case.cfg, weights_of(case))
    obs = observations(case)
    x, x_next, k = (case.tensor(f"in/{name}") for name in ("chains_prev", "chains_next", "denoising_inds"))
    check_log_density(policy, x_next, policy.log_density(obs, x, x_next, k), case["logprobs"])
    check_eta(policy, obs, case.tensor("eta"))
    if "logprobs_base" in case:
        base_density = policy.log_density(obs, x, x_next, k, base_policy=True)
        check_log_density(policy, x_next, base_density, case["logprobs_base"])
