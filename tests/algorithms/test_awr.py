"""Advantage-weighted regression: its values, weights and losses against the reference's, and its buffer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dppo_fast.advantage import estimate_advantages
from dppo_fast.algorithms.awr import AWR, AWRConfig
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.policies.base import Policy
from dppo_fast.replay import Transitions
from dppo_fast.types import Obs, UserError
from tests.algorithms.off_policy import check_capturable, parts
from tests.golden_files import Case, golden_cases
from tests.golden_models import below, check_gradients, critic_mlp, load_critic, shapes_of
from tests.small import collector, diffusion_policy, distance, gaussian_policy, toy_env, weights
from tests.tolerances import FORWARD, LOSS

CRITIC = golden_cases("08_rwr_awr", lambda case: case.name == "awr")
VALUES = golden_cases("08_rwr_awr", lambda case: case.name == "td_values")
WEIGHTS = golden_cases("08_rwr_awr", lambda case: case.name == "awr_weight")

MAKERS: list[Callable[[], Policy]] = [gaussian_policy, lambda: diffusion_policy(ft_denoising_steps=0)]
both = pytest.mark.parametrize("make", MAKERS, ids=["gaussian", "diffusion"])


def awr(policy: Policy | None = None, n_steps: int = 8, **config: Any) -> AWR:
    """In 4 environments; 4 steps of the actor for one of the critic."""
    options = {"batch_size": 8, "replay_ratio": 2, **config}
    return AWR(AWRConfig(**options), parts(policy or gaussian_policy(), n_steps=n_steps))


def collected(algorithm: AWR, iterations: int = 1) -> AWR:
    """After some iterations' rollouts, stored but not learned from."""
    collect = collector(toy_env(), algorithm.actor).collect
    for _ in range(iterations):
        collect(algorithm.buffer)
        algorithm.store()
    return algorithm


class Told(nn.Module):
    """A critic that finds a state's value in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, obs: Obs) -> Tensor:
        return obs["state"].flatten() * self.scale


@pytest.mark.parametrize(("name", "gamma", "alpha", "lam"), [("td", 0.99, 0.95, 0.95), ("td_g9_a8_l7", 0.9, 0.8, 0.7)])
@pytest.mark.parametrize("case", VALUES)
def test_values(case: Case, name: str, gamma: float, alpha: float, lam: float) -> None:
    """What follows the last step is worth as much as the last step itself in the reference."""
    T, N = case["rewards"].shape
    config = AWRConfig(gamma=gamma, td_alpha=alpha, td_lambda=lam, buffer_size=T)
    algorithm = AWR(config, parts(gaussian_policy(), n_steps=T, num_envs=N, value=Told))
    buffer = algorithm.buffer
    buffer.obs = {"state": case.tensor("state_values")[..., None, None]}
    buffer.last_obs = {"state": buffer.obs["state"][-1]}
    buffer.record = {"action": torch.zeros(T, N, 4, 2)}
    buffer.reward.copy_(case.tensor("rewards"))
    buffer.terminated.copy_(case.tensor("terminateds"))
    algorithm.store()
    algorithm.estimate()
    FORWARD.check(algorithm.target.view(T, N), case[name])


@pytest.mark.parametrize("case", CRITIC)
def test_critics_error_is_each_rows_own(case: Case) -> None:
    """The reference compares every value with every target: values (B, 1) against targets (B,)."""
    own = case.tensors("w/")
    shapes = shapes_of(below(own, "critic."))
    algorithm = AWR(AWRConfig(), parts(gaussian_policy(), value=lambda: critic_mlp(shapes)))
    load_critic(own, algorithm.critic)
    column = case.file.case("awr_column_adv")
    state, target = {"state": case.tensor("in/state")}, case.tensor("in/advantages")
    B = len(target)
    empty = torch.zeros(B)
    batch = Transitions(state, empty, empty, state, empty, {"valid": torch.ones(B)})
    loss = algorithm.critic_loss(batch, target)
    assert abs(loss.item() - float(case["loss_critic"])) > 1e-2
    LOSS.check(loss, column["loss_critic"])
    loss.backward()
    check_gradients(column.tensors("grad/"), nn.ModuleDict({"critic": algorithm.critic}))


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case: Case) -> None:
    algorithm = awr(beta=float(case["beta"]), max_adv_weight=float(case["max"]))
    FORWARD.check(algorithm.weights(case.tensor("advantages")), case["weight"])


def test_the_critic_sees_all_rows() -> None:
    """The reference draws a row among as many as there are steps, whatever the number of envs."""
    algorithm = awr(n_steps=4, replay_ratio=100, critic_update_ratio=1)
    seen: dict[str, set[int]] = {"critic": set(), "actor": set()}
    learn = algorithm.learn.function

    def observed(inputs: Any, due: tuple[str, ...]) -> Tensor:
        seen[due[0]].update(inputs["rows/replay"].tolist())
        return learn(inputs, due)

    algorithm.learn.function = observed
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    algorithm.update(0)
    assert seen == {"critic": set(range(16)), "actor": set(range(16))}


def test_truncated_episodes_end_with_the_value_of_their_last_observation() -> None:
    """As the advantages of PPO do; the reference goes on into the next episode."""
    algorithm = awr(td_alpha=1.0, td_lambda=0.9, scale_reward_factor=0.5)
    collected(algorithm)
    buffer = algorithm.buffer
    assert buffer.truncated.any()
    assert buffer.terminated.any()
    algorithm.estimate()
    expected = estimate_advantages(buffer, algorithm.critic, 0.5 * buffer.reward, 0.99, 0.9)
    torch.testing.assert_close(algorithm.advantage[:32].view(8, 4), expected.advantage)
    torch.testing.assert_close(algorithm.target[:32].view(8, 4), expected.returns)


def test_old_rollouts_are_valued_anew_wherever_they_are_in_the_buffer() -> None:
    """Each as if it were alone, and the oldest decisions of one that is partly gone among the others."""
    algorithm = awr(n_steps=3, buffer_size=7, td_alpha=1.0)
    collect = collector(toy_env(), algorithm.actor).collect
    expected = []
    for _ in range(4):
        collect(algorithm.buffer)
        algorithm.store()
        expected.append(estimate_advantages(algorithm.buffer, algorithm.critic, algorithm.buffer.reward, 0.99, 0.95))
    algorithm.estimate()
    assert len(algorithm.replay) == 7 * 4
    newest = torch.cat([rollout.advantage for rollout in expected])[-7:]
    start = algorithm.replay.head // 4
    torch.testing.assert_close(algorithm.advantage.view(7, 4).roll(-start, 0), newest)


def test_the_actor_learns_by_what_the_fitted_critic_says(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = awr()
    order: list[str] = []
    estimate, minibatch = algorithm.estimate, algorithm.minibatch
    monkeypatch.setattr(algorithm, "estimate", lambda: order.append("estimate") or estimate())
    monkeypatch.setattr(
        algorithm,
        "minibatch",
        lambda batch, draws, due, stop: order.append(due[0]) or minibatch(batch, draws, due, stop),
    )
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    metrics = algorithm.update(0)
    assert order == ["estimate", "critic", "critic", "estimate", *["actor"] * 8]
    assert {"loss/critic", "loss/actor"} <= metrics.keys()


def test_fractions_of_a_critics_step_add_up() -> None:
    algorithm = awr(n_steps=1, replay_ratio=6, critic_update_ratio=4)
    collected(algorithm)
    due = [name for iteration in range(8) for (name,) in algorithm.plan(iteration)]
    assert due.count("actor") == 24
    assert due.count("critic") == 6


def test_the_critic_warms_up_alone() -> None:
    algorithm = collected(awr(n_critic_warmup_itr=1))
    assert {name for (name,) in algorithm.plan(0)} == {"critic"}
    assert {name for (name,) in algorithm.plan(1)} == {"critic", "actor"}


@both
def test_failed_steps_weigh_nothing(make: Callable[[], Policy]) -> None:
    """They stay in the buffer, which keeps whole steps."""
    learned = []
    for change in (0.0, 5.0):
        algorithm = awr(make())
        collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
        buffer = algorithm.buffer
        buffer.truncated[2, 0], buffer.valid[2, 0], buffer.invalid = True, False, True
        buffer.record["action"][2, 0] += change
        algorithm.update(0)
        assert len(algorithm.replay) == 32
        learned.append(weights(algorithm.policy, algorithm.critic))
    assert distance(*learned) == 0


def test_the_weight_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose weights are 0 but for one row's has that row's loss."""
    algorithm = collected(awr())
    batch = algorithm.replay.gather(torch.arange(8))
    monkeypatch.setattr(algorithm, "weights", lambda advantage: torch.eye(8)[3] * 2)
    loss = algorithm.actor_loss(batch, torch.zeros(8), {})
    alone = algorithm.policy.cloning_loss({"state": batch.obs["state"][3, None]}, batch.action[3, None])
    torch.testing.assert_close(loss, alone * 2 / 8)


