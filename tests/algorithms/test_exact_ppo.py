"""PPO with exact likelihoods: its loss is the reference's, and a flow's decisions are scored as they were made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dppo_fast.advantage import normalize_advantage
from dppo_fast.algorithms.exact_ppo import ExactPPO, ExactPPOConfig
from dppo_fast.algorithms.ppo import Batch
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.policies.probability_flow import FlowPolicy, FlowPolicyConfig
from dppo_fast.types import NoiseStream, UserError
from tests.golden_files import Case
from tests.golden_flows import flow_cases, flow_policy, probes
from tests.golden_models import check_gradients, load_critic, observations, options
from tests.small import ACTION_DIM, HORIZON, critic, diffusion_policy, distance, rollout, seeded, weights
from tests.small import observations as random_observations
from tests.tolerances import LOSS

PARTS = {
    "pg_loss": "loss/policy",
    "v_loss": "loss/value",
    "clipfrac": "ppo/clip_fraction",
    "approx_kl": "ppo/approx_kl",
    "ratio": "ppo/ratio",
}
"""The reference's names -> ours."""


def small_flow(reference: bool = False, **config: Any) -> FlowPolicy:
    """S = 4, F = 2 unless told otherwise; the fine-tuned network differs from the base."""
    start = diffusion_policy(**{"ft_denoising_steps": 2, **config})
    settings = FlowPolicyConfig(**vars(start.config) | {"sde_step_size": 0.125})
    policy = FlowPolicy(start.actor.requires_grad_(), settings, HORIZON, ACTION_DIM, reference=reference)
    policy.load_state_dict(start.state_dict())
    policy.generator, policy.noise = seeded(1), NoiseStream(2)
    return policy


def learner(policy: FlowPolicy, **config: Any) -> ExactPPO:
    settings = ExactPPOConfig(**{"batch_size": 16, "update_epochs": 2, **config})
    result = ExactPPO(policy, critic(), settings, rollout(policy))
    result.generator = seeded(4)
    return result


@pytest.mark.parametrize("case", flow_cases("loss/pg_loss"))
def test_loss(case: Case) -> None:
    policy, value = flow_policy(case), load_critic(case.tensors("w/"))
    algorithm = ExactPPO(policy, value, options(ExactPPOConfig, case.cfg, {"vf_coef": 0.5}), RolloutBuffer(1, 1))
    record = {
        "action": case.tensor("in/samples"),
        "probes": probes(case, "loss"),
        "log_prob": case.tensor("loss/oldlogprobs")[:, None],
    }
    advantage, returns, old = (case.tensor(f"loss/{name}") for name in ("advantages", "returns", "oldvalues"))
    batch = Batch(observations(case), record, advantage, returns, old)
    row = torch.arange(len(advantage))
    loss, parts = algorithm.loss(batch, row, torch.zeros_like(row), normalize_advantage(advantage, True, 0, 1))
    for name, key in PARTS.items():
        LOSS.check(parts[key], case[f"loss/{name}"], name)
    loss.backward()
    check_gradients(case.tensors("loss/grad/"), nn.ModuleDict({"actor_ft": policy.actor_ft, "critic": value}))


@pytest.mark.parametrize("reference", [False, True])
def test_decisions_are_scored_again_as_when_they_were_made(reference: bool) -> None:
    """With the same probes: a ratio of 1 before the first step, whichever rows make the minibatch."""
    policy = small_flow(reference)
    algorithm = learner(policy)
    first = algorithm.update(0)
    assert policy.decisions == 1
    assert float(first["ppo/first_clip_fraction"]) == 0
    obs = random_observations(6)
    record = policy.act(obs).record
    row = torch.tensor([4, 1, 1])
    part = policy.select(record, row, torch.zeros_like(row))
    log_prob = policy.log_prob({name: value[row] for name, value in obs.items()}, part, torch.zeros_like(row))
    torch.testing.assert_close(log_prob, record["log_prob"][row, 0])


@pytest.mark.parametrize("reference", [False, True])
def test_noise_decides_alone(reference: bool) -> None:
    """Under the reference's flag actions are the chain's, whose every step draws."""
    policy, obs = small_flow(reference), random_observations(5)
    decided = policy.act(obs)
    policy.noise = NoiseStream(2)
    deterministic = policy.act(obs, deterministic=True)
    assert decided.action.equal(deterministic.action) != reference
    assert decided.record["action"].equal(decided.action)
    assert deterministic.record == {}


@pytest.mark.parametrize("steps", [{}, {"ft_denoising_steps": 4}, {"denoising_steps": 20, "ddim_steps": 5}])
def test_only_the_fine_tuned_network_learns(steps: dict[str, int]) -> None:
    policy = small_flow(**steps)
    base, tuned = weights(policy.actor), weights(policy.actor_ft)
    metrics = learner(policy).update(0)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())
    assert distance(weights(policy.actor), base) == 0
    assert distance(weights(policy.actor_ft), tuned) > 0


@pytest.mark.parametrize(
    ("steps", "last"),
    [
        ({"ft_denoising_steps": 4}, 2.0),
        ({"ft_denoising_steps": 2}, 0.5),
        ({"ft_denoising_steps": 0}, None),
        ({"denoising_steps": 20, "ddim_steps": 5, "ft_denoising_steps": 2}, 1.5),
    ],
)
def test_the_flow_changes_networks_where_the_chain_does(steps: dict[str, int], last: float | None) -> None:
    """``last``: timestep at which the fine-tuned network's last step towards noise begins. That is an eighth of t long
    and ends at the moment of the timestep that the chain fine-tunes first.
    """
    path = small_flow(**steps).flow.to_noise
    tuned = path.label[: sum(path.tuned)]
    assert path.tuned == sorted(path.tuned, reverse=True)
    assert (float(tuned[-1]) if len(tuned) else None) == (None if last is None else pytest.approx(last, abs=1e-5))


def test_the_cloning_term_draws_towards_the_base_policy() -> None:
    policy = small_flow()
    optimizer = torch.optim.Adam(policy.actor_ft.parameters(), 1e-2)
    obs, losses = random_observations(64), []
    for _ in range(12):
        policy.generator = seeded(1)
        loss = policy.behaviour_cloning_loss(obs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_an_entropy_bonus_is_refused() -> None:
    with pytest.raises(UserError, match=r"algorithm\.ent_coef=0\.1 must lie in"):
        ExactPPOConfig(ent_coef=0.1)
