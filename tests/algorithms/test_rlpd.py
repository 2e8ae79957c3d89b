"""RLPD: its losses against the reference's, its ensemble and its share of demonstrations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dppo_fast.algorithms.rlpd import RLPD, RLPDConfig
from tests.algorithms.off_policy import (
    check_capturable,
    chunk_noise,
    demonstrations,
    golden_parts,
    golden_transitions,
    parts,
    squashed_policy,
)
from tests.golden_files import Case, golden_cases
from tests.golden_models import below, check_gradients, observations
from tests.small import collector, toy_env, weights
from tests.tolerances import FORWARD, LOSS

CASES = golden_cases("08_gaussian_q", lambda case: case.name.startswith("rlpd"))


def rlpd(**config: Any) -> RLPD:
    return RLPD(
        RLPDConfig(**{"batch_size": 8, "critic_num_update": 2, "n_critics": 3, **config}), parts(squashed_policy())
    )


def rlpd_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> RLPD:
    monkeypatch.setattr(RLPD, "add_offline", lambda *arguments: None)
    config = RLPDConfig(
        gamma=case.cfg["gamma"],
        init_temperature=case.cfg["alpha"],
        backup_entropy=case.cfg["backup_entropy"],
        n_critics=case.cfg["n_critics"],
        target_ema_rate=0.1,
    )
    algorithm = RLPD(config, golden_parts(case))
    algorithm.critic.members.load_state_dict(case.tensors("ensemble/"))
    own = case.tensors("w/")
    members = [below(own, f"target_networks.{i}.") for i in range(config.n_critics)]
    algorithm.target.members.load_state_dict({name: torch.stack([m[name] for m in members]) for name in members[0]})
    return algorithm


@pytest.mark.parametrize("case", CASES)
def test_critic_loss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = rlpd_of(case, monkeypatch)
    draws = {
        "members": case.tensor("critic/noise/000_randperm")[:2],
        "next_noise": chunk_noise(case, "critic/noise/001_randn"),
    }
    loss = algorithm.critic_loss(golden_transitions(case), draws)
    LOSS.check(loss, case["critic/loss"])
    loss.backward()
    check_gradients(case.tensors("critic/grad_ensemble/"), algorithm.critic.members)


@pytest.mark.parametrize("case", CASES)
def test_actor_loss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = rlpd_of(case, monkeypatch)
    loss = algorithm.actor_loss(observations(case), chunk_noise(case, "actor/noise"))
    LOSS.check(loss, case["actor/loss"])
    loss.backward()
    check_gradients(case.tensors("actor/grad/"), nn.ModuleDict({"network": algorithm.policy.actor_ft}))


@pytest.mark.parametrize("case", CASES)
def test_target_update(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = rlpd_of(case, monkeypatch)
    algorithm.follow(algorithm.target, algorithm.critic, torch.zeros(()))
    for name, value in case.tensors("after_target_update_0.1/target_networks.").items():
        member, _, own = name.partition(".")
        FORWARD.check(algorithm.target.members.get_parameter(own)[int(member)], value, name)


def test_critics_start_different_and_stay_so() -> None:
    """The reference copies one critic; its members then never differ."""
    algorithm = rlpd()
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    for iteration in range(2):
        for value in weights(algorithm.critic):
            if value.shape[1:].numel() > 1 and value.std() > 0:
                assert (value[0] - value[1]).abs().max() > 1e-3
        algorithm.update(iteration)


def test_trained_critics_are_in_the_checkpoint() -> None:
    """The reference saves the critics that it never trains."""
    algorithm = rlpd()
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    before = {name: value.clone() for name, value in algorithm.modules()["critic"].state_dict().items()}
    algorithm.update(0)
    after = algorithm.modules()["critic"].state_dict()
    assert all((after[name] != before[name]).any() for name in before)


def test_half_of_a_batch_are_demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = rlpd()
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    demonstrated = torch.from_numpy(demonstrations().states)
    shares = []

    def minibatch(batch: Any, *_: Any) -> dict[str, torch.Tensor]:
        newest = batch.obs["state"][:, -1, None]
        shares.append((newest == demonstrated).all(-1).any(-1).float().mean().item())
        return {"none": torch.zeros(())}

    monkeypatch.setattr(algorithm, "minibatch", minibatch)
    algorithm.update(0)
    assert len(shares) == 2 * 8 * 4
    assert set(shares) == {0.5}


def test_actor_learns_once_after_all_of_the_critics_steps() -> None:
    algorithm = rlpd(critic_num_update=5)
    due = [algorithm.due(0, step) for step in algorithm.steps(0)]
    assert len(due) == 5 * 8 * 4
    assert due[:5] == [("critic",)] * 4 + [("critic", "actor")]


def test_all_wait_for_update_freq_transitions() -> None:
    algorithm = rlpd(critic_num_update=2, update_freq=8)
    due = [algorithm.due(0, step) for step in algorithm.steps(0)]
    assert due == [("critic",), ("critic", "actor")] * (8 * 4 // 8)


def test_gradient_steps_can_be_captured() -> None:
    check_capturable(rlpd())
