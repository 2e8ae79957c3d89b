"""Precision recipes."""

from __future__ import annotations

import pytest
import torch

from dppo_fast.runtime.precision import RECIPES, matmul_precision, pick_recipe
from dppo_fast.types import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_follows_the_device() -> None:
    assert pick_recipe("auto", CPU) == RECIPES["fp32"]
    assert pick_recipe("auto", CUDA) == RECIPES["tf32"]


@pytest.mark.parametrize("name", ["tf32", "mixed"])
def test_a_cpu_has_fp32_only(name: str) -> None:
    assert pick_recipe(name, CUDA) == RECIPES[name]
    with pytest.raises(UserError, match=rf"precision={name} needs a CUDA device, and this run is on cpu"):
        pick_recipe(name, CPU)


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(UserError, match="precision=fp8 is unknown; choose auto, fp32, tf32, mixed"):
        pick_recipe("fp8", CUDA)


def test_the_flag_is_put_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with matmul_precision("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
        with matmul_precision("fp32"):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_sampling_and_updating_share_a_precision_in_every_recipe() -> None:
    assert {recipe.trained for recipe in RECIPES.values()} <= {"fp32", "tf32"}


@pytest.mark.gpu
def test_each_kind_rounds_as_it_says() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 256, 256, device="cuda")
    exact = a.double() @ b.double()

    def error(kind: str) -> float:
        with matmul_precision(kind):  # type: ignore[arg-type]
            return float(((a @ b).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert error("fp32") < 1e-6 < error("tf32") < 1e-3 < error("bf16") < 1e-2
