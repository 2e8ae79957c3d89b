"""Cal-QL: its losses against the reference's, its two phases, and the rewards-to-go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.calql import CalQL, CalQLConfig
from dppo_fast.optim import LRConfig
from dppo_fast.replay import ReplayBuffer, Transitions
from dppo_fast.types import UserError
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
from tests.small import collector, seeded, toy_env
from tests.tolerances import LOSS

CASES = golden_cases("08_gaussian_q", lambda case: case.name == "calql")


class AsTheReference(CalQL):
    """Subtracts 0.5^d, the density of uniform actions, not its logarithm; and in a batch the log-density of every row's
    action from every row's value, of which the later ones are the next state's.
    """

    def soft_maximum(self, batch: Transitions, draws: Mapping[str, Tensor]) -> Tensor:
        uniform = [self.critic(batch.obs, action) - 0.5 ** math.prod(self.chunk) for action in draws["uniform"]]
        exponents = [torch.stack(uniform, dim=-1)]  # [Q, B, n]
        for obs, noise in zip((batch.obs, batch.next_obs), draws["proposal_noise"], strict=True):
            action, log_density = self.policy.sample_scored(obs, noise)
            q = self.critic(obs, action.detach()).maximum(batch.record["reward_to_go"])
            exponents.append(q[:, :, None] - log_density.detach())  # [Q, B, B]
        return torch.cat(exponents, dim=-1).logsumexp(-1)


def calql(cls: type[CalQL] = CalQL, num_envs: int = 4, **config: Any) -> CalQL:
    """Online from the start unless told otherwise."""
    config = {"batch_size": 8, "n_offline_itr": 0, "num_update": 3, "cql_n_actions": 3, **config}
    return cls(CalQLConfig(**config), parts(squashed_policy(), num_envs=num_envs))


def calql_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> CalQL:
    empty = {"offline": ReplayBuffer(1)}
    empty["offline"].data["record/reward_to_go"] = torch.zeros(1)
    monkeypatch.setattr(CalQL, "add_offline", lambda self, *_: self.replays.update(empty))
    names = ("gamma", "cql_clip_diff_min", "cql_clip_diff_max", "cql_min_q_weight", "cql_n_actions")
    config = CalQLConfig(
        init_temperature=case.cfg["alpha"],
        n_random_actions=case["in/random_actions"].shape[1],
        **{name: case.cfg[name] for name in names},
    )
    algorithm = AsTheReference(config, golden_parts(case))
    weights = case.tensors("w/")
    algorithm.critic.load_state_dict(below(weights, "critic."))
    algorithm.target.load_state_dict(below(weights, "target_critic."))
    return algorithm


def calibrated(batch: Transitions, reward_to_go: Tensor) -> Transitions:
    return batch._replace(record={"reward_to_go": reward_to_go, "discount": torch.zeros_like(reward_to_go)})


def random_batch(algorithm: CalQL) -> tuple[Transitions, dict[str, Tensor]]:
    """A batch of demonstrations, and what a step draws besides."""
    return algorithm.replays["offline"].sample(8, seeded(6)), algorithm.draws(("critic",))


@pytest.mark.parametrize("case", CASES)
def test_critic_loss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the soft maximum, in which the reference is wrong."""
    algorithm = calql_of(case, monkeypatch)
    chunks = case["in/actions"].shape
    draws = {
        "next_noise": case.tensor("critic/noise/000_randn").view(chunks[0], -1, *chunks[1:]).transpose(0, 1),
        "uniform": case.tensor("in/random_actions").transpose(0, 1),
        "proposal_noise": torch.stack(
            [chunk_noise(case, f"critic/noise/{name}") for name in ("001_randn", "002_randn")]
        ),
    }
    loss = algorithm.critic_loss(calibrated(golden_transitions(case), case.tensor("in/returns")), draws)
    LOSS.check(loss, case["critic/loss"])
    loss.backward()
    expected = {name: value for name, value in case.tensors("critic/grad/").items() if name.startswith("critic.")}
    check_gradients(expected, nn.ModuleDict({"critic": algorithm.critic}))


@pytest.mark.parametrize("case", CASES)
def test_actor_loss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = calql_of(case, monkeypatch)
    loss = algorithm.actor_loss(observations(case), chunk_noise(case, "actor/noise"))
    LOSS.check(loss, case["actor/loss"])
    loss.backward()
    check_gradients(case.tensors("actor/grad/"), nn.ModuleDict({"network": algorithm.policy.actor_ft}))


