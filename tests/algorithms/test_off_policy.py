"""What algorithms with a replay buffer share, shown by the smallest one: TD(0) critics, and an actor that clones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dppo_fast.algorithms.off_policy import OffPolicy, OffPolicyConfig
from dppo_fast.algorithms.parts import Parts
from dppo_fast.checkpoint import Checkpoint
from dppo_fast.replay import Transitions
from dppo_fast.types import UserError
from tests.algorithms.off_policy import demonstrations, parts, squashed_policy
from tests.small import OBS_SHAPE, collector, distance, gaussian_policy, observations, toy_env, weights


class Cloning(OffPolicy):
    """Values what the env pays and imitates what it did; ``rate`` gradient steps per transition."""

    rate = 0.25

    def __init__(self, config: OffPolicyConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.critic = self.add_critic("critic", parts.value())
        self.target = self.add_target("target", self.critic)
        self.seen: list[Transitions] = []

    @property
    def steps_per_decision(self) -> float:
        return self.rate

    def draws(self, due: tuple[str, ...]) -> dict[str, Tensor]:
        return {"noise": self.randn(self.config.batch_size)}

    def minibatch(
        self, batch: Transitions, draws: Mapping[str, Tensor], due: tuple[str, ...], stop: Tensor
    ) -> dict[str, Tensor]:
        self.seen.append(batch)
        target = batch.reward + self.config.gamma * (1 - batch.terminated) * self.target(batch.next_obs)
        loss = (self.critic(batch.obs) - target + 0.01 * draws["noise"]).square().mean()
        self.descend("critic", loss, stop)
        self.follow(self.target, self.critic, stop)
        metrics = {"loss/critic": loss}
        if "actor" in due:
            actor_loss = self.policy.cloning_loss(batch.obs, batch.action) * self.critic(batch.obs).exp().mean()
            self.descend("actor", actor_loss, stop)
            metrics["loss/actor"] = actor_loss
        return metrics


def learner(n_steps: int = 2, **config: Any) -> Cloning:
    """Of batches of 8 from 2 decisions of 4 envs an iteration."""
    return Cloning(OffPolicyConfig(**{"batch_size": 8, **config}), parts(gaussian_policy(), n_steps=n_steps))


def trained(algorithm: OffPolicy, iterations: int) -> list[dict[str, Any]]:
    """The metrics of some iterations in the toy environment."""
    collect = collector(toy_env(), algorithm.actor).collect
    rows = []
    for iteration in range(iterations):
        collect(algorithm.buffer)
        rows.append(algorithm.update(iteration))
    return rows


@pytest.mark.parametrize("rate", [0.25, 0.05, 1.3])
def test_fractions_of_a_gradient_step_add_up(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    monkeypatch.setattr(Cloning, "rate", rate)
    algorithm = learner()
    numbers = [step for iteration in range(10) for step in algorithm.steps(iteration)]
    assert numbers == list(range(int(10 * 8 * rate)))
    assert max(len(algorithm.steps(i)) for i in range(10)) <= 8 * rate + 1


def test_a_minibatch_is_drawn_from_all_that_was_collected() -> None:
    algorithm = learner(n_steps=4)
    trained(algorithm, 6)
    assert len(algorithm.replay) == 6 * 16
    stored = algorithm.replay.data["reward"][:96]
    seen = torch.cat([batch.reward for batch in algorithm.seen])
    assert torch.isin(seen, stored).all()
    assert torch.isin(stored[:16], seen[-64:]).any()


def test_exploration_is_uniform_and_nothing_is_learned() -> None:
    algorithm = learner(n_steps=4, n_explore_steps=8)
    before = weights(algorithm.policy, *algorithm.networks.values())
    rows = trained(algorithm, 2)
    assert distance(before, weights(algorithm.policy, *algorithm.networks.values())) == 0
    assert [row["replay/gradient_steps"] for row in rows] == [0, 0]
    action = algorithm.replay.data["action"][:32].flatten()
    assert action.abs().max() <= 1
    assert abs(action.mean()) < 0.1
    assert abs(action.square().mean() - 1 / 3) < 0.05
    assert trained(algorithm, 3)[2]["replay/gradient_steps"] == 4


def test_exploration_ends_and_does_not_concern_evaluation() -> None:
    algorithm = learner(n_explore_steps=1)
    obs = observations(4)
    policy = copy.deepcopy(algorithm.policy)
    assert torch.equal(algorithm.actor.act(obs, True).action, policy.act(obs, True).action)
    assert algorithm.actor.noise.step == 0
    assert not torch.equal(algorithm.actor.act(obs).action, copy.deepcopy(policy).act(obs).action)
    policy.noise.step = 1
    assert torch.equal(algorithm.actor.act(obs).action, policy.act(obs).action)


def test_only_critics_learn_while_they_warm_up() -> None:
    algorithm = learner(n_critic_warmup_itr=2)
    actor, critic = weights(algorithm.policy), weights(algorithm.critic)
    rows = trained(algorithm, 2)
    assert distance(actor, weights(algorithm.policy)) == 0
    assert distance(critic, weights(algorithm.critic)) > 0
    assert not any("loss/actor" in row for row in rows)
    algorithm.update(2)
    assert distance(actor, weights(algorithm.policy)) > 0


def test_metrics_are_means_over_the_minibatches_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, losses = learner(n_steps=8), iter(range(8))
    monkeypatch.setattr(algorithm, "actor_steps", lambda step: step % 2)

    def minibatch(batch: Any, draws: Any, due: tuple[str, ...], stop: Tensor) -> dict[str, Tensor]:
        loss = torch.tensor(float(next(losses)))
        return {"loss/critic": loss} | ({"loss/actor": 10 * loss} if "actor" in due else {})

    monkeypatch.setattr(algorithm, "minibatch", minibatch)
    (row,) = trained(algorithm, 1)
    assert row["loss/critic"] == sum(range(8)) / 8
    assert row["loss/actor"] == 10 * (1 + 3 + 5 + 7) / 4


def test_rewards_are_scaled_wherever_they_come_from() -> None:
    algorithm = learner(scale_reward_factor=0.5)
    algorithm.add_offline(parts(gaussian_policy()))
    trained(algorithm, 1)
    batch, sources = algorithm.seen[0], algorithm.replays
    original = torch.cat([sources[name].data["reward"][: len(sources[name])] for name in ("replay", "offline")])
    assert torch.isin(batch.reward / 0.5, original).all()
    assert algorithm.sources(0) == {"replay": 4, "offline": 4}
    assert len(batch.reward) == 8


def test_a_step_computes_nobody_elses_gradients() -> None:
    """The actor's loss goes through the critic."""
    algorithm = learner()
    trained(algorithm, 1)
    before = weights(algorithm.critic)
    for parameter in algorithm.critic.parameters():
        parameter.grad = None
    value = (
        algorithm.critic({"state": observations(3)["state"]}).mean()
        * next(algorithm.policy.actor_ft.parameters()).sum()
    )
    algorithm.descend("actor", value, torch.zeros(()))
    assert all(parameter.grad is None for parameter in algorithm.critic.parameters())
    assert distance(before, weights(algorithm.critic)) == 0


