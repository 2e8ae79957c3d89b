from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_fast.kernels.reward_scaling import RewardScaler, discounted_sum
from dppo_fast.runtime.native import native
from tests.golden_files import Case, golden_cases

BACKENDS = ["reference"] if native() is None else ["reference", "native"]


def random_call(seed: int, steps: int = 20, envs: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reward = 3 + 2 * torch.randn(steps, envs, generator=generator, dtype=torch.float64)
    return reward, torch.rand(steps, envs, generator=generator) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases("07_reward_scaler"))
def test_golden(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_FAST_BACKEND", backend)
    names = {"num_envs": "num_envs", "gamma": "gamma", "cliprew": "clip", "epsilon": "eps"}
    scaler = RewardScaler(**{names[key]: value for key, value in case.cfg.items()})
    calls = sorted({key.split("/")[0] for key in case if key.startswith("call")}, key=lambda name: int(name[4:]))
    for call in map(case.case, calls):
        scaled = scaler(call.tensor("reward"), call.tensor("firsts").bool())
        actual = {"scaled": scaled, **scaler.state_dict()}
        for key in ("scaled", "ret", "mean", "var", "count"):
            np.testing.assert_allclose(actual[key], call[key], rtol=1e-12, err_msg=f"{call.name}/{key}")


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 9),
    envs=st.integers(1, 5),
    gamma=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_discounted_sum_by_definition(
    backend: Any, seed: int, steps: int, envs: int, gamma: float, dtype: torch.dtype
) -> None:
    reward, first = random_call(seed, steps, envs)
    reward = reward.to(dtype)
    carry = torch.ones(envs, dtype=torch.float64)
    sums = discounted_sum(reward, first, carry, gamma, backend=backend)
    for n in range(envs):
        total = 1.0
        for t in range(steps):
            total = reward[t, n].item() + (0.0 if first[t, n] else gamma * total)
            assert sums[t, n].item() == total


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_is_carried_over_calls(backend: Any) -> None:
    reward, first = random_call(0)
    carry = torch.zeros(4, dtype=torch.float64)
    whole = discounted_sum(reward, first, carry, 0.99, backend=backend)
    head = discounted_sum(reward[:7], first[:7], carry, 0.99, backend=backend)
    tail = discounted_sum(reward[7:], first[7:], head[-1], 0.99, backend=backend)
    assert torch.equal(torch.cat([head, tail]), whole)


def test_variance_is_that_of_all_sums_so_far() -> None:
    scaler = RewardScaler(num_envs=4)
    carry, seen = torch.zeros(4, dtype=torch.float64), []
    for seed in range(5):
        reward, first = random_call(seed)
        seen.append(discounted_sum(reward, first, carry, 0.99))
        carry = seen[-1][-1]
        scaled = scaler(reward, first)
    # The initial count of 1e-4 and the factor n / (n - 1) per call move it a little.
    torch.testing.assert_close(scaler.var, torch.cat(seen).var(), rtol=0.05, atol=0)
    torch.testing.assert_close(scaled, reward / scaler.var.sqrt())


def test_clips_and_keeps_the_dtype() -> None:
    scaler = RewardScaler(num_envs=4, clip=0.5)
    reward, first = random_call(0)
    scaled = scaler(100 * reward.float(), first)
    assert scaled.dtype == torch.float32
    assert scaled.abs().max() == 0.5


def test_resumes_bit_for_bit() -> None:
    original, resumed = RewardScaler(num_envs=4), RewardScaler(num_envs=4)
    original(*random_call(0))
    state = original.state_dict()
    original(*random_call(1))
    resumed.load_state_dict(state)
    resumed(*random_call(1))
    assert torch.equal(original(*random_call(2)), resumed(*random_call(2)))


def test_refuses_the_state_of_another_number_of_envs() -> None:
    with pytest.raises(ValueError, match="for 3 envs, this run has 4"):
        RewardScaler(num_envs=4).load_state_dict(RewardScaler(num_envs=3).state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("reward", "first", "carry", "error", "message"),
    [
        (torch.ones(3, 2).long(), torch.ones(3, 2).bool(), torch.ones(2).double(), TypeError, "reward is torch.int64"),
        (torch.ones(3, 2), torch.ones(3, 2), torch.ones(2).double(), TypeError, "first is torch.float32"),
        (torch.ones(3, 2), torch.ones(3, 2).bool(), torch.ones(2), TypeError, "carry is torch.float32"),
        (torch.ones(3), torch.ones(3).bool(), torch.ones(3).double(), ValueError, r"expected \[T, N\]"),
        (torch.ones(3, 2), torch.ones(2, 2).bool(), torch.ones(2).double(), ValueError, r"first has shape \(2, 2\)"),
        (torch.ones(3, 2), torch.ones(3, 2).bool(), torch.ones(3).double(), ValueError, r"carry has shape \(3,\)"),
    ],
)
def test_wrong_arguments_are_named(
    backend: Any, reward: Any, first: Any, carry: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        discounted_sum(reward, first, carry, 0.99, backend=backend)
