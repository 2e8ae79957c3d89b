"""IDQL: its losses and samples against the reference's, and how it chooses among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.idql import IDQL, IDQLConfig
from dppo_fast.replay import Transitions
from tests.algorithms.diffusion_q import golden, small
from tests.algorithms.off_policy import check_capturable, golden_transitions
from tests.golden_files import Case, golden_cases
from tests.golden_models import check_gradients
from tests.golden_models import observations as golden_observations
from tests.small import collector, distance, observations, toy_env, weights
from tests.tolerances import FORWARD, LOSS, SAMPLE

CASES = golden_cases("08_diffusion_q", lambda case: case.name.startswith("idql"))


def idql(**config: Any) -> IDQL:
    return small(IDQL, IDQLConfig, **config)


def idql_of(case: Case, **config: Any) -> IDQL:
    return golden(IDQL, IDQLConfig, case, **config)


@pytest.mark.parametrize("case", CASES)
def test_advantages(case: Case) -> None:
    LOSS.check(idql_of(case).advantage(golden_transitions(case)), case["advantages"])


@pytest.mark.parametrize("case", CASES)
def test_state_value_loss(case: Case) -> None:
    algorithm = idql_of(case)
    loss = algorithm.value_loss(golden_transitions(case))
    LOSS.check(loss, case["v/loss"])
    loss.backward()
    check_gradients(case.tensors("v/grad/"), nn.ModuleDict({"critic_v": algorithm.state_value}))
    assert all(p.grad is None for p in algorithm.critic.parameters())


@pytest.mark.parametrize("case", CASES)
def test_critic_loss(case: Case) -> None:
    algorithm = idql_of(case)
    loss = algorithm.critic_loss(golden_transitions(case), {})
    LOSS.check(loss, case["q/loss"])
    loss.backward()
    check_gradients(case.tensors("q/grad/"), nn.ModuleDict({"critic_q": algorithm.critic}))
    assert all(p.grad is None for p in algorithm.state_value.parameters())


@pytest.mark.parametrize("case", CASES)
def test_actor_loss(case: Case) -> None:
    algorithm = idql_of(case)
    draws = {"t": case.tensor("actor/t"), "noise": case.tensor("actor/noise")[0]}
    loss = algorithm.actor_loss(golden_transitions(case), draws)
    LOSS.check(loss, case["actor/loss"])
    loss.backward()
    check_gradients(case.tensors("actor/grad/"), nn.ModuleDict({"network": algorithm.policy.actor}))


@pytest.mark.parametrize("case", CASES)
def test_target_update(case: Case) -> None:
    algorithm = idql_of(case, target_ema_rate=0.25)
    algorithm.follow(algorithm.target, algorithm.critic, torch.zeros(()))
    for name, value in case.tensors("after_target_update_0.25/target_q.").items():
        FORWARD.check(algorithm.target.get_parameter(name), value, name)


def candidates(algorithm: IDQL, case: Case, noise: Tensor, deterministic: bool) -> Tensor:
    """Of the draws [S + 1, M * B, Th, Da], those of each sample together."""
    samples = noise.unflatten(1, (-1, len(case["in/state"])))
    return algorithm.candidates(golden_observations(case), samples, deterministic)


@pytest.mark.parametrize("name", ["sample_det", "sample_stoch_argmax"])
@pytest.mark.parametrize("case", CASES)
def test_takes_the_best_sample(case: Case, name: str) -> None:
    algorithm = idql_of(case, use_expectile_exploration=False)
    deterministic = name == "sample_det"
    samples = candidates(algorithm, case, case.tensor(f"{name}/noise"), deterministic)
    chosen = algorithm.choose(
        golden_observations(case), samples, None if deterministic else torch.rand(samples.shape[1])
    )
    SAMPLE.check(samples[chosen, torch.arange(len(chosen))], case[f"{name}/actions"])


@pytest.mark.parametrize("case", CASES)
def test_takes_any_sample_while_exploring(case: Case) -> None:
    """The reference recorded which; all of them are possible, and the cumulated weights lead to each."""
    algorithm, obs = idql_of(case), golden_observations(case)
    draws = case.tensors("sample_stoch_expectile/noise/")
    index = draws.pop(next(name for name in draws if "index" in name))
    samples = candidates(algorithm, case, torch.stack(list(draws.values())), deterministic=False)
    rows = torch.arange(len(index))
    SAMPLE.check(samples[index, rows], case["sample_stoch_expectile/actions"])
    seen = {tuple(algorithm.choose(obs, samples, torch.full((len(rows),), u)).tolist()) for u in (0.0, 1.0)}
    assert seen == {(0,) * len(rows), (len(samples) - 1,) * len(rows)}


def test_better_samples_are_explored_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four samples, which are better than the state's value, have a weight of 0.7 each, the others of 0.3."""
    algorithm = idql()
    q = torch.tensor([1.0, -1.0, 3.0, 0.0])
    monkeypatch.setattr(algorithm, "target_value", lambda obs, action: q.repeat_interleave(4000))
    monkeypatch.setattr(algorithm, "state_value", lambda obs: torch.full((4000,), 0.5))
    uniform = torch.linspace(0, 1, 4000)
    chosen = algorithm.choose(observations(4000), torch.zeros(4, 4000, 4, 2), uniform)
    share = torch.bincount(chosen) / 4000
    assert torch.allclose(share, torch.tensor([0.35, 0.15, 0.35, 0.15]), atol=1e-3)


