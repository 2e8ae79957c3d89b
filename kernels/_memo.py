"""Values that follow from the contents of tensors and are kept until those change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dppo_fast.kernels._dispatch import resolve
from dppo_fast.runtime.native import native

T = TypeVar("T")

PARTS = 8


class Memo(Generic[T]):
    """The value last computed from some tensors, for as long as they stay the same.

    What autograd's version counters count is seen at once. Fused optimizers, ``.data`` and NumPy change tensors without
    telling them, so the bytes are looked at too, by a hash as fast as memory is read: all of a tensor of up to 256 KiB;
    of a larger one, which takes as long to read as a decision takes, every PARTS-th page, at each call another one.
    So a step of any optimizer, or whatever else changes a tensor as a whole, is seen at once as well; a few numbers
    written into a large matrix behind autograd's back, PARTS - 1 calls later at the latest.

    This is done for float32 on the CPU with the C++ extension, and where no gradients are recorded; elsewhere every
    call computes. A copy of a memo is empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Any], list[Any], list[int], Any] = ([], [], [], None)
        self._part = 0

    def __reduce__(self) -> tuple[type[Memo[T]], tuple[()]]:
        return type(self), ()

    def __call__(self, tensors: Sequence[Tensor], compute: Callable[[], T]) -> T:
        """What ``compute`` gives, which must depend on ``tensors`` alone; the first decides where they are."""
        first = tensors[0]
        readable = first.dtype == torch.float32 and first.device.type == "cpu" and not torch.is_grad_enabled()
        if not readable or resolve("memo", first.device, ("reference", "native")) == "reference":
            return compute()
        module = native()
        assert module is not None
        layout = [(x.data_ptr(), 0 if x.is_inference() else x._version, x.dtype, x.shape, x.stride()) for x in tensors]
        known, arrays, digests, value = self._kept
        part = self._part = (self._part + 1) % PARTS
        if layout != known or module.digest(arrays, part, PARTS) != digests[part]:
            arrays = [tensor.detach().numpy() for tensor in tensors]
            digests = [module.digest(arrays, i, PARTS) for i in range(PARTS)]
            value = compute()
            self._kept = (layout, arrays, digests, value)
        result: T = value
        return result
