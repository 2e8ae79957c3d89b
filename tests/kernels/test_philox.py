"""Against the published words, the normal distribution's definition, and with each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dppo_fast.kernels.philox import keyed_normal, philox_words
from dppo_fast.runtime.native import native

needs_native = pytest.mark.skipif(
    not hasattr(native(), "keyed_normal"), reason="the C++ extension is not built, or not with keyed_normal"
)
FAST = ["triton", pytest.param("native", marks=needs_native)]
BACKENDS = ["reference", *FAST]


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_are_the_published_ones(counter: Any, key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The known-answer vectors of Philox4x32-10 in Random123."""
    assert tuple(int(word) for word in philox_words(tuple(ids(c) for c in counter), key)) == words


@pytest.mark.parametrize("backend", BACKENDS)
def test_normals_are_those_of_the_words(backend: Any) -> None:
    seed, env, step, draw, dim = 0x299F31D0_A4093822, 2**32 + 7, 0x13198A2E, 2, 5
    words = philox_words((ids(dim // 4), ids(draw), ids(step), ids(7)), (0xA4093822, 0x299F31D0))
    u0, u1 = ((int(word) // 512 + 0.5) / 2**23 for word in words[:2])
    expected = math.sqrt(-2 * math.log(u0)) * math.sin(2 * math.pi * u1)
    actual = keyed_normal(seed, ids(env), ids(step), 3, 6, backend=backend)
    assert actual.shape == (3, 1, 6)
    assert float(actual[draw, 0, dim]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**64 - 1),
    batch=st.sampled_from([1, 2, 63]),
    draws=st.integers(1, 3),
    size=st.sampled_from([1, 3, 4, 12, 80]),
    first=st.integers(-(2**63), 2**63 - 1),
)
def test_backends_agree(backend: Any, seed: int, batch: int, draws: int, size: int, first: int) -> None:
    generator = torch.Generator().manual_seed(first)
    env = torch.randint(-(2**40), 2**40, (batch,), generator=generator)
    step = first ^ torch.arange(batch)
    expected = keyed_normal(seed, env, step, draws, size, backend="reference")
    actual = keyed_normal(seed, env, step, draws, size, backend=backend)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=6e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batching_changes_nothing(backend: Any) -> None:
    env, step = torch.arange(40), 3 * torch.arange(40)
    whole = keyed_normal(1, env, step, 4, 12, backend=backend)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert keyed_normal(1, env[order], step[order], 4, 12, backend=backend).equal(whole[:, order])
    assert keyed_normal(1, env[7:8], step[7:8], 2, 5, backend=backend).equal(whole[:2, 7:8, :5])
    assert keyed_normal(1, env.repeat_interleave(2)[::2], step, 4, 12, backend=backend).equal(whole)


def test_all_of_the_key_matters() -> None:
    """Distinct arguments give distinct numbers: no word of key or counter is left out or mixed up with another."""
    seeds, others = (0, 1, 2**32), (0, 1)
    values = [
        keyed_normal(seed, ids(env), ids(step), 2, 8, backend="reference").flatten()
        for seed in seeds
        for env in others
        for step in others
    ]
    assert torch.cat(values).unique().numel() == len(values) * 16


def test_numbers_are_standard_normal_and_independent() -> None:
    """100,000 numbers: mean, variance, kurtosis and correlations within 5 standard errors."""
    z = keyed_normal(3, torch.arange(1000), ids(0).expand(1000), 10, 10, backend="reference").double()
    n = z.numel()
    assert abs(float(z.mean())) < 5 / n**0.5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float(z.pow(4).mean()) - 3) < 5 * (96 / n) ** 0.5
    for one, other in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[..., 1:], z[..., :-1])):
        assert abs(float((one * other).mean())) < 5 / one.numel() ** 0.5
        assert abs(float((one.square() * other.square()).mean()) - 1) < 5 * (8 / one.numel()) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed=-1 must lie in \[0, 2\^64\)"),
        ({"seed": 2**64}, ValueError, "seed=18446744073709551616"),
        ({"env": torch.zeros(2)}, TypeError, "env is torch.float32, expected torch.int64"),
        ({"env": torch.zeros(2, 1).long()}, ValueError, r"env has shape \(2, 1\), expected \[B\]"),
        ({"step": ids(0)}, ValueError, r"step has shape \(1,\), expected .*2"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        keyed_normal(**({"seed": 0, "env": ids(0, 1), "step": ids(0, 1), "draws": 1, "size": 2} | arguments))


@pytest.mark.gpu
def test_on_cuda() -> None:
    env, step = torch.arange(1000), torch.arange(1000) ** 2
    expected = keyed_normal(11, env, step, 5, 12, backend="reference")
    actual = keyed_normal(11, env.cuda(), step.cuda(), 5, 12)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=6e-6)