def constant_critic(algorithm: CalQL, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(algorithm, "critic", lambda obs, action: torch.full((2, len(action)), value))


def test_uniform_actions_count_by_their_log_density(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the soft maximum of a constant is the constant plus log (n 2^d + what the policy's actions add). The reference
    subtracts the density, 2^-d, itself.
    """
    algorithm = calql(n_random_actions=50)
    constant_critic(algorithm, monkeypatch, 3.0)
    batch, draws = random_batch(algorithm)
    batch = calibrated(batch, torch.full_like(batch.reward, -math.inf))
    _, log_density = algorithm.proposals(batch, draws)
    volume = 2.0 ** math.prod(algorithm.chunk)
    expected = 3 + torch.log(50 * volume + (-log_density[50:]).exp().sum(0))
    assert torch.allclose(algorithm.soft_maximum(batch, draws), expected.expand(2, -1), atol=1e-4)


def test_a_row_does_not_see_the_others() -> None:
    """The reference subtracts (B,) from (B, 1), so that every row's loss depends on the whole batch."""
    algorithm = calql()
    batch, draws = random_batch(algorithm)
    everything = algorithm.soft_maximum(batch, draws)
    row = slice(2, 3)
    names = ("uniform", "proposal_noise")
    alone = algorithm.soft_maximum(batch.map(lambda value: value[row]), {name: draws[name][:, row] for name in names})
    assert torch.allclose(alone, everything[:, row], atol=1e-5)
    faulty = calql(AsTheReference)
    assert faulty.soft_maximum(batch, draws).isfinite().all()
    seen = faulty.soft_maximum(batch.map(lambda value: value[row]), {name: draws[name][:, row] for name in names})
    assert not torch.allclose(seen, faulty.soft_maximum(batch, draws)[:, row], atol=1e-2)


def test_all_proposals_are_valued_at_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is over actions at one state; the reference values the next state's action at the next state."""
    algorithm = calql()
    batch, draws = random_batch(algorithm)
    seen = []

    def critic(obs: dict[str, Tensor], action: Tensor) -> Tensor:
        seen.append(obs["state"])
        return torch.zeros(2, len(action)) + action.flatten(1).sum(1)

    monkeypatch.setattr(algorithm, "critic", critic)
    algorithm.soft_maximum(batch, draws)
    assert all(torch.equal(state, batch.obs["state"]) for state in seen)
    actions, _ = algorithm.proposals(batch, draws)
    later, _ = algorithm.policy.sample_scored(batch.next_obs, draws["proposal_noise"][1])
    assert torch.allclose(actions[-1], later, atol=1e-6)


def test_the_policys_actions_are_worth_the_reward_to_go_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no action is as long as the reward-to-go is unknown, nor are uniform ones."""
    algorithm = calql(scale_reward_factor=0.5)
    constant_critic(algorithm, monkeypatch, 3.0)
    batch, draws = random_batch(algorithm)
    _, log_density = algorithm.proposals(batch, draws)
    for reward_to_go, discount, worth in ((10.0, 0.0, 5.0), (4.0, 0.0, 3.0), (10.0, 0.9, 3.0)):
        record = {
            "reward_to_go": torch.full_like(batch.reward, reward_to_go),
            "discount": torch.full_like(batch.reward, discount),
        }
        q = torch.full_like(log_density, 3.0)
        q[4:] = worth
        found = algorithm.soft_maximum(batch._replace(record=record), draws)
        assert torch.allclose(found, (q - log_density).logsumexp(0).expand(2, -1), atol=1e-5)


def test_the_target_is_the_best_of_several_actions() -> None:
    algorithm = calql(cql_n_actions=5)
    batch, draws = random_batch(algorithm)
    best = torch.full_like(batch.reward, -math.inf)
    for noise in draws["next_noise"]:
        action, _ = algorithm.policy.sample_scored(batch.next_obs, noise)
        best = best.maximum(algorithm.target(batch.next_obs, action).amin(0))
    expected = batch.reward + algorithm.config.gamma * (1 - batch.terminated) * best
    assert torch.allclose(algorithm.backup(batch, draws), expected, atol=1e-5)


def test_conservative_critics_doubt_what_nobody_tried() -> None:
    """Trained on demonstrations alone, they value these more than random actions; without the term they do not."""

    def gap(weight: float) -> float:
        rates = {"critic_lr_scheduler": LRConfig(min_lr=1e-2), "scale_reward_factor": 1e-3}
        algorithm = calql(n_offline_itr=1, num_update=50, cql_min_q_weight=weight, **rates)
        algorithm.update(0)
        batch, draws = random_batch(algorithm)
        with torch.no_grad():
            tried, random = (algorithm.critic(batch.obs, action) for action in (batch.action, draws["uniform"][0]))
        return float((tried - random).mean())

    assert gap(5.0) > 2 + gap(0.0)


def test_demonstrations_first_and_the_environment_then() -> None:
    algorithm = calql(n_offline_itr=2, online_utd_ratio=0.5)
    collect = collector(toy_env(), algorithm.actor).collect
    assert [algorithm.steps_to_collect(i) for i in range(4)] == [0, 0, 8, 8]
    assert [len(algorithm.steps(i)) for i in range(4)] == [3, 3, 16, 16]
    assert [algorithm.sources(i) for i in range(1, 3)] == [{"offline": 8}, {"replay": 4, "offline": 4}]
    sizes = []
    for iteration in range(4):
        if algorithm.steps_to_collect(iteration):
            collect(algorithm.buffer)
        metrics = algorithm.update(iteration)
        assert math.isfinite(metrics["loss/critic"])
        sizes.append(metrics["replay/size"])
    assert sizes == [0, 0, 32, 64]


def test_rewards_to_go_are_caught_up_with() -> None:
    """Collected in pieces of 3 decisions, they are in the end what whole episodes say."""
    algorithm = calql(online_utd_ratio=1e-3)
    algorithm.buffer = type(algorithm.buffer)(3, 4)
    gamma = algorithm.config.gamma
    collect = collector(toy_env(), algorithm.actor).collect
    rewards, ends = [], []
    for _ in range(6):
        collect(algorithm.buffer)
        rewards.append(algorithm.buffer.reward.clone())
        ends.append(algorithm.buffer.terminated | algorithm.buffer.truncated)
        algorithm.store()
    reward, ended = torch.cat(rewards), torch.cat(ends)
    expected, known = torch.zeros_like(reward), torch.zeros_like(ended)
    worth, over = torch.zeros(4), torch.zeros(4, dtype=torch.bool)
    for t in reversed(range(len(reward))):
        worth = reward[t] + gamma * torch.where(ended[t], 0.0, worth)
        over = over | ended[t]
        expected[t], known[t] = worth, over
    stored = {name: algorithm.replay.data[f"record/{name}"][:72].view(18, 4) for name in ("reward_to_go", "discount")}
    assert known.any(), "an episode ends"
    assert not known.all(), "and one goes on"
    assert torch.equal(stored["discount"] == 0, known)
    assert torch.allclose(stored["reward_to_go"], expected, atol=1e-4)


def test_an_episode_that_the_trainer_cuts_off_is_over() -> None:
    algorithm = calql(online_utd_ratio=1e-3)
    collecting = collector(toy_env(done_at={}, limit_at={}), algorithm.actor)
    collecting.collect(algorithm.buffer)
    algorithm.store()
    before = algorithm.replay.data["record/reward_to_go"][:32].clone()
    collecting.reset()
    collecting.collect(algorithm.buffer)
    algorithm.store()
    record = {name: algorithm.replay.data[f"record/{name}"][:32] for name in ("reward_to_go", "discount")}
    assert torch.equal(record["reward_to_go"], before)
    assert (record["discount"] == 0).all()


def test_caught_up_rewards_to_go_are_in_the_checkpoint() -> None:
    algorithm = calql(online_utd_ratio=1e-3)
    collect = collector(toy_env(), algorithm.actor).collect
    copy = ReplayBuffer(algorithm.replay.capacity)
    for _ in range(3):
        collect(algorithm.buffer)
        algorithm.store()
        copy.apply(algorithm.replay.changes())
    for path, value in algorithm.replay.data.items():
        assert torch.equal(copy.data[path][: len(copy)], value[: len(copy)]), path


def test_demonstrated_rewards_to_go_are_known() -> None:
    algorithm = calql(gamma=1.0)
    record = algorithm.replays["offline"].gather(torch.tensor([0])).record
    assert record["discount"] == 0
    length = demonstrations().traj_lengths[0]
    assert record["reward_to_go"] == sum(range(length))


@pytest.mark.parametrize(
    ("key", "value"), [("n_random_actions", 0), ("cql_min_q_weight", -1), ("cql_clip_diff_min", math.nan)]
)
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"algorithm\.{key}={value}"):
        CalQLConfig(**{key: value})


def test_gradient_steps_can_be_captured() -> None:
    check_capturable(calql())