def test_a_stopped_minibatch_changes_nothing() -> None:
    """As the warm-up calls of a CUDA graph need."""
    algorithm = learner(target_ema_rate=0.5)
    trained(algorithm, 1)
    before = weights(algorithm.policy, *algorithm.networks.values())
    batch = algorithm.replay.sample(8)
    for stop in (1.0, 0.0):
        algorithm.minibatch(batch, algorithm.draws(("critic",)), ("critic", "actor"), torch.tensor(stop))
        moved = distance(before, weights(algorithm.policy, *algorithm.networks.values()))
        assert (moved > 0) == (stop == 0)


def test_targets_follow_at_the_given_rate() -> None:
    algorithm = learner(target_ema_rate=0.25)
    with torch.no_grad():
        for parameter in algorithm.critic.parameters():
            parameter.add_(4.0)
    expected = [value + 1 for value in weights(algorithm.target)]
    algorithm.follow(algorithm.target, algorithm.critic, torch.zeros(()))
    assert distance(expected, weights(algorithm.target)) < 1e-6


def test_a_restored_learner_goes_on_exactly(tmp_path: Any) -> None:
    algorithm, copied = learner(), learner()
    trained(algorithm, 3)
    state = {
        "algorithm": algorithm.state_dict(),
        "replay": algorithm.replay.changes(),
        "generator": algorithm.generator.get_state(),
    }
    stored = {name: module.state_dict() for name, module in algorithm.modules().items()}
    Checkpoint(stored, state, {}, 3).save(tmp_path / "a.safetensors")
    loaded = Checkpoint.load(tmp_path / "a.safetensors")
    for name, module in copied.modules().items():
        module.load_state_dict(loaded.weights[name])
    copied.load_state_dict(loaded.state["algorithm"])
    copied.replay.apply(loaded.state["replay"])
    copied.generator.set_state(loaded.state["generator"])
    copied.policy.noise.step = algorithm.policy.noise.step
    rows = []
    for learning in (algorithm, copied):
        learning.policy.generator = learning.generator
        rows.append(trained(learning, 1)[0])
    assert float(rows[0]["loss/critic"]) == float(rows[1]["loss/critic"])
    assert distance(weights(*algorithm.modules().values()), weights(*copied.modules().values())) == 0


def test_memory_is_that_of_the_tensors() -> None:
    algorithm = learner(buffer_size=50)
    trained(algorithm, 1)
    told = algorithm.memory({"state": OBS_SHAPE})
    assert told["replay"] == sum(value.nbytes for value in algorithm.replay.data.values())
    learned = [*algorithm.policy.actor_ft.parameters(), *algorithm.critic.parameters()]
    assert told["weights"] > 3 * sum(p.nbytes for p in learned)


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 0), ("gamma", 1.5), ("target_ema_rate", 0), ("buffer_size", 0)]
)
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"algorithm\.{key}={value}"):
        OffPolicyConfig(**{key: value})


def test_parts_make_different_critics() -> None:
    made = parts(squashed_policy())
    assert distance(weights(made.action_value()), weights(made.action_value())) > 0
    assert made.trajectories().states.shape == demonstrations().states.shape