def test_state_value_is_the_expectile_of_action_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of values 0 and 1, one as frequent as the other, the 0.8-expectile is 0.8: there 0.8 (1 - v) = 0.2 v."""
    algorithm = idql(expectile=0.8)
    value = torch.full((2,), 0.8, requires_grad=True)
    monkeypatch.setattr(algorithm, "target_value", lambda obs, action: torch.tensor([0.0, 1.0]))
    monkeypatch.setattr(algorithm, "state_value", lambda obs: value)
    state = observations(2)
    batch = Transitions(state, torch.zeros(2, 4, 2), torch.zeros(2), state, torch.zeros(2), {})
    algorithm.value_loss(batch).backward()
    assert value.grad is not None
    assert value.grad.sum().abs() < 1e-6


@pytest.mark.parametrize("deterministic", [True, False])
def test_decides_by_the_target_critics(deterministic: bool) -> None:
    """The best of many samples is worth more than the policy's own decision."""
    algorithm, obs = idql(eval_sample_num=8, use_expectile_exploration=False), observations(64)
    act = algorithm.actor.act(obs, deterministic)
    assert algorithm.actor.noise.step == 1
    assert act.record.keys() == (set() if deterministic else {"action"})
    values = [algorithm.target_value(obs, act.action)]
    for _ in range(8):
        values.append(algorithm.target_value(obs, algorithm.policy.act(obs, deterministic).action))
    best, *others = (value.mean() for value in values)
    assert best > max(others) + 3 * torch.stack(others).std()


def test_exploration_explores() -> None:
    """The same state in many envs: a sample that is not the best is taken sometimes."""
    algorithm, obs = idql(eval_sample_num=8), observations(64)
    explored = algorithm.actor.act(obs).action
    algorithm.policy.noise.step = 0
    algorithm.config = IDQLConfig(eval_sample_num=8, use_expectile_exploration=False)
    best = algorithm.actor.act(obs).action
    same = (explored == best).flatten(1).all(1).float().mean()
    assert 0 < same < 0.5


def test_only_critics_learn_while_they_warm_up() -> None:
    algorithm = idql(n_critic_warmup_itr=1)
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    policy, critics = weights(algorithm.policy), [weights(algorithm.critic), weights(algorithm.state_value)]
    algorithm.update(0)
    assert distance(policy, weights(algorithm.policy)) == 0
    assert distance(critics[0], weights(algorithm.critic)) > 0
    assert distance(critics[1], weights(algorithm.state_value)) > 0


def test_gradient_steps_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")  # the C++ ops are for the CPU
    check_capturable(idql())
