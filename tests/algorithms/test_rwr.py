"""Reward-weighted regression: its weights and losses against the reference's, and which decisions it learns from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.rwr import RWR, RWRConfig, reward_to_go, standardised
from dppo_fast.algorithms.weighted import exponential_weights, weighted_loss
from dppo_fast.networks.mlp import GaussianMLP
from dppo_fast.optim import LRConfig
from dppo_fast.policies.base import Policy
from dppo_fast.policies.gaussian import GaussianConfig, GaussianPolicy
from dppo_fast.types import UserError
from tests.algorithms.off_policy import parts
from tests.golden_files import Case, golden_cases
from tests.golden_models import (
    base_weights,
    check_gradients,
    diffusion_cases,
    gaussian_mlp_options,
    observations,
    shapes_of,
)
from tests.golden_models import diffusion_policy as golden_policy
from tests.small import collector, diffusion_policy, distance, gaussian_policy, seeded, toy_env, weights
from tests.test_zero_waste import no_host_sync
from tests.tolerances import FORWARD, LOSS, SAMPLE, TABLE

DIFFUSION = diffusion_cases("08_rwr_awr")
GAUSSIAN = golden_cases("08_gaussian_q", lambda case: case.name.startswith("rwr_gaussian") and "loss" in case)
WEIGHTS = golden_cases("08_rwr_awr", lambda case: case.name == "rwr_weight")

MAKERS: list[Callable[[], Policy]] = [gaussian_policy, lambda: diffusion_policy(ft_denoising_steps=0)]
both = pytest.mark.parametrize("make", MAKERS, ids=["gaussian", "diffusion"])


def rwr(policy: Policy, **config: Any) -> RWR:
    """After 8 decisions of 4 envs, whose episodes have 2, 3 and 4 decisions and then go on."""
    algorithm = RWR(RWRConfig(**{"batch_size": 8, "update_epochs": 2, **config}), parts(policy))
    collector(toy_env(), algorithm.actor).collect(algorithm.buffer)
    return algorithm


def rows_of(algorithm: RWR) -> Tensor:
    return algorithm.finished().nonzero().squeeze(-1)


@pytest.mark.parametrize("case", DIFFUSION)
def test_loss_of_a_diffusion_policy(case: Case) -> None:
    policy = golden_policy(case.cfg, case.tensors("w/"))
    draws = {"t": case.tensor("in/t"), "noise": case.tensor("noise")[0]}
    loss = weighted_loss(policy, observations(case), case.tensor("in/x_start"), case.tensor("in/rewards"), draws)
    LOSS.check(loss, case["loss"])
    loss.backward()
    check_gradients(case.tensors("grad/"), nn.ModuleDict({"network": policy.actor}))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", DIFFUSION)
def test_samples(case: Case, deterministic: bool) -> None:
    policy = golden_policy(case.cfg, case.tensors("w/"))
    prefix = "sample_det" if deterministic else "sample_stoch"
    chain = policy.sample(observations(case), case.tensor(f"{prefix}/noise"), deterministic)
    SAMPLE.check(chain.action, case[f"{prefix}/actions"])


@pytest.mark.parametrize("case", GAUSSIAN)
def test_loss_of_a_gaussian(case: Case) -> None:
    own = base_weights(case.tensors("w/"))
    horizon_steps, action_dim = case["in/actions"].shape[1:]
    dims = {"action_dim": action_dim, "horizon_steps": horizon_steps}
    network = GaussianMLP(**gaussian_mlp_options(shapes_of(own)) | dims)
    network.load_state_dict(own)
    policy = GaussianPolicy(network, GaussianConfig(), horizon_steps, action_dim)
    loss = weighted_loss(policy, observations(case), case.tensor("in/actions"), case.tensor("in/reward_weights"), {})
    LOSS.check(loss, case["loss"])


@both
def test_batches_of_more_than_one_decision(make: Callable[[], Policy]) -> None:
    """The reference takes a Gaussian's number of observations for the batch size, and crashes above 1."""
    policy = make()
    buffer = rwr(policy).buffer
    obs, action, weight = {"state": buffer.obs["state"][0]}, buffer.record["action"][0], torch.arange(4.0)
    draws = policy.cloning_draws(4)

    def loss(rows: slice) -> Tensor:
        state, drawn = {"state": obs["state"][rows]}, {name: value[rows] for name, value in draws.items()}
        return weighted_loss(policy, state, action[rows], weight[rows], drawn)

    single = torch.stack([loss(slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(loss(slice(None)), single.mean())
    assert single.unique().numel() == 4


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case: Case) -> None:
    """Of the episodes that the reference counts, those of more than one decision."""
    reward, over = case.tensor("rewards"), case.tensor("firsts")[1:] > 0
    to_go = reward_to_go(reward, over, float(case["gamma"]))
    returns = torch.cat([to_go[start : end + 1, env] for env, start, end in case["episodes_env_start_end"]])
    counted = torch.ones_like(returns, dtype=torch.bool)
    TABLE.check(standardised(returns, counted), case["returns_normalized"])
    among = torch.cat([returns, torch.full((3,), torch.nan)])
    torch.testing.assert_close(standardised(among, among.isfinite())[:-3], standardised(returns, counted))
    scores = standardised(returns, counted).float()
    FORWARD.check(exponential_weights(scores, float(case["beta"]), float(case["max"])), case["weight"])


def test_returns_end_with_their_episode() -> None:
    reward = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    over = torch.tensor([[False], [True], [True], [False], [False]])
    expected = torch.tensor([[2.0], [2.0], [4.0], [16.0], [16.0]])
    torch.testing.assert_close(reward_to_go(reward, over, 0.5), expected)


def test_episodes_of_one_decision_count_and_unfinished_ones_do_not() -> None:
    """The reference leaves the first out; the ends of episodes that began an iteration earlier, too."""
    algorithm = rwr(gaussian_policy())
    buffer = algorithm.buffer
    buffer.terminated.zero_()
    buffer.truncated.zero_()
    buffer.terminated[0, 0] = buffer.truncated[3, 1] = buffer.terminated[7, 2] = True
    expected = torch.zeros(8, 4, dtype=torch.bool)
    expected[:1, 0] = expected[:4, 1] = expected[:8, 2] = True
    assert torch.equal(algorithm.finished(), expected.flatten())


@both
def test_episodes_of_a_failing_simulator_are_left_out(make: Callable[[], Policy]) -> None:
    learned = []
    for garbage in (0.0, torch.nan):
        policy = make()
        algorithm = rwr(policy)
        buffer = algorithm.buffer
        buffer.truncated[1:3, 0] = True
        buffer.terminated[1:3, 0] = False
        buffer.valid[2, 0] = False
        buffer.invalid = True
        buffer.record["action"][2, 0] = garbage
        assert algorithm.finished()[[1 * 4, 2 * 4]].tolist() == [True, False]
        algorithm.update(0)
        learned.append(weights(policy))
    assert distance(*learned) == 0


def test_decisions_with_unknown_ends_are_not_learned_from() -> None:
    """Their actions are replaced by garbage."""
    algorithm = rwr(gaussian_policy())
    kept = algorithm.finished()
    assert 0 < kept.sum() < 32
    algorithm.buffer.record["action"].flatten(0, 1)[~kept] = torch.nan
    algorithm.update(0)
    assert all(torch.isfinite(parameter).all() for parameter in weights(algorithm.policy))


def test_an_iteration_without_an_end_changes_nothing() -> None:
    algorithm = rwr(gaussian_policy())
    algorithm.buffer.terminated.zero_()
    algorithm.buffer.truncated.zero_()
    before = weights(algorithm.policy)
    metrics = algorithm.update(0)
    assert metrics["rwr/decisions"] == 0
    assert metrics["loss/actor"] == 0
    assert distance(before, weights(algorithm.policy)) == 0


def test_every_epoch_visits_every_decision_but_an_incomplete_last_minibatch() -> None:
    algorithm = rwr(gaussian_policy(), batch_size=6, update_epochs=3)
    visited: list[Tensor] = []
    learn = algorithm.learn.function
    algorithm.learn.function = lambda inputs, key: visited.append(inputs["rows"]) or learn(inputs, key)
    algorithm.update(0)
    rows = rows_of(algorithm)
    per_epoch = len(rows) // 6
    assert len(rows) % 6
    assert len(visited) == 3 * per_epoch
    for epoch in range(3):
        seen = torch.cat(visited[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert len(seen.unique()) == 6 * per_epoch
        assert torch.isin(seen, rows).all()


@both
def test_better_decisions_become_likelier(make: Callable[[], Policy]) -> None:
    policy = make()
    algorithm = rwr(policy, update_epochs=40, beta=3.0, lr_scheduler=LRConfig(min_lr=1e-2), batch_size=32)
    buffer, rows = algorithm.buffer, rows_of(algorithm)
    start = copy.deepcopy(policy)
    algorithm.update(0)
    best, worst = rows[algorithm.weight[rows].argsort()][[-1, 0]]

    def error(policy: Policy, row: Tensor) -> float:
        policy.generator = seeded(0)
        stored = buffer.obs["state"], buffer.record["action"]
        state, action = (value.flatten(0, 1)[row].expand(500, -1, -1) for value in stored)
        return policy.cloning_loss({"state": state}, action).item()

    assert error(policy, best) < error(start, best)
    assert error(policy, best) - error(start, best) < error(policy, worst) - error(start, worst)


@both
def test_gradient_steps_can_be_captured(make: Callable[[], Policy]) -> None:
    """The host waits for nothing in them, and nothing is drawn."""
    algorithm = rwr(make())
    learn = algorithm.learn.function

    def watched(inputs: Any, key: None) -> Tensor:
        before = algorithm.generator.get_state(), algorithm.policy.generator.get_state(), torch.get_rng_state()
        with no_host_sync():
            loss = learn(inputs, key)
        after = algorithm.generator.get_state(), algorithm.policy.generator.get_state(), torch.get_rng_state()
        assert all(torch.equal(*states) for states in zip(before, after, strict=True))
        return loss

    algorithm.update(0)
    algorithm.learn.function = watched
    algorithm.update(1)


@both
@pytest.mark.parametrize("ends", [(0, 0), (1, 0), (8, 4)], ids=["no episode ended", "one", "all"])
def test_no_waiting_inside_an_update(
    make: Callable[[], Policy], ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the host of a GPU, whose tensors the C++ ops are not for."""
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")
    algorithm = rwr(make())
    end_episodes(algorithm, *ends)
    algorithm.on_host = False
    with no_host_sync():
        metrics = algorithm.update(0)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())


@pytest.mark.parametrize("ends", [(0, 0), (1, 1), (2, 2), (3, 3), (5, 4), (8, 4)])
@pytest.mark.parametrize("batch_size", [1, 6, 8, 100])
def test_what_a_gpu_learns_is_what_a_cpu_learns(ends: tuple[int, int], batch_size: int) -> None:
    """Whose minibatches end with the decisions to learn from; others hold garbage."""
    learned = []
    for on_host in (True, False):
        algorithm = rwr(gaussian_policy(), batch_size=batch_size)
        end_episodes(algorithm, *ends)
        algorithm.buffer.record["action"].flatten(0, 1)[~algorithm.finished()] = torch.nan
        algorithm.on_host = on_host
        metrics = algorithm.update(0)
        learned.append(weights(algorithm.policy) + [torch.as_tensor(value).float() for value in metrics.values()])
    torch.testing.assert_close(*learned)


def end_episodes(algorithm: RWR, step: int, envs: int) -> None:
    """The first ``envs`` envs have one episode each, of ``step`` decisions; of the others nothing is known."""
    algorithm.buffer.terminated.zero_()
    algorithm.buffer.truncated.zero_()
    if step:
        algorithm.buffer.terminated[step - 1, :envs] = True


def test_a_stopped_step_changes_nothing() -> None:
    """As the warm-up calls of a CUDA graph need."""
    algorithm = rwr(gaussian_policy())
    algorithm.update(0)
    before = weights(algorithm.policy)
    rows = rows_of(algorithm)
    algorithm.learn({"rows": rows, "counted": torch.ones(len(rows), dtype=torch.bool), "stop": torch.ones(())}, None)
    assert distance(before, weights(algorithm.policy)) == 0


def test_a_restored_learner_goes_on_exactly() -> None:
    learners = [rwr(gaussian_policy()) for _ in range(2)]
    learners[0].update(0)
    learners[1].policy.load_state_dict(learners[0].policy.state_dict())
    learners[1].load_state_dict(copy.deepcopy(learners[0].state_dict()))
    learners[1].generator.set_state(learners[0].generator.get_state())
    for learner in learners:
        learner.update(1)
    assert distance(*(weights(learner.policy) for learner in learners)) == 0


def test_memory_is_that_of_the_tensors() -> None:
    algorithm = rwr(diffusion_policy(ft_denoising_steps=0))
    buffer = algorithm.buffer
    told = algorithm.memory({name: value.shape[2:] for name, value in buffer.obs.items()})
    assert told["rollout"] == sum(value.nbytes for value in [*buffer.obs.values(), *buffer.record.values()])
    assert told["weights"] == 4 * sum(p.nbytes for p in algorithm.policy.actor.parameters())


def test_partly_fine_tuned_chains_are_refused() -> None:
    with pytest.raises(UserError, match=r"ft_denoising_steps=2: .* use 0"):
        RWR(RWRConfig(), parts(diffusion_policy()))


@pytest.mark.parametrize(("key", "value"), [("beta", -1.0), ("max_reward_weight", 0), ("batch_size", 0), ("gamma", 2)])
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"algorithm\.{key}={value}"):
        RWRConfig(**{key: value})
