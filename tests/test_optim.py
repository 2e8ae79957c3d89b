from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.optim import EMA, LRConfig, Trainable
from tests.small import distance, seeded, weights

CYCLE = LRConfig(first_cycle_steps=10, warmup_steps=4, min_lr=0.1)


def parameters() -> list[nn.Parameter]:
    generator = seeded(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (2,))]


def set_gradients(trainable: Trainable, scale: float = 1.0) -> None:
    for i, parameter in enumerate(trainable.parameters):
        parameter.grad = scale * (i + 1) * torch.ones_like(parameter)


def rates(trainable: Trainable, steps: int) -> list[float]:
    seen = [trainable.schedule.lr]
    for _ in range(steps):
        trainable.schedule.step()
        seen.append(trainable.schedule.lr)
    return seen


def test_the_rate_rises_linearly_falls_along_a_cosine_and_restarts() -> None:
    warmup = [0.1 + 0.9 * s / 4 for s in range(4)]
    decay = [0.1 + 0.9 * (1 + math.cos(math.pi * s / 6)) / 2 for s in range(6)]
    assert rates(Trainable(parameters(), 1.0, CYCLE), 24) == pytest.approx(2 * (warmup + decay) + warmup + decay[:1])


def test_without_warm_up_the_first_rate_is_the_lowest_all_the_same() -> None:
    assert rates(Trainable(parameters(), 1.0, LRConfig(10, 0, 0.1)), 1)[0] == 0.1


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_rate_that_is_configured_anew_holds_at_once(steps: int) -> None:
    old, new, expected = (Trainable(parameters(), rate, LRConfig(10, 2, 0.01)) for rate in (1.0, 0.5, 0.5))
    rates(old, steps)
    new.schedule.load_state_dict(old.schedule.state_dict())
    assert new.schedule.lr == rates(expected, steps)[-1]
    assert rates(new, 5) == rates(expected, 5)


def test_a_skipped_step_changes_nothing() -> None:
    """Neither the parameters nor AdamW's moments and step count, the first step and its allocation included."""
    trainable, reference = (Trainable(parameters(), 1.0, CYCLE, weight_decay=0.1) for _ in range(2))
    go, skip = torch.zeros(()), torch.ones(())
    for scale, flag in ((9.0, skip), (1.0, go), (7.0, skip), (2.0, go)):
        set_gradients(trainable, scale)
        trainable.step(flag)
    for scale in (1.0, 2.0):
        set_gradients(reference, scale)
        reference.step()
    assert distance(trainable.parameters, reference.parameters) == 0
    ours, expected = (t.optimizer.state_dict()["state"] for t in (trainable, reference))
    for index, state in expected.items():
        assert {name: value.tolist() for name, value in ours[index].items()} == {
            name: value.tolist() for name, value in state.items()
        }


def test_is_adamw() -> None:
    trainable = Trainable(parameters(), 1.0, CYCLE, weight_decay=0.1)
    twins = parameters()
    expected = torch.optim.AdamW(twins, lr=0.1, weight_decay=0.1)
    for scale in (1.0, -3.0, 0.5):
        set_gradients(trainable, scale)
        trainable.step()
        for twin, parameter in zip(twins, trainable.parameters, strict=True):
            twin.grad = parameter.grad
        expected.step()
    assert distance(trainable.parameters, twins) < 1e-6


def test_on_a_cpu_the_rate_is_a_number_and_no_gradients_take_no_memory() -> None:
    """A tensor, which a CUDA graph could read, costs a CPU's step time."""
    trainable = Trainable(parameters(), 1.0, CYCLE)
    (group,) = trainable.optimizer.param_groups
    assert isinstance(group["lr"], float)
    assert not group["capturable"]
    set_gradients(trainable)
    trainable.zero_grad()
    assert all(parameter.grad is None for parameter in trainable.parameters)


@pytest.mark.parametrize("max_norm", [None, 1.0, 1e3])
def test_gradients_are_clipped_by_their_common_norm(max_norm: float | None) -> None:
    trainable = Trainable(parameters(), 1.0, CYCLE, max_grad_norm=max_norm)
    set_gradients(trainable)
    trainable.step()
    norm = math.sqrt(6 * 1 + 2 * 4)
    expected = min(1.0, (max_norm or math.inf) / norm)
    for i, parameter in enumerate(trainable.parameters):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, expected * (i + 1)), rtol=1e-5, atol=0)


def test_frozen_parameters_are_left_out() -> None:
    frozen, free = parameters()
    frozen.requires_grad_(False)
    assert Trainable([frozen, free], 1.0, CYCLE).parameters == [free]


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    one, other = (Trainable(parameters(), 1.0, CYCLE) for _ in range(2))

    def advance(trainable: Trainable) -> list[Tensor]:
        for scale in (1.0, 2.0):
            set_gradients(trainable, scale)
            trainable.step()
            trainable.schedule.step()
        return [parameter.detach().clone() for parameter in trainable.parameters]

    middle = advance(one)
    with torch.no_grad():
        for parameter, value in zip(other.parameters, middle, strict=True):
            parameter.copy_(value)
    state = one.state_dict()
    copied = {index: {name: value.clone() for name, value in s.items()} for index, s in state["optimizer"].items()}
    other.load_state_dict({**state, "optimizer": {str(index): s for index, s in copied.items()}})
    assert distance(advance(one), advance(other)) == 0
    assert one.schedule.lr == other.schedule.lr


def test_the_average_of_weights() -> None:
    module = nn.Linear(3, 2)
    ema = EMA(module, decay=0.75)
    start = weights(module)
    assert distance(weights(ema.average), start) == 0
    assert not any(parameter.requires_grad for parameter in ema.average.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1
    ema.update(module)
    assert distance(weights(ema.average), [value + 0.25 for value in start]) < 1e-6
    ema.copy_from(module)
    assert distance(weights(ema.average), weights(module)) == 0
