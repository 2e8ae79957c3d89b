"""In which precision the networks' matrix products run, by phase.

Rounding the fine-tuned network differently while sampling and while updating moves every probability ratio before the
first step: with bfloat16 in one of them a clip range of 0.001 clips a third of a minibatch at once. So each recipe
gives one precision to both, and another at most to the frozen network, which is never scored. Weights, sums,
denoising steps, log-probs and losses are float32 in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from dppo_fast.types import UserError

MatMul: TypeAlias = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Recipe:
    """``base``: the frozen network's denoising steps. ``trained``: the fine-tuned network, wherever it runs, and the
    critic.
    """

    base: MatMul
    trained: MatMul


RECIPES = {
    "fp32": Recipe("fp32", "fp32"),
    "tf32": Recipe("tf32", "tf32"),
    "mixed": Recipe("bf16", "tf32"),
}


def pick_recipe(name: str, device: torch.device) -> Recipe:
    """The recipe ``name``; ``auto`` is tf32 on CUDA and fp32 on a CPU, which has nothing else.

    Raises UserError for another name, and on a CPU for what only CUDA has.
    """
    if name == "auto":
        name = "tf32" if device.type == "cuda" else "fp32"
    if name not in RECIPES:
        raise UserError(f"precision={name} is unknown; choose auto, {', '.join(RECIPES)}")
    if name != "fp32" and device.type != "cuda":
        raise UserError(f"precision={name} needs a CUDA device, and this run is on {device}; choose auto or fp32")
    return RECIPES[name]


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
