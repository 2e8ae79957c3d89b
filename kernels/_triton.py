"""What the Triton kernels share. Triton is optional: without it the modules of kernels can be imported all the same,
and ``_dispatch`` keeps their kernels from running.

Kernels take ``tl`` and ``jit`` from here and address tensors [B, ...] as B rows of SIZE numbers (`as_rows`,
`row_tile`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a b + c may be one rounding, whatever Triton's default is

if TYPE_CHECKING or importlib.util.find_spec("triton") is None:
    tl: Any = None

    class Kernel(Protocol):
        def __call__(self, *args: Any, **options: Any) -> Any: ...

        def __getitem__(self, grid: tuple[int, ...]) -> Any: ...

    def jit(kernel: Any = None, **options: Any) -> Kernel:
        """Stands for ``triton.jit``; the kernels never run."""
        return jit if kernel is None else kernel  # type: ignore[return-value]
else:
    import triton.language as tl
    from triton import jit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, which knows no inline assembly."""


class RowTile(NamedTuple):
    """A program handles ROWS rows, each padded to BLOCK, a power of two."""

    ROWS: int
    BLOCK: int
    num_warps: int


def row_tile(size: int) -> RowTile:
    """For rows of ``size`` numbers: four numbers a thread, which is one 128-bit load, and at least one row."""
    block = max(4, 1 << (size - 1).bit_length())
    elements = max(512, block)
    return RowTile(elements // block, block, min(elements // 128, 8))


def as_rows(tensor: Tensor) -> Tensor:
    """[B, ...] -> [B, SIZE] with any stride between rows and 1 within them; a view where that is possible."""
    rows = tensor.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *inputs_then_gradients: Tensor) -> Tensor:
        inputs, gradients = inputs_then_gradients[:count], inputs_then_gradients[count:]
        ctx.shapes = [x.shape for x in inputs]
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (grad.view(grad.shape + (1,) * (g.ndim - grad.ndim)) * g for g in ctx.saved_tensors)
        results = [g.sum_to_size(shape) for g, shape in zip(scaled, ctx.shapes, strict=True)]
        return None, None, *results, *(None for _ in results)


def with_gradients(value: Tensor, gradients: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``value``, 0-d or [B], made differentiable by gradients that a kernel has computed along with it.

    ``gradients`` are pairs of an input and d value[b] / d input[b], or d value / d input for a 0-d value; over the
    dimensions in which the input was broadcast they are summed.
    """
    inputs, known = zip(*gradients, strict=True) if gradients else ((), ())
    result: Tensor = _WithGradients.apply(value, len(inputs), *inputs, *known)  # type: ignore[no-untyped-call]
    return result


@jit
def clamp(x, bound):  # type: ignore[no-untyped-def]
    """x within -bound and bound, as torch.clamp has it: NaN stays NaN, and bound=None bounds nothing."""
    if bound is None:
        return x
    else:  # noqa: RET505 (Triton needs the branch)
        return tl.clamp(x, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