@both
def test_gradient_steps_can_be_captured(make: Callable[[], Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")
    check_capturable(awr(make()))


def test_a_restored_learner_goes_on_exactly() -> None:
    learners = [collected(awr()) for _ in range(2)]
    collector(toy_env(), learners[0].actor).collect(learners[0].buffer)
    learners[0].update(0)
    state = copy.deepcopy(learners[0].state_dict())
    for name, module in learners[1].modules().items():
        module.load_state_dict(learners[0].modules()[name].state_dict())
    learners[1].load_state_dict(state)
    learners[1].replay = learners[1].replays["replay"] = copy.deepcopy(learners[0].replay)
    learners[1].generator.set_state(learners[0].generator.get_state())
    fresh = RolloutBuffer(8, 4)
    collector(toy_env(), gaussian_policy()).collect(fresh)
    for learner in learners:
        learner.buffer = fresh
        learner.update(1)
    assert distance(*(weights(*learner.modules().values()) for learner in learners)) == 0


def test_the_buffer_keeps_the_newest_steps_of_all_envs() -> None:
    algorithm = collected(awr(buffer_size=10), iterations=2)
    assert algorithm.replay.capacity == 40
    newest = algorithm.buffer.reward.flatten()
    rows = (algorithm.replay.head - np.arange(32, 0, -1)) % 40
    assert torch.equal(algorithm.replay.data["reward"][torch.from_numpy(rows)], newest)


def test_partly_fine_tuned_chains_are_refused() -> None:
    with pytest.raises(UserError, match=r"ft_denoising_steps=2: .* use 0"):
        AWR(AWRConfig(), parts(diffusion_policy()))


@pytest.mark.parametrize(
    ("key", "value"), [("beta", -1.0), ("max_adv_weight", 0), ("batch_size", 1), ("td_lambda", 1.5), ("gamma", 0)]
)
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"algorithm\.{key}={value}"):
        AWRConfig(**{key: value})
