"""CUDA graphs: what surrounds them everywhere, and on a GPU that they change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dppo_fast.build import pick_device
from dppo_fast.runtime.graph import GraphedFunction, use_graphs
from dppo_fast.types import NoiseStream, UserError
from tests.small import algorithm, diffusion_policy, gaussian_policy, observations, rollout, weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("mode", "device", "used"),
    [
        ("auto", CPU, False),
        ("auto", CUDA, True),
        ("on", CUDA, True),
        ("True", CUDA, True),
        ("off", CPU, False),
        ("off", CUDA, False),
        ("False", CUDA, False),
    ],
)
def test_modes(mode: str, device: torch.device, used: bool) -> None:
    assert use_graphs(mode, device) is used


def test_wrong_modes_are_refused() -> None:
    with pytest.raises(UserError, match=r"graphs=maybe is unknown; choose auto, on, off"):
        use_graphs("maybe", CPU)
    with pytest.raises(UserError, match="graphs=on: CUDA graphs need a CUDA device, and this run is on cpu"):
        use_graphs("on", CPU)


def test_a_device_by_its_index_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and graphs run there."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda") == CUDA
    assert not current
    assert [pick_device("cuda:1")] == current
    with pytest.raises(UserError, match="device=cuda:2: this machine has 2 CUDA devices"):
        pick_device("cuda:2")


def test_without_graphs_a_call_is_a_call() -> None:
    def scaled(inputs: Mapping[str, Tensor], factor: int) -> Tensor:
        return inputs["x"] * factor

    function = GraphedFunction(scaled)
    x = torch.ones(3)
    assert function({"x": x}, 2).equal(2 * x)
    assert not function.captured


def on_gpu(make: Callable[..., Any], graphs: bool, **config: Any) -> tuple[Any, Any]:
    policy = make().cuda()
    policy.generator, policy.noise = torch.Generator("cuda").manual_seed(1), NoiseStream(1)
    if hasattr(policy, "sampler"):
        policy.sampler.enabled = graphs
    learner = algorithm(policy, rollout(policy, steps=8, device="cuda"), **config)
    learner.learn.enabled = graphs
    return policy, learner


@pytest.mark.gpu
def test_a_graphed_chain_is_the_eager_one() -> None:
    obs = {name: value.cuda() for name, value in observations(5).items()}
    eager, graphed = on_gpu(diffusion_policy, False)[0], on_gpu(diffusion_policy, True)[0]
    for _ in range(3):
        one, other = eager.act(obs), graphed.act(obs)
        assert one.action.equal(other.action)
        assert all(value.equal(other.record[name]) for name, value in one.record.items())
    assert eager.act(obs, deterministic=True).action.equal(graphed.act(obs, deterministic=True).action)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [gaussian_policy, diffusion_policy])
@pytest.mark.parametrize("config", [{}, {"target_kl": 1e-5, "max_grad_norm": 0.5, "ft_denoising_steps_d": 1}])
def test_graphed_updates_are_the_eager_ones(make: Callable[..., Any], config: dict[str, Any]) -> None:
    if make is gaussian_policy:
        config.pop("ft_denoising_steps_d", None)
    elif config:
        config = {**config, "ft_denoising_steps_t": 1}
    results = []
    for graphs in (False, True):
        policy, learner = on_gpu(make, graphs, **config)
        metrics = []
        for iteration in range(3):
            learner.buffer = rollout(policy, steps=8, device="cuda")
            metrics.append({name: float(value) for name, value in learner.update(iteration).items()})
        results.append((metrics, weights(policy, learner.critic)))
    (eager_metrics, eager), (graphed_metrics, graphed) = results
    for one, other in zip(eager_metrics, graphed_metrics, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    for one, other in zip(eager, graphed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_another_shape_is_another_graph() -> None:
    function = GraphedFunction(lambda inputs, key: inputs["x"] + key, enabled=True)
    for size in (3, 4, 3):
        x = torch.arange(size, device="cuda")
        assert function({"x": x}, 1).equal(x + 1)
    assert len(function.captured) == 2
    function.forget()
    assert not function.captured


@pytest.mark.gpu
def test_capturing_leaves_the_random_state_alone() -> None:
    """Dropout's, which a resumed run, that captures again, would otherwise find elsewhere."""
    function = GraphedFunction(lambda inputs, key: torch.dropout(inputs["x"], 0.5, True), enabled=True)
    states = []
    for _ in range(2):  # captured in the first one
        torch.cuda.manual_seed(0)
        function({"x": torch.ones(8, device="cuda")}, None)
        states.append(torch.cuda.get_rng_state())
    assert torch.equal(*states)
