"""IBRL: its losses and choices against the reference's, its ensemble, and what its critics decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.ibrl import IBRL, IBRLConfig
from dppo_fast.networks.mlp import GaussianMLP
from dppo_fast.optim import LRConfig
from dppo_fast.policies.gaussian import GaussianConfig, GaussianPolicy
from dppo_fast.types import UserError
from tests.algorithms.off_policy import check_capturable, chunk_noise, golden_parts, golden_transitions, parts
from tests.golden_files import Case, golden_cases
from tests.golden_models import (
    ACTOR_ACTIVATION,
    DETERMINISTIC_STD,
    below,
    check_gradients,
    gaussian_mlp_options,
    shapes_of,
)
from tests.golden_models import observations as golden_observations
from tests.small import collector, distance, gaussian_policy, observations, perturb, toy_env, weights
from tests.tolerances import LOSS, Tolerance

CASES = golden_cases("08_gaussian_q", lambda case: case.name.startswith("ibrl"))

NEARLY_DETERMINISTIC = Tolerance(absolute=1e-5 + 3 * DETERMINISTIC_STD)
"""The reference's imitation policy, and when evaluated the other, too, add noise of DETERMINISTIC_STD."""


def ibrl(network: Mapping[str, Any] = {}, **config: Any) -> IBRL:
    """With an imitation policy that differs from the learning one."""
    policy = gaussian_policy(**network)
    perturb(policy.actor, 0.3)
    return IBRL.build(IBRLConfig(**{"batch_size": 8, "critic_num_update": 2, "n_critics": 3, **config}), parts(policy))


def ibrl_of(case: Case) -> IBRL:
    own = case.tensors("w/")
    horizon_steps, action_dim = case["in/actions"].shape[1:]
    dims = {"action_dim": action_dim, "horizon_steps": horizon_steps, "fixed_std": case.cfg["fixed_std"]}
    shapes = shapes_of(below(own, "network."))
    network = GaussianMLP(**gaussian_mlp_options(shapes) | dims, activation_type=ACTOR_ACTIVATION)
    policy = GaussianPolicy(network, GaussianConfig(case.cfg["randn_clip_value"]), horizon_steps, action_dim)
    policy.actor_ft.load_state_dict(below(own, "network."))
    policy.actor.load_state_dict(below(own, "bc_policy."))
    names = ("gamma", "n_critics", "soft_action_sample", "soft_action_sample_beta")
    algorithm = IBRL(IBRLConfig(**{name: case.cfg[name] for name in names}), replace(golden_parts(case), policy=policy))
    algorithm.target_actor.load_state_dict(below(own, "target_actor."))
    algorithm.critic.members.load_state_dict(case.tensors("ensemble/"))
    algorithm.target.members.load_state_dict(stacked(case, "target_networks", range(case.cfg["n_critics"])))
    return algorithm


def stacked(case: Case, name: str, members: Any) -> dict[str, Tensor]:
    """The parameters of an ensemble of some of the networks ``name``."""
    own = [below(case.tensors("w/"), f"{name}.{int(member)}.") for member in members]
    return {key: torch.stack([member[key] for member in own]) for key in own[0]}


@pytest.mark.parametrize("case", CASES)
def test_critic_loss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = ibrl_of(case)
    imitate, noise = algorithm.imitate, chunk_noise(case, "critic/noise/001_randn").clamp(-3, 3)
    monkeypatch.setattr(algorithm, "imitate", lambda obs: imitate(obs) + DETERMINISTIC_STD * noise)
    draws = {
        "judges": case.tensor("critic/noise/000_randperm")[:2],
        "next_noise": chunk_noise(case, "critic/noise/002_randn"),
    }
    loss = algorithm.critic_loss(golden_transitions(case), draws)
    LOSS.check(loss, case["critic/loss"])
    loss.backward()
    check_gradients(case.tensors("critic/grad_ensemble/"), algorithm.critic.members)


