"""Diffusion Q-learning: its losses against the reference's, and what it imitates and seeks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.dql import DQL, DQLConfig
from dppo_fast.replay import Transitions
from tests.algorithms.diffusion_q import golden, small
from tests.algorithms.off_policy import check_capturable, golden_transitions
from tests.golden_files import Case, golden_cases
from tests.golden_models import check_gradients
from tests.small import ACTION_DIM, HORIZON, observations, seeded
from tests.tolerances import LOSS

CASES = golden_cases("08_diffusion_q", lambda case: case.name.startswith("dql"))
CRITIC_CASES = golden_cases("08_diffusion_q", lambda case: case.name.startswith("dql") and "critic/loss" in case)


def dql_of(case: Case) -> DQL:
    return golden(DQL, DQLConfig, case, reference=True, eta=case.cfg["eta"])


def transitions() -> Transitions:
    """Of the algorithm's batch size."""
    obs, generator = observations(8), seeded(6)
    action = torch.rand(8, HORIZON, ACTION_DIM, generator=generator) * 2 - 1
    return Transitions(obs, action, torch.zeros(8), obs, torch.zeros(8), {})


@pytest.mark.parametrize("case", CRITIC_CASES)
def test_critic_loss(case: Case) -> None:
    algorithm = dql_of(case)
    loss = algorithm.critic_loss(golden_transitions(case), {"next_noise": case.tensor("critic/noise")})
    LOSS.check(loss, case["critic/loss"])
    loss.backward()
    check_gradients(case.tensors("critic/grad/"), nn.ModuleDict({"critic": algorithm.critic}))


@pytest.mark.parametrize("case", CASES)
def test_actor_loss(case: Case) -> None:
    algorithm = dql_of(case)
    *chain, t, noise = (case.tensor(f"actor/noise/{name}") for name in sorted(case.sub("actor/noise/"))[:-1])
    first = case["actor/noise/011_uniform"] > 0.5
    draws = {
        "chain": torch.stack(chain),
        "t": t,
        "noise": noise,
        "critics": torch.tensor([0, 1] if first else [1, 0]),
    }
    loss = algorithm.actor_loss(golden_transitions(case), draws)
    LOSS.check(loss, case["actor/loss"])
    loss.backward()
    check_gradients(case.tensors("actor/grad/"), nn.ModuleDict({"network": algorithm.policy.actor}))


def test_imitates_the_actions_in_the_buffer_and_not_its_own() -> None:
    """The reference's policy learns to denoise what it samples itself, so that nothing holds it to the data."""
    ours, reference = (small(DQL, DQLConfig, theirs, eta=0.0) for theirs in (False, True))
    batch = transitions()
    draws = ours.draws(("critic", "actor"))
    other = batch._replace(action=-batch.action)
    imitation = ours.policy.denoising_loss(batch.obs, batch.action, draws["t"], draws["noise"])
    assert torch.equal(ours.actor_loss(batch, draws), imitation)
    assert not torch.equal(ours.actor_loss(other, draws), imitation)
    assert torch.equal(reference.actor_loss(other, draws), reference.actor_loss(batch, draws))


def test_the_values_scale_does_not_matter() -> None:
    algorithm, batch = small(DQL, DQLConfig), transitions()
    draws = algorithm.draws(("critic", "actor"))

    def gradient() -> Tensor:
        return torch.autograd.grad(algorithm.actor_loss(batch, draws), algorithm.trainables["actor"].parameters[-2])[0]

    before = gradient()
    with torch.no_grad():
        for last in (child.moduleList[-1].linear_1 for child in algorithm.critic.children()):
            last.weight *= 100
            last.bias *= 100
    torch.testing.assert_close(gradient(), before)


def test_each_critic_is_sought_half_of_the_time() -> None:
    algorithm = small(DQL, DQLConfig)
    orders = torch.stack([algorithm.actor_draws()["critics"] for _ in range(200)])
    assert (orders.sum(1) == 1).all()
    assert abs(orders[:, 0].float().mean() - 0.5) < 0.1


def test_gradient_steps_can_be_captured() -> None:
    check_capturable(small(DQL, DQLConfig))
