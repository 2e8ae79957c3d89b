"""Values that follow from the contents of tensors and are kept until those change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dppo_fast.kernels._dispatch import resolve
from dppo_fast.runtime.native import native

T = TypeVar("T")


class Memo(Generic[T]):
    """The value last computed from some tensors, for as long as every byte of them stays the same.

    The bytes themselves are looked at, by a hash as fast as memory is read: fused optimizers, ``.data`` and NumPy
    change tensors without telling autograd's version counters. This is done for float32 on the CPU with the C++
    extension, and where no gradients are recorded; elsewhere every call computes. A copy of a memo is empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Any], list[Any], int | None, Any] = ([], [], None, None)

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
        layout = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
        known, arrays, digest, value = self._kept
        if layout != known:
            arrays, digest = [tensor.detach().numpy() for tensor in tensors], None
        contents = module.digest(arrays)
        if contents != digest:
            value = compute()
            self._kept = (layout, arrays, contents, value)
        result: T = value
        return result
