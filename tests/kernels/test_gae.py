from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dppo_fast.kernels import gae as module
from dppo_fast.kernels.gae import Launch, gae
from dppo_fast.runtime.native import native
from tests.golden_files import Case, golden_cases

QUICK = ["reference"] if native() is None else ["reference", "native"]
BACKENDS = [*QUICK, "triton"]
FLOATS = [torch.float32, torch.float64]
needs_native = pytest.mark.skipif(native() is None, reason="the C++ extension is not built")


def random_rollout(
    seed: int, steps: int = 7, envs: int = 5, ends: float = 0.4, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    end = torch.rand(steps, envs, generator=generator)
    return {
        **{key: torch.randn(steps, envs, generator=generator, dtype=dtype) for key in ("reward", "value", "bootstrap")},
        "last_value": torch.randn(envs, generator=generator, dtype=dtype),
        "terminated": end < ends / 2,
        "truncated": (end >= ends / 2) & (end < ends),
    }


rollouts = st.builds(
    random_rollout,
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 12),
    envs=st.integers(1, 9),
    ends=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(FLOATS),
)
fractions = st.floats(0.0, 1.0)


def advantage_by_definition(rollout: dict[str, Tensor], gamma: float, lam: float, t: int, n: int) -> float:
    """Sum of (gamma * lam)^i * delta_{t+i} up to the end of the episode or of the rollout."""
    reward, value, bootstrap, terminated, truncated = (
        rollout[key][:, n].tolist() for key in ("reward", "value", "bootstrap", "terminated", "truncated")
    )
    value.append(rollout["last_value"][n].item())
    terms = []
    for i in range(t, len(reward)):
        following = 0.0 if terminated[i] else bootstrap[i] if truncated[i] else value[i + 1]
        terms.append((gamma * lam) ** (i - t) * (reward[i] + gamma * following - value[i]))
        if terminated[i] or truncated[i]:
            break
    return math.fsum(terms)


@pytest.mark.parametrize("backend", QUICK)
@given(rollout=rollouts, gamma=fractions, lam=fractions)
def test_is_the_sum_of_discounted_deltas(backend: Any, rollout: dict[str, Tensor], gamma: float, lam: float) -> None:
    advantage, returns = gae(**rollout, gamma=gamma, lam=lam, backend=backend)
    steps, envs = advantage.shape
    rows = [[advantage_by_definition(rollout, gamma, lam, t, n) for n in range(envs)] for t in range(steps)]
    expected = torch.tensor(rows, dtype=torch.float64)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13}[rollout["value"].dtype]
    torch.testing.assert_close(advantage.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(returns.double(), expected + rollout["value"].double(), rtol=tolerance, atol=tolerance)
    assert advantage.dtype == returns.dtype == rollout["value"].dtype


@pytest.mark.parametrize("steps", [0, 1, 4, 16], ids=lambda steps: f"scan{steps}" if steps else "walk")
@settings(max_examples=8)
@given(rollout=rollouts, gamma=st.floats(0.01, 1.0), lam=st.floats(0.01, 1.0))
def test_both_kernels_are_the_reference(steps: int, rollout: dict[str, Tensor], gamma: float, lam: float) -> None:
    expected = gae(**rollout, gamma=gamma, lam=lam, backend="reference")
    with patch.object(module, "_launch_config", lambda T, N: Launch(ENVS=4, STEPS=steps, num_warps=1)):
        actual = gae(**rollout, gamma=gamma, lam=lam, backend="triton")
    for ours, exact in zip(actual, expected, strict=True):
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-13}[exact.dtype]
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_not_even_nan_passes_an_episode_end_in_either_kernel(steps: int, flag: str) -> None:
    rollout = random_rollout(0, ends=0.0)
    rollout[flag][3] = True
    rollout["reward"][4:] = rollout["value"][4:] = rollout["bootstrap"][:3] = torch.nan
    with patch.object(module, "_launch_config", lambda T, N: Launch(ENVS=4, STEPS=steps, num_warps=1)):
        advantage, _ = gae(**rollout, gamma=0.9, lam=0.9, backend="triton")
    assert not advantage[:4].isnan().any()
    assert advantage[4:].isnan().all()


