"""DIPO: its losses and action gradients against the reference's, and what becomes of the replay buffer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.dipo import DIPO, DIPOConfig
from dppo_fast.optim import LRConfig
from tests.algorithms.diffusion_q import golden, small
from tests.algorithms.off_policy import check_capturable, golden_transitions
from tests.golden_files import Case, golden_cases
from tests.golden_models import below, check_gradients
from tests.golden_models import observations as golden_observations
from tests.small import collector, distance, observations, seeded, toy_env, weights
from tests.tolerances import FORWARD, LOSS, SAMPLE

CASES = golden_cases("08_diffusion_q", lambda case: case.name.startswith("dipo"))


def dipo(reference: bool = False, **config: Any) -> DIPO:
    """At an action rate that can be seen."""
    return small(DIPO, DIPOConfig, reference, **{"action_lr": 0.03, "action_gradient_steps": 3, **config})


def dipo_of(case: Case, **config: Any) -> DIPO:
    algorithm = golden(DIPO, DIPOConfig, case, **config)
    algorithm.target_policy.actor.load_state_dict(below(case.tensors("w/"), "actor_target."))
    return algorithm


def collected(algorithm: DIPO) -> DIPO:
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    return algorithm


@pytest.mark.parametrize("case", CASES)
def test_critic_loss(case: Case) -> None:
    algorithm = dipo_of(case)
    loss = algorithm.critic_loss(golden_transitions(case), {"next_noise": case.tensor("noise")})
    LOSS.check(loss, case["loss_critic"])
    loss.backward()
    check_gradients(case.tensors("grad/"), nn.ModuleDict({"critic": algorithm.critic}))


@pytest.mark.parametrize("case", CASES)
def test_the_target_policy_samples(case: Case) -> None:
    policy = dipo_of(case).target_policy
    action = policy.sample(golden_observations(case), case.tensor("sample_det/noise"), deterministic=True).action
    SAMPLE.check(action, case["sample_det/actions"])


@pytest.mark.parametrize("case", CASES)
def test_action_gradient(case: Case) -> None:
    settings = {
        "action_lr": float(case["action_gradient/action_lr"]),
        "action_gradient_steps": int(case["action_gradient/steps"]),
    }
    algorithm = dipo_of(case, **settings)
    assert algorithm.max_action_grad_norm == pytest.approx(float(case["action_gradient/grad_norm"]))
    action = algorithm.improve(golden_observations(case), case.tensor("in/actions"))
    SAMPLE.check(action, case["action_gradient/guided_action"])


@pytest.mark.parametrize("case", CASES)
def test_target_updates(case: Case) -> None:
    rates = {"critic_target": 0.3, "actor_target": 0.2}
    expected = case.tensors("after_target_update_critic0.3_actor0.2/")
    for name, rate in rates.items():
        algorithm = dipo_of(case, target_ema_rate=rate)
        algorithm.follow(algorithm.target, algorithm.critic, torch.zeros(()))
        algorithm.follow(algorithm.target_policy, algorithm.policy, torch.zeros(()))
        module = {"critic_target": algorithm.target, "actor_target": algorithm.target_policy.actor}[name]
        for own, value in below(expected, name + ".").items():
            FORWARD.check(module.get_parameter(own), value, own)


def test_improved_actions_are_worth_more_and_stay_inside() -> None:
    algorithm = dipo(action_gradient_steps=10)
    obs, action = observations(32), torch.rand(32, 4, 2, generator=seeded(0)) * 2 - 1
    improved = algorithm.improve(obs, action)
    assert improved.abs().max() == 1
    gain = algorithm.critic(obs, improved).amin(0) - algorithm.critic(obs, action).amin(0)
    assert gain.min() > 0


@pytest.mark.parametrize("reference", [False, True])
def test_critics_learn_from_the_actions_that_were_taken(monkeypatch: pytest.MonkeyPatch, reference: bool) -> None:
    """And the policy from the improved ones, which stay in the buffer; rows that were not drawn stay as they are.

    In the reference what the policy imitates is what the critics learn from later.
    """
    algorithm = collected(dipo(reference=reference, replay_ratio=0.25))  # one minibatch
    taken = algorithm.buffer.record["action"].flatten(0, 1).clone()
    imitated, drawn = [], []
    learn, cloning = algorithm.learn.function, algorithm.policy.denoising_loss

    def watched_learn(inputs: Any, due: tuple[str, ...]) -> Tensor:
        drawn.append(inputs["rows/replay"])
        return learn(inputs, due)

    def watched_cloning(obs: Any, action: Tensor, *draws: Any) -> Tensor:
        imitated.append(action.clone())
        return cloning(obs, action, *draws)

    monkeypatch.setattr(algorithm.learn, "function", watched_learn)
    monkeypatch.setattr(algorithm.policy, "denoising_loss", watched_cloning)
    algorithm.update(0)
    (rows,), (action,) = drawn, imitated
    later = algorithm.replay.gather(torch.arange(32))
    improved = later.action if reference else later.record["action"]
    assert torch.equal(improved[rows], action)
    assert (improved != taken).flatten(1).any(1)[rows].all()
    others = torch.isin(torch.arange(32), rows, invert=True)
    assert torch.equal(improved[others], taken[others])
    assert torch.equal(later.action, taken) != reference


def test_improvements_add_up() -> None:
    """A row's second improvement begins where its first one ended."""
    algorithm = collected(dipo(batch_size=64, action_lr=1e-3))
    algorithm.update(0)
    step = algorithm.config.action_lr * algorithm.config.action_gradient_steps
    for _ in range(4):
        algorithm.update(1)
    taken, improved = algorithm.replay.data["action"][:32], algorithm.replay.data["record/action"][:32]
    assert (improved - taken.clamp(-1, 1)).abs().max() > 2 * step


