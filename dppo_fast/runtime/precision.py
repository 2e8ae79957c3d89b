"""In which precision the networks' matrix products run, by phase.

Rounding the fine-tuned network differently while sampling and while updating moves every probability ratio before the
first step: with bfloat16 in one of them a clip range of 0.001 clips a third of a minibatch at once. So each recipe
gives one precision to both, and another at most to the frozen network, which is never scored, and to the gradients.
Weights, sums, denoising steps, log-probs and losses are float32 in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dppo_fast.types import UserError

MatMul: TypeAlias = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Recipe:
    """``base``: the frozen network's denoising steps. ``trained``: the fine-tuned network, wherever it runs, and the
    critic. ``backward``: the gradients of both in PPO's updates.
    """

    base: MatMul
    trained: MatMul
    backward: MatMul


RECIPES = {
    "fp32": Recipe("fp32", "fp32", "fp32"),
    "bf16_backward": Recipe("fp32", "fp32", "bf16"),
    "tf32": Recipe("tf32", "tf32", "tf32"),
    "mixed": Recipe("bf16", "tf32", "tf32"),
}


def pick_recipe(name: str, device: torch.device) -> Recipe:
    """The recipe ``name``; ``auto`` is tf32 on CUDA, bf16_backward on a CPU that multiplies bfloat16, else fp32.

    Raises UserError for another name, and for what ``device`` does not have.
    """
    cuda, bf16 = device.type == "cuda", _cpu_multiplies_bf16()
    if name == "auto":
        name = "tf32" if cuda else "bf16_backward" if bf16 else "fp32"
    if name not in RECIPES:
        raise UserError(f"precision={name} is unknown; choose auto, {', '.join(RECIPES)}")
    if name in ("tf32", "mixed") and not cuda:
        raise UserError(f"precision={name} needs a CUDA device, and this run is on {device}; choose auto or fp32")
    if name == "bf16_backward" and (cuda or not bf16):
        raise UserError(f"precision={name} needs a CPU with AVX512_BF16, which {device} is not; choose auto or fp32")
    return RECIPES[name]


def _cpu_multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


@contextmanager
def matmul_precision(kind: MatMul) -> Iterator[None]:
    """Inside, float32 matrix products on CUDA are computed as ``kind`` says, sums always in float32."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    flags.allow_tf32 = kind != "fp32"
    try:
        with torch.autocast("cuda", torch.bfloat16) if kind == "bf16" else nullcontext():
            yield
    finally:
        flags.allow_tf32 = before


@contextmanager
def update_precision(recipe: Recipe) -> Iterator[None]:
    """Inside, the trained networks run forward and backward as ``recipe`` says."""
    with matmul_precision(recipe.trained), _Bf16Gradients() if recipe.backward == "bf16" else nullcontext():
        yield


class _Bf16Gradients(TorchFunctionMode):
    """Inside, linear layers run as they are, and get gradients that are products of bfloat16, summed in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        layer = _linear if func is F.linear and torch.is_grad_enabled() else func
        return layer(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad
        # A gradient that is differentiated again is part of what a policy says, not of how it learns.
        kind = x.dtype if torch.is_grad_enabled() else torch.bfloat16
        rows, inputs = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gradient, x))
        rounded = rows.to(kind)
        return (
            (rounded @ weight.to(kind)).to(x.dtype).view_as(x) if by_x else None,
            (rounded.t() @ inputs.to(kind)).to(x.dtype) if by_weight else None,
            rows.sum(0) if by_bias else None,
        )