@pytest.mark.parametrize("steps", [7, 20])
def test_kernels_write_all_of_their_outputs(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = random_rollout(1, steps=steps, envs=33)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    assert not any(result.isnan().any() for result in gae(**rollout, gamma=0.9, lam=0.9, backend="triton"))


def test_launches_fit_the_shape() -> None:
    """The scan where there are steps enough, in powers of two; whole warps."""
    for T, N in ((1, 1), (16, 4096), (17, 40), (500, 40), (88, 1000), (500, 2**15)):
        launch = module._launch_config(T, N)
        assert (launch.STEPS > 0) == (T > 16 and N < 2**15)
        assert launch.STEPS & (launch.STEPS - 1) == 0
        assert launch.ENVS * max(launch.STEPS, 1) >= 32 * launch.num_warps


@needs_native
@given(rollout=rollouts, dtypes=st.lists(st.sampled_from(FLOATS), min_size=4, max_size=4), gamma=fractions)
def test_native_gives_the_bits_of_the_reference(
    rollout: dict[str, Tensor], dtypes: list[torch.dtype], gamma: float
) -> None:
    floats = {key: tensor for key, tensor in rollout.items() if tensor.is_floating_point()}
    mixed = rollout | {key: tensor.to(dtype) for (key, tensor), dtype in zip(floats.items(), dtypes, strict=True)}
    expected = gae(**mixed, gamma=gamma, lam=0.95, backend="reference")
    actual = gae(**mixed, gamma=gamma, lam=0.95, backend="native")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases("07_gae"))
def test_golden(case: Case, backend: Any) -> None:
    terminated = case.tensor("terminated").bool()
    value = case.tensor("values")
    advantage, returns = gae(
        reward=case.tensor("rewards") * float(case["reward_scale_const"]),
        value=value,
        bootstrap=torch.zeros_like(value),
        last_value=case.tensor("nextvalue").reshape(-1),
        terminated=terminated,
        truncated=torch.zeros_like(terminated),
        gamma=float(case["gamma"]),
        lam=float(case["lam"]),
        backend=backend,
    )
    for actual, key in ((advantage, "advantages"), (returns, "returns")):
        expected = case.tensor(key)
        # The reference multiplies its float32 next value by gamma in float32.
        tolerance = 1e-6 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_bootstraps_from_final_obs_and_differs_from_compat(backend: Any) -> None:
    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)[:, None]

    rollout = {
        "reward": column(1, 2, 3),
        "value": column(10, 20, 30),
        "bootstrap": column(0, 70, 0),  # the critic's value of the observation on which the time limit fell
        "last_value": torch.tensor([40.0]),
        "terminated": torch.zeros(3, 1, dtype=torch.bool),
        "truncated": torch.tensor([[False], [True], [False]]),
    }
    advantage, returns = gae(**rollout, gamma=0.5, lam=0.5, backend=backend)
    last = 3 + 0.5 * 40 - 30
    middle = 2 + 0.5 * 70 - 20
    assert advantage.flatten().tolist() == [1 + 0.5 * 20 - 10 + 0.25 * middle, middle, last]
    assert torch.equal(returns, advantage + rollout["value"])

    compat, _ = gae(**rollout | {"truncated": torch.zeros(3, 1, dtype=torch.bool)}, gamma=0.5, lam=0.5, backend=backend)
    middle = 2 + 0.5 * 30 - 20 + 0.25 * last  # the value after the reset, and lambda runs on into the next episode
    assert compat.flatten().tolist() == [1 + 0.5 * 20 - 10 + 0.25 * middle, middle, last]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flag", ["terminated", "truncated"])