def test_a_stopped_step_leaves_the_buffer_alone() -> None:
    algorithm = collected(dipo())
    algorithm.update(0)
    before = {path: value[:32].clone() for path, value in algorithm.replay.data.items()}
    inputs = {"rows/replay": torch.arange(8), **algorithm.draws(("critic", "actor")), "stop": torch.ones(())}
    algorithm.learn(inputs, ("critic", "actor"))
    assert all(torch.equal(algorithm.replay.data[path][:32], value) for path, value in before.items())


def test_the_averaged_policy_acts() -> None:
    rates = dict.fromkeys(("actor_lr_scheduler", "critic_lr_scheduler"), LRConfig(min_lr=1e-2))
    algorithm = collected(dipo(target_ema_rate=0.1, **rates))
    before = weights(algorithm.target_policy), weights(algorithm.target)
    algorithm.update(0)
    assert distance(before[0], weights(algorithm.target_policy)) > 1e-4
    assert distance(before[1], weights(algorithm.target)) > 1e-4
    assert algorithm.modules()[algorithm.deployed] is algorithm.target_policy
    moved = distance(weights(algorithm.policy), weights(algorithm.target_policy))
    assert moved > 1e-3
    obs = observations(4)
    step = algorithm.actor.noise.step
    action = algorithm.actor.act(obs).action
    assert algorithm.actor.noise.step == step + 1
    for policy, same in ((algorithm.target_policy, True), (algorithm.policy, False)):
        policy.noise.step = step
        assert torch.equal(policy.act(obs).action, action) == same


def test_only_critics_learn_while_they_warm_up() -> None:
    algorithm = collected(dipo(n_critic_warmup_itr=1))
    policy, critic = weights(algorithm.policy, algorithm.target_policy), weights(algorithm.critic)
    algorithm.update(0)
    assert distance(policy, weights(algorithm.policy, algorithm.target_policy)) == 0
    assert distance(critic, weights(algorithm.critic)) > 0


def test_gradient_steps_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")  # the C++ ops are for the CPU
    check_capturable(dipo())
