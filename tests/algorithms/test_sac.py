"""Soft actor-critic: its losses against the reference's, and whether it learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dppo_fast.algorithms.sac import SAC, SACConfig
from dppo_fast.optim import LRConfig
from tests.algorithms.off_policy import (
    check_capturable,
    chunk_noise,
    golden_parts,
    golden_transitions,
    parts,
    squashed_policy,
)
from tests.golden_files import Case, golden_cases
from tests.golden_models import below, check_gradients, observations
from tests.small import Bandit, collector
from tests.tolerances import FORWARD, LOG_PROB, LOSS, SAMPLE

CASES = golden_cases("08_gaussian_q", lambda case: case.name == "sac")


def sac_of(case: Case) -> SAC:
    config = SACConfig(
        gamma=case.cfg["gamma"],
        init_temperature=case.cfg["alpha"],
        target_entropy=case.cfg["target_entropy"],
        target_ema_rate=0.1,
    )
    algorithm = SAC(config, golden_parts(case))
    weights = case.tensors("w/")
    algorithm.critic.load_state_dict(below(weights, "critic."))
    algorithm.target.load_state_dict(below(weights, "target_critic."))
    return algorithm


@pytest.mark.parametrize("case", CASES)
def test_samples(case: Case) -> None:
    action, log_prob = sac_of(case).policy.sample_scored(observations(case), chunk_noise(case, "sample/noise"))
    SAMPLE.check(action, case["sample/actions"])
    LOG_PROB.check(log_prob, case["sample/logprob"])


@pytest.mark.parametrize("case", CASES)
def test_critic_loss(case: Case) -> None:
    algorithm = sac_of(case)
    loss = algorithm.critic_loss(golden_transitions(case), {"next_noise": chunk_noise(case, "critic/noise")})
    LOSS.check(loss, case["critic/loss"])
    loss.backward()
    check_gradients(case.tensors("critic/grad/"), nn.ModuleDict({"critic": algorithm.critic}))


@pytest.mark.parametrize("case", CASES)
def test_actor_loss(case: Case) -> None:
    algorithm = sac_of(case)
    loss = algorithm.actor_loss(observations(case), chunk_noise(case, "actor/noise"))
    LOSS.check(loss, case["actor/loss"])
    loss.backward()
    check_gradients(case.tensors("actor/grad/"), nn.ModuleDict({"network": algorithm.policy.actor_ft}))


@pytest.mark.parametrize("case", CASES)
def test_temperature_loss(case: Case) -> None:
    """The recorded gradient is with respect to alpha; ours is with respect to its logarithm."""
    algorithm = sac_of(case)
    loss, _ = algorithm.temperature_loss(observations(case), chunk_noise(case, "temperature/noise"))
    LOSS.check(loss, case["temperature/loss"])
    loss.backward()
    LOSS.check(algorithm.temperature.log_alpha.grad, case.cfg["alpha"] * case["temperature/grad_alpha"])


@pytest.mark.parametrize("case", CASES)
def test_target_update(case: Case) -> None:
    algorithm = sac_of(case)
    algorithm.follow(algorithm.target, algorithm.critic, torch.zeros(()))
    for name, value in case.tensors("after_target_update_0.1/target_critic.").items():
        FORWARD.check(algorithm.target.get_parameter(name), value, name)


def test_actor_waits_for_the_critics_and_then_takes_as_many_steps() -> None:
    config = SACConfig(batch_size=64, critic_replay_ratio=192, actor_replay_ratio=64)
    algorithm = SAC(config, parts(squashed_policy(), n_steps=8, num_envs=4))
    due = [algorithm.due(0, step) for step in algorithm.steps(0)]
    assert len(due) == 192 // 64 * 8 * 4
    assert due[:3] == [("critic",), ("critic",), ("critic", "actor", "actor", "actor")]
    assert due[3:] == due[:3] * 31


def test_gradient_steps_can_be_captured() -> None:
    check_capturable(
        SAC(SACConfig(batch_size=8, critic_replay_ratio=4, actor_replay_ratio=2), parts(squashed_policy()))
    )


def test_learns_a_bandit() -> None:
    """From far away, and down to a temperature at which hardly any reward is paid for entropy."""
    env = Bandit((0.8, -0.8), num_envs=16)
    rates = dict.fromkeys(("actor_lr_scheduler", "critic_lr_scheduler"), LRConfig(min_lr=1e-2))
    config = SACConfig(batch_size=64, critic_replay_ratio=64, actor_replay_ratio=64, **rates)
    algorithm = SAC(config, parts(squashed_policy(1, 2, 1), 1, n_steps=4, num_envs=16, cond_steps=1))
    collect = collector(env, algorithm.actor).collect
    returns = []
    for iteration in range(8):
        returns.append(collect(algorithm.buffer)["return"])
        metrics = algorithm.update(iteration)
    assert returns[0] < -1
    assert collect(algorithm.buffer)["return"] > -0.1, returns
    assert float(metrics["sac/temperature"]) < 0.2