def test_not_even_nan_passes_an_episode_end(backend: Any, flag: str) -> None:
    rollout = random_rollout(0, ends=0.0)
    rollout[flag][3] = True
    clean, _ = gae(**rollout, gamma=0.9, lam=0.9, backend=backend)
    rollout["reward"][4:] = rollout["value"][4:] = rollout["bootstrap"][:3] = torch.nan
    dirty, _ = gae(**rollout, gamma=0.9, lam=0.9, backend=backend)
    assert torch.equal(dirty[:4], clean[:4])
    assert dirty[4:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_termination_wins_where_both_flags_are_set(backend: Any) -> None:
    rollout = random_rollout(1, ends=1.0)
    rollout["terminated"][:] = True
    both = rollout | {"truncated": torch.ones_like(rollout["terminated"])}
    only = rollout | {"truncated": torch.zeros_like(rollout["terminated"])}
    advantage, _ = gae(**both, gamma=0.9, lam=0.9, backend=backend)
    assert torch.equal(advantage, gae(**only, gamma=0.9, lam=0.9, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_inputs_are_summed_in_float64(backend: Any) -> None:
    rollout = random_rollout(2, steps=300, ends=0.0, dtype=torch.float32)
    exact, _ = gae(
        **{key: x.double() if x.is_floating_point() else x for key, x in rollout.items()},
        gamma=0.999,
        lam=1.0,
        backend=backend,
    )
    advantage, _ = gae(**rollout, gamma=0.999, lam=1.0, backend=backend)
    assert torch.equal(advantage, exact.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend: Any) -> None:
    rollout = random_rollout(3)
    expected = gae(**rollout, gamma=0.9, lam=0.9, backend=backend)
    strided = {key: x.repeat_interleave(2, dim=-1)[..., ::2] for key, x in rollout.items()}
    strided["value"] = rollout["value"].T.contiguous().T.requires_grad_()
    advantage, returns = gae(**strided, gamma=0.9, lam=0.9, backend=backend)
    assert torch.equal(advantage, expected[0])
    assert torch.equal(returns, expected[1])
    assert not returns.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("key", "change", "error", "message"),
    [
        ("reward", Tensor.half, TypeError, "reward is torch.float16"),
        ("value", Tensor.long, TypeError, "value is torch.int64"),
        ("terminated", Tensor.float, TypeError, "terminated is torch.float32, expected torch.bool"),
        ("truncated", Tensor.byte, TypeError, "truncated is torch.uint8"),
        ("reward", lambda x: x[0], ValueError, r"reward has shape \(5,\), expected \[T, N\]"),
        ("bootstrap", lambda x: x[:-1], ValueError, r"bootstrap has shape \(6, 5\), expected .*7, 5"),
        ("last_value", lambda x: x[:, None], ValueError, r"last_value has shape \(5, 1\), expected .*5"),
        ("truncated", lambda x: x.T, ValueError, r"truncated has shape \(5, 7\)"),
        ("value", lambda x: x.to("meta"), ValueError, "value is on meta, expected cpu"),
    ],
)
def test_wrong_arguments_are_named(backend: Any, key: str, change: Any, error: type[Exception], message: str) -> None:
    rollout = random_rollout(4)
    rollout[key] = change(rollout[key])
    with pytest.raises(error, match=message):
        gae(**rollout, gamma=0.9, lam=0.9, backend=backend)


@needs_native
@pytest.mark.parametrize(
    ("key", "change", "error", "message"),
    [
        ("reward", lambda x: x.astype(np.float16), TypeError, "reward has dtype float16, expected float32 or float64"),
        ("value", lambda x: x.astype(np.float32), TypeError, "value has dtype float32, expected float64"),
        ("value", lambda x: x.astype(">f8"), TypeError, "value has dtype >f8"),
        ("terminated", lambda x: x.astype(np.uint8), TypeError, "terminated has dtype uint8, expected bool"),
        ("reward", lambda x: x[0], ValueError, r"reward has shape \(5,\), expected \(T, N\)"),
        ("last_value", lambda x: x[1:], ValueError, r"last_value has shape \(4,\), expected \(5,\)"),
        ("bootstrap", lambda x: np.asfortranarray(x), ValueError, "bootstrap is not C-contiguous and aligned"),
        ("value", list, TypeError, "incompatible function arguments"),
    ],
)
def test_the_extension_converts_nothing(key: str, change: Any, error: type[Exception], message: str) -> None:
    module = native()
    assert module is not None
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in random_rollout(5).items()}
    arrays[key] = change(arrays[key])
    with pytest.raises(error, match=message):
        module.gae(**arrays, gamma=0.9, lam=0.9)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_cuda(backend: Any) -> None:
    rollout = random_rollout(6)
    expected = gae(**rollout, gamma=0.9, lam=0.9, backend="reference")
    actual = gae(**{key: x.cuda() for key, x in rollout.items()}, gamma=0.9, lam=0.9, backend=backend)
    for a, b in zip(actual, expected, strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, rtol=1e-13, atol=1e-13)
