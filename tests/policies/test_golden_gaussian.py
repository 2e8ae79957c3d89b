"""What the Gaussian policy samples and how it scores actions, against the reference's."""

from __future__ import annotations

import pytest
import torch

from dppo_fast.policies.gaussian import GaussianPolicy
from tests.golden_files import Case
from tests.golden_models import DETERMINISTIC_STD, gaussian_cases, gaussian_of, observations
from tests.tolerances import LOG_PROB, LOSS, SAMPLE

CASES = gaussian_cases("08_gaussian_gmm_ppo")


def base_policy(case: Case) -> GaussianPolicy:
    """The policy before fine-tuning, from which the cases' samples are."""
    policy = gaussian_of(case)
    policy.actor_ft = policy.actor
    return policy


@pytest.mark.parametrize("mode", ["stoch", "base"])
@pytest.mark.parametrize("case", CASES)
def test_actions(case: Case, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, obs, noise = base_policy(case), observations(case), case.tensor(f"sample_{mode}/noise")[0]
    monkeypatch.setattr(policy, "draw_noise", lambda batch, draws: noise)
    act = policy.act(obs)
    SAMPLE.check(act.action, case[f"sample_{mode}/actions"])
    scored = policy.log_prob(obs, {"action": act.action}, torch.zeros(len(noise), dtype=torch.int64))
    LOG_PROB.check(act.record["log_prob"], scored[:, None], "log-prob that the sampler emits")


@pytest.mark.parametrize("case", CASES)
def test_deterministic_actions(case: Case) -> None:
    bound = case.cfg["randn_clip_value"]
    noise = case.tensor("sample_det/noise")[0].clamp(-bound, bound)
    action = base_policy(case).act(observations(case), deterministic=True).action
    SAMPLE.check(action + DETERMINISTIC_STD * noise.view_as(action), case["sample_det/actions"])


@pytest.mark.parametrize("case", CASES)
def test_log_probs(case: Case) -> None:
    part, k = {"action": case.tensor("in/actions")}, torch.zeros(len(case["in/actions"]), dtype=torch.int64)
    LOG_PROB.check(gaussian_of(case).log_prob(observations(case), part, k), case["logprobs"])
    LOG_PROB.check(base_policy(case).log_prob(observations(case), part, k), case["logprobs_base"])


@pytest.mark.parametrize("case", CASES)
def test_cloning_loss(case: Case) -> None:
    """The supervised loss of pre-training: minus the mean log-density, and minus the weighted entropy."""
    policy, obs = gaussian_of(case), observations(case)
    loss, entropy = policy.cloning_loss(obs, case.tensor("in/actions")), policy.entropy(obs)
    LOSS.check(entropy, case["entropy"])
    LOSS.check(loss - float(case["bc/ent_coef"]) * entropy, case["bc/loss"])
    LOSS.check(policy.actor_ft(obs)[1].mean(), case["std"])