@pytest.mark.parametrize("case", CASES)
def test_actor_loss(case: Case) -> None:
    algorithm = ibrl_of(case)
    loss = algorithm.actor_loss(golden_observations(case), chunk_noise(case, "actor/noise"))
    LOSS.check(loss, case["actor/loss"])
    loss.backward()
    check_gradients(case.tensors("actor/grad/"), nn.ModuleDict({"network": algorithm.policy.actor_ft}))


@pytest.mark.parametrize("case", CASES)
def test_actions(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the reference acts with: networks of their own, and the same two for the whole batch."""
    algorithm, n_critics = ibrl_of(case), case.cfg["n_critics"]
    algorithm.target.members.load_state_dict(stacked(case, "critic_networks", range(n_critics)))
    noise = chunk_noise(case, "sample/noise/002_randn")
    second = torch.zeros(len(noise), 2 * noise[0].numel())
    second[:, case.tensor("sample/noise/000_randperm")] = torch.arange(n_critics, dtype=torch.float32)
    if case.cfg["soft_action_sample"]:
        own = case.tensor("sample/noise/003_multinomial_index") == 1
        second[:, n_critics] = torch.where(own, -9.0, 9.0)
    answers = {1: noise[None], 2: second.view(len(noise), 2, *noise.shape[1:]).transpose(0, 1)}
    calls = iter((1, 2))
    monkeypatch.setattr(algorithm.policy, "draw_noise", lambda batch, draws: answers[next(calls)])
    action = algorithm.decide(golden_observations(case), deterministic=False).action
    NEARLY_DETERMINISTIC.check(action, case["sample/actions"])


@pytest.mark.parametrize("case", CASES)
def test_deterministic_actions(case: Case) -> None:
    """The two networks that the reference drew stand for all, whose minimum ours takes."""
    algorithm = ibrl_of(case)
    pair = case["sample_det/noise/000_randperm"][:2]
    algorithm.target.members.load_state_dict(
        stacked(case, "critic_networks", [pair[i % 2] for i in range(case.cfg["n_critics"])])
    )
    action = algorithm.decide(golden_observations(case), deterministic=True).action
    NEARLY_DETERMINISTIC.check(action, case["sample_det/actions"])


def test_only_the_actor_s_loss_has_dropout() -> None:
    algorithm, obs = ibrl({"dropout": 0.5}), observations(8)
    draws, batch = algorithm.draws(("critic", "actor")), algorithm.replay.sample(8)
    losses = [
        {compute().item() for _ in range(5)}
        for compute in (
            lambda: algorithm.actor_loss(obs, draws["noise"]),
            lambda: algorithm.critic_loss(batch, draws),
            lambda: algorithm.decide(obs, deterministic=True).action.sum(),
        )
    ]
    assert [len(values) for values in losses] == [5, 1, 1]


def test_random_weights_are_not_imitated() -> None:
    without = replace(parts(gaussian_policy()), pretrained=False)
    with pytest.raises(UserError, match=r"policy\.checkpoint is missing: give the policy to imitate"):
        IBRL.build(IBRLConfig(), without)


@pytest.mark.parametrize("imitation", [False, True])
def test_acts_with_critics_that_learn(imitation: bool) -> None:
    """The reference's choose once and for all: those it acts with are never updated."""
    algorithm, obs = ibrl(target_ema_rate=1.0, critic_lr_scheduler=LRConfig(min_lr=1e-2)), observations(16)
    imitated, own = algorithm.imitate(obs), algorithm.policy.act(obs, deterministic=True).action
    good, bad = (imitated, own) if imitation else (own, imitated)
    assert not torch.equal(algorithm.decide(obs, deterministic=True).action, good)
    for _ in range(30):
        loss = (algorithm.critic(obs, bad) - algorithm.critic(obs, good)).mean()
        algorithm.descend("critic", loss, torch.zeros(()))
        algorithm.follow(algorithm.target, algorithm.critic, torch.zeros(()))
    assert torch.equal(algorithm.decide(obs, deterministic=True).action, good)


def test_a_soft_choice_is_a_boltzmann_distribution() -> None:
    """With probabilities exp(beta Q) / sum; the reference takes the softmax of exp(beta Q), which overflows."""
    algorithm = ibrl(soft_action_sample_beta=2.0)
    luck = torch.linspace(0, 1, 10001)
    for imitated, own in ((0.3, 0.1), (-0.5, 0.2), (1000.0, 1001.0)):
        q = torch.tensor([[imitated], [own]]).expand(-1, len(luck))
        share = algorithm.chooses_own(q, luck).float().mean()
        assert torch.isclose(share, torch.tensor(2 * (own - imitated)).sigmoid(), atol=1e-3)


def test_a_soft_bootstrap_takes_the_value_of_what_it_chose() -> None:
    algorithm = ibrl(soft_bootstrap=True)
    batch = algorithm.replay.sample(8)
    draws = algorithm.draws(("critic",))
    own = algorithm.propose(algorithm.target_actor, batch.next_obs, draws["next_noise"])
    for luck, action in ((0.0, own), (1.0, algorithm.imitate(batch.next_obs))):
        value = algorithm.target(batch.next_obs, action, members=draws["judges"]).amin((0, 1))
        target = batch.reward + algorithm.config.gamma * (1 - batch.terminated) * value
        expected = (algorithm.critic(batch.obs, batch.action) - target).square().mean()
        loss = algorithm.critic_loss(batch, {**draws, "luck": torch.full((8,), luck)})
        assert torch.allclose(loss, expected)


def test_critics_start_different_and_stay_so() -> None:
    """The reference copies one critic; its members then never differ."""
    algorithm = ibrl()
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    for iteration in range(2):
        for value in weights(algorithm.critic):
            if value.shape[1:].numel() > 1 and value.std() > 0:
                assert (value[0] - value[1]).abs().max() > 1e-3
        algorithm.update(iteration)


def test_what_is_trained_is_in_the_checkpoint() -> None:
    """The reference saves critics that it never trains. The imitation policy stays what it was."""
    algorithm = ibrl()
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    modules = algorithm.modules()
    names = ("critic", "target_critic", "target_actor")
    before = {name: weights(modules[name]) for name in names}
    imitation, learning = weights(algorithm.policy.actor), weights(algorithm.policy.actor_ft)
    algorithm.update(0)
    assert all(distance(before[name], weights(modules[name])) > 0 for name in names)
    assert distance(imitation, weights(algorithm.policy.actor)) == 0
    assert distance(learning, weights(algorithm.policy.actor_ft)) > 0


def test_decisions_do_not_depend_on_the_batch() -> None:
    few, many = ibrl(soft_action_sample_beta=0.1), ibrl(soft_action_sample_beta=0.1)
    obs = observations(32)
    all_actions = many.decide(obs, deterministic=False).action
    some = few.decide({"state": obs["state"][:7]}, deterministic=False)
    assert torch.equal(some.action, some.record["action"])
    assert torch.allclose(some.action, all_actions[:7], atol=1e-6)
    imitates = (all_actions == many.imitate(obs)).flatten(1).all(1)
    assert 0 < imitates.sum() < 32


def test_deterministic_decisions_use_no_noise() -> None:
    algorithm = ibrl()
    before = algorithm.policy.noise.step
    assert algorithm.decide(observations(4), deterministic=True).record == {}
    assert algorithm.policy.noise.step == before


def test_the_demonstrations_come_first() -> None:
    algorithm = ibrl()
    demonstrated = len(algorithm.replay)
    reward = algorithm.replay.data["reward"][:demonstrated].clone()
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    assert algorithm.update(0)["replay/size"] == demonstrated + 32
    assert torch.equal(algorithm.replay.data["reward"][:demonstrated], reward)
    assert algorithm.sources(0) == {"replay": 8}


def test_actor_learns_once_after_the_critics_steps() -> None:
    algorithm = ibrl(critic_num_update=5, update_freq=2)
    due = [algorithm.due(0, step) for step in algorithm.steps(0)]
    assert len(due) == 5 * 8 * 4 / 2
    assert due[:5] == [("critic",)] * 4 + [("critic", "actor")]


@pytest.mark.parametrize("soft_bootstrap", [False, True])
def test_gradient_steps_can_be_captured(soft_bootstrap: bool) -> None:
    check_capturable(ibrl(soft_bootstrap=soft_bootstrap))
