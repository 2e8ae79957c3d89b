"""A value is computed again when a byte has changed, and not at every call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dppo_fast.kernels._memo import PARTS, Memo
from dppo_fast.runtime.native import native
from tests.small import seeded

extension: Any = native()
needs_native = pytest.mark.skipif(extension is None, reason="the C++ extension is not built")


class Counted:
    """A memo of the number of times that it had to compute."""

    def __init__(self) -> None:
        self.memo: Memo[int] = Memo()
        self.calls = 0

    def __call__(self, *tensors: Tensor) -> int:
        def compute() -> int:
            self.calls += 1
            return self.calls

        with torch.no_grad():
            return self.memo(tensors, compute)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "last bit": lambda x: x.view(torch.int32).view(-1)[-1:].bitwise_xor_(1),
    "sign of zero": lambda x: x.view(-1)[:1].neg_(),
    "two exchanged": lambda x: x.view(-1)[1:3].copy_(x.view(-1)[1:3].flip(0)),
    "all exchanged": lambda x: x.copy_(x.flip(0, 1)),
    "other memory, same bytes": lambda x: x.set_(x.clone()),
    "other shape, same bytes": lambda x: x.set_(x.view(-1, 7)),
    "other strides, same memory": lambda x: x.set_(x.t()),
}


@needs_native
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_is_seen(change: Callable[[Tensor], object]) -> None:
    x, y = torch.randn(35, 35, generator=seeded(0)), torch.arange(3)
    x[0, 0] = 0
    value = Counted()
    assert value(x, y) == value(x, y) == 1
    change(x)
    assert value(x, y) == value(x, y) == 2
    y += 1
    assert value(x, y) == value(x, y) == 3


def fused_step(x: Tensor) -> None:
    x.requires_grad_().grad = torch.ones_like(x)
    torch.optim.AdamW([x], fused=True).step()
    x.requires_grad_(False)


WHOLE: dict[str, Callable[[Tensor], object]] = {
    "fused optimizer": fused_step,
    "data": lambda x: x.data.mul_(1.5),
    "NumPy": lambda x: np.add(x.numpy(), 1, out=x.numpy()),
    "a column": lambda x: x.data[:, 3].add_(1),
    "a number that autograd knows of": lambda x: x[5, 5].add_(1),
    "a number in place": lambda x: x.detach()[5, 5].add_(1),
}


@needs_native
@pytest.mark.parametrize("change", WHOLE.values(), ids=WHOLE.keys())
@pytest.mark.parametrize("calls", range(PARTS))
def test_changes_of_a_large_tensor_are_seen(change: Callable[[Tensor], object], calls: int) -> None:
    x, value = torch.randn(512, 300, generator=seeded(0)), Counted()
    assert {value(x) for _ in range(calls + 1)} == {1}
    change(x)
    assert [value(x) for _ in range(2 * PARTS)] == [2] * (2 * PARTS)


@needs_native
@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_number_written_into_a_large_tensor_behind_its_back_is_seen_in_time(place: int) -> None:
    x, value = torch.randn(512, 300, generator=seeded(0)), Counted()
    for change in range(1, 4):
        assert value(x) == change
        x.data.view(-1)[place] += 1
        seen = [value(x) for _ in range(PARTS)]
        assert seen == sorted(seen)
        assert seen[-1] == change + 1


@needs_native
def test_the_parts_of_a_digest_cover_every_byte() -> None:
    array = np.zeros(2**18 + 64 * 1024 + 7, np.uint8)
    before = [extension.digest([array], i, PARTS) for i in range(PARTS)]
    for place in range(0, len(array), 61):
        array[place] = 1
        assert [extension.digest([array], i, PARTS) for i in range(PARTS)] != before
        array[place] = 0
    with pytest.raises(ValueError, match="part is 8 of 8"):
        extension.digest([array], PARTS, PARTS)


@needs_native
def test_views_are_read_as_they_are() -> None:
    base = torch.randn(20, 9, generator=seeded(0))
    value = Counted()
    assert value(base[:, 2:5]) == value(base[:, 2:5]) == 1
    base.data[:, 5:] += 1
    assert value(base[:, 2:5]) == 1
    base[:, 4] += 1
    assert value(base[:, 2:5]) == 2


@needs_native
def test_a_copy_is_empty() -> None:
    """The addresses that a memo knows are not the copied tensors'."""
    x, value = torch.zeros(3), Counted()
    value(x)
    other = copy.deepcopy(value)
    assert (value(x), other(x)) == (1, 2)


@pytest.mark.parametrize("kind", ["gradients", "float64", "no extension"])
def test_elsewhere_every_call_computes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, calls, memo = torch.zeros(3), [], Memo[None]()
    if kind == "float64":
        x = x.double()
    if kind == "no extension":
        monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")
    with torch.set_grad_enabled(kind == "gradients"):
        memo((x,), lambda: calls.append(1))
        memo((x,), lambda: calls.append(1))
    assert len(calls) == 2


@needs_native
def test_a_digest_depends_on_every_byte_and_its_place() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 63, 64, 255, 256, 257, 1000):
        array = rng.integers(0, 256, size, np.uint8)
        seen = {extension.digest([array]), extension.digest([array[:-1]]), extension.digest([array, array[:0]])}
        for i in range(size):
            array[i] ^= 1
            seen.add(extension.digest([array]))
            array[i] ^= 1
        assert len(seen) == size + 3


@needs_native
def test_a_digest_does_not_depend_on_the_layout() -> None:
    array = np.arange(60, dtype=np.float32).reshape(5, 12)
    assert extension.digest([array]) == extension.digest([np.asfortranarray(array)])
    assert extension.digest([array[:, 2:5]]) == extension.digest([array[:, 2:5].copy()])
    assert extension.digest([array[::-1]]) != extension.digest([array])
