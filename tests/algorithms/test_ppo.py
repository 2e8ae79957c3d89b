"""What holds for PPO with any policy; the diffusion policy's own things are in test_dppo.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dppo_fast.buffer import RolloutBuffer
from dppo_fast.networks.mlp import GaussianMLP
from dppo_fast.policies.base import Policy
from dppo_fast.policies.gaussian import GaussianConfig, GaussianPolicy
from tests.small import (
    algorithm,
    critic,
    diffusion_policy,
    distance,
    gaussian_policy,
    learn_bandit,
    rollout,
    seeded,
    weights,
)

MAKERS: list[Callable[..., Policy]] = [gaussian_policy, diffusion_policy]
both = pytest.mark.parametrize("make", MAKERS, ids=["gaussian", "diffusion"])


def trained(policy: Policy, buffer: RolloutBuffer | None = None, **config: Any) -> list[Tensor]:
    """Actor and critic after one update."""
    learner = algorithm(policy, buffer or rollout(policy), **config)
    learner.update(0)
    return weights(policy, learner.critic)


@both
def test_an_update_learns_and_is_the_same_every_time(make: Callable[..., Policy]) -> None:
    untrained = weights(make(), critic())
    assert distance(trained(make()), untrained) > 1e-3
    assert distance(trained(make()), trained(make())) == 0


@both
@pytest.mark.parametrize("size", [1, 7, 16])
def test_microbatches_sum_to_the_minibatch(make: Callable[..., Policy], size: int) -> None:
    options = {"ent_coef": 0.01, "clip_vloss_coef": 0.2, "max_grad_norm": 1.0}
    results = []
    for microbatch_size in (64, size):
        policy = make()
        learner = algorithm(policy, rollout(policy), microbatch_size=microbatch_size, **options)
        batch, row = learner._prepare(), torch.arange(16)
        metrics = learner.minibatch(batch, row, row % policy.decisions, ("actor", "critic"), torch.zeros(()))
        parameters = [*policy.trained().parameters(), *learner.critic.parameters()]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        results.append([*gradients, *weights(policy, learner.critic), *metrics.values()])
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)


@both
def test_the_critic_is_evaluated_once_per_decision(make: Callable[..., Policy]) -> None:
    """And gives what it gives pair by pair, whether or not the host may look."""
    policy, rows = make(), []
    learner = algorithm(policy, rollout(policy), clip_vloss_coef=0.2)
    batch, parts = learner._prepare(), policy.decisions
    learner.critic.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0]["state"])))
    with torch.no_grad():
        for parameter in learner.critic.parameters():
            parameter += 0.1
    pair = torch.randperm(32 * parts, generator=seeded(0))[: 20 * parts].sort().values
    row, k = pair // parts, pair % parts
    error = learner.critic({"state": batch.obs["state"][row]}) - batch.returns[row]
    moved = learner.critic({"state": batch.obs["state"][row]}) - batch.value[row]
    clipped = batch.value[row] + moved.clamp(-0.2, 0.2) - batch.returns[row]
    expected = 0.5 * torch.max(error.square(), clipped.square()).mean()
    gradients = torch.autograd.grad(expected, list(learner.critic.parameters()))
    for on_host, evaluated in ((True, len(row.unique())), (False, min(32, len(row)))):
        learner.on_host = on_host
        _, metrics = learner.loss(batch, row, k, batch.advantage[row])
        assert rows[-1] == evaluated
        torch.testing.assert_close(metrics["loss/value"], expected)
        ours = torch.autograd.grad(metrics["loss/value"], list(learner.critic.parameters()))
        torch.testing.assert_close(ours, gradients)


@both
def test_the_largest_ratio_is_that_of_all_pairs(make: Callable[..., Policy]) -> None:
    policy = make()
    learner = algorithm(policy, rollout(policy), microbatch_size=3, batch_size=16, update_epochs=1)
    largest = []
    loss = learner.loss

    def observed(*args: Any) -> Any:
        result = loss(*args)
        largest.append(float(result[1]["ppo/ratio_max"]))
        return result

    learner.loss = observed
    metrics = learner.update(0)
    assert len(largest) > 2
    assert float(metrics["ppo/ratio_max"]) == max(largest) > float(metrics["ppo/ratio"])


@both
def test_the_first_minibatch_starts_at_a_ratio_of_one(make: Callable[..., Policy]) -> None:
    policy = make()
    learner = algorithm(policy, rollout(policy), batch_size=10**6, update_epochs=1, clip_ploss_coef=1e-4)
    metrics = learner.update(0)
    assert metrics["ppo/first_clip_fraction"] == metrics["ppo/clip_fraction"] == 0
    assert float(metrics["ppo/ratio"]) == pytest.approx(1, abs=1e-5)
    assert float(metrics["ppo/approx_kl"]) < 1e-9
    assert float(metrics["ppo/minibatches"]) == 1


@both
def test_every_epoch_visits_every_pair_but_an_incomplete_last_minibatch(make: Callable[..., Policy]) -> None:
    policy = make()
    learner = algorithm(policy, rollout(policy, steps=5), batch_size=9, update_epochs=3)
    orders = []
    draw = learner.permutation
    learner.permutation = lambda n: orders.append(draw(n)) or orders[-1]
    metrics = learner.update(0)
    pairs = 5 * 4 * policy.decisions
    assert float(metrics["ppo/minibatches"]) == 3 * (pairs // 9)
    assert [sorted(order.tolist()) for order in orders] == [list(range(pairs))] * 3
    assert not orders[0].equal(orders[1])


def steps_until_target_kl(policy: Policy, on_host: bool) -> tuple[int, list[list[Tensor]]]:
    """How many minibatches count, and the weights after every minibatch that ran."""
    learner = algorithm(policy, rollout(policy), target_kl=1e-5, update_epochs=6)
    learner.on_host = on_host
    after: list[list[Tensor]] = []
    minibatch = learner.minibatch

    def observed(*args: Any) -> dict[str, Tensor]:
        metrics = minibatch(*args)
        after.append(weights(policy, learner.critic))
        return metrics

    learner.minibatch = observed
    return int(learner.update(0)["ppo/minibatches"]), after


@both
def test_the_device_flag_stops_as_the_host_does(make: Callable[..., Policy]) -> None:
    """Both take the step that exceeds target_kl and none after it."""
    counted, on_host = steps_until_target_kl(make(), on_host=True)
    same, on_device = steps_until_target_kl(make(), on_host=False)
    assert 1 < counted == same == len(on_host) < len(on_device)
    moved = [distance(*pair) > 0 for pair in pairwise(on_device)]
    assert all(moved[: counted - 1])
    assert not any(moved[counted - 1 :])
    assert distance(on_host[-1], on_device[-1]) < 1e-6


@both
def test_the_critic_warms_up_alone(make: Callable[..., Policy]) -> None:
    policy = make()
    learner = algorithm(policy, rollout(policy), n_critic_warmup_itr=1)
    actor, values = weights(policy), weights(learner.critic)
    learner.update(0)
    learner.step_schedules(0)
    assert distance(weights(policy), actor) == 0
    assert distance(weights(learner.critic), values) > 1e-3
    assert learner.trainables["actor"].schedule.steps == 0
    assert learner.trainables["critic"].schedule.steps == 1
    learner.update(1)
    learner.step_schedules(1)
    assert distance(weights(policy), actor) > 1e-3
    assert learner.trainables["actor"].schedule.steps == 1


@both
def test_invalid_rows_are_not_learned_from(make: Callable[..., Policy]) -> None:
    results = []
    for garbage in (0.0, torch.nan):
        policy = make()
        buffer = rollout(policy)
        buffer.valid[2, 1] = buffer.valid[5, 3] = False
        buffer.invalid = True
        for value in buffer.record.values():
            value[~buffer.valid] = garbage
        results.append(trained(policy, buffer, batch_size=5))
        assert all(torch.isfinite(parameter).all() for parameter in results[-1])
    assert distance(*results) == 0


def test_only_the_actors_gradient_is_clipped() -> None:
    policy = gaussian_policy()
    learner = algorithm(policy, rollout(policy), max_grad_norm=1e-3, batch_size=32, update_epochs=1)
    learner.update(0)

    def norm(module: torch.nn.Module) -> float:
        gradients = [parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None]
        return float(torch.cat(gradients).norm())

    assert norm(policy.actor_ft) == pytest.approx(1e-3, rel=1e-3)
    assert norm(learner.critic) > 1e-2


@pytest.mark.parametrize(
    ("options", "term", "weight"),
    [({"ent_coef": 0.3}, "ppo/entropy", -0.3), ({"use_bc_loss": True, "bc_loss_coeff": 0.7}, "loss/bc", 0.7)],
)
@both
def test_extra_terms_of_the_loss(
    make: Callable[..., Policy], options: dict[str, Any], term: str, weight: float
) -> None:
    policy = make()
    learner = algorithm(policy, rollout(policy), **options)
    batch, row = learner._prepare(), torch.arange(16)
    total, metrics = learner.loss(batch, row, row % policy.decisions, batch.advantage[row])
    expected = metrics["loss/policy"] + 0.5 * metrics["loss/value"] + weight * metrics[term]
    torch.testing.assert_close(total, expected)
    assert metrics[term] != 0


def test_reward_scaling() -> None:
    policy = gaussian_policy()
    buffer = rollout(policy)
    plain, tenfold, running = (
        algorithm(policy, buffer, gae_lambda=1.0, **options)._prepare()
        for options in (
            {"reward_scale_running": False},
            {"reward_scale_running": False, "reward_scale_const": 10.0},
            {"reward_scale_running": True},
        )
    )
    last = buffer.terminated.flatten()
    assert last.any()
    torch.testing.assert_close(plain.returns[last], buffer.reward.flatten()[last])
    torch.testing.assert_close(tenfold.returns[last], 10 * plain.returns[last])
    ratio = running.returns[last] / plain.returns[last]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert not ratio.isclose(torch.ones(())).any()


def test_a_gaussian_policy_learns() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = GaussianMLP(2, 1, cond_dim=1, mlp_dims=(16,), fixed_std=0.2, learn_fixed_std=True)
        policy = GaussianPolicy(network, GaussianConfig(), 1, 2)
    policy.generator = seeded(0)
    before, after = learn_bandit(policy, iterations=12, update_epochs=4)
    assert before < -0.4
    assert after > -0.1
