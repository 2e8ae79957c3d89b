"""Registers, shared memory and spills of every Triton kernel, compiled without a GPU: the table in docs/kernels.md.

python -m benchmarks.kernel_resources [--target 80 90]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels._triton import INTERPRETED
from dppo_fast.kernels.chain_log_prob import chain_log_prob
from dppo_fast.kernels.denoise_step import Bounds, NoiseKey, Score, sampling_step
from dppo_fast.kernels.gae import gae
from dppo_fast.kernels.mlp_chain import ChainOptions, MLPSegment, MLPStep
from dppo_fast.kernels.mlp_step import mlp_chain_triton
from dppo_fast.kernels.norm_act_film import norm_act_film
from dppo_fast.kernels.philox import keyed_normal
from dppo_fast.kernels.ppo_loss import chain_ppo_loss, ppo_loss, value_loss

TARGETS = (80, 90)
"""Compute capabilities times 10: A100; H100 and H200."""

ON_TRITON: dict[str, Any] = {"backend": "triton"}


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the ops, with tensors of a run's shapes, that use all kernels and make the variants of their code."""
    for task, (Th, Da) in {"Hopper": (4, 3), "Furniture": (8, 10)}.items():
        for name, call in chain_calls(40, Th, Da):
            yield f"{task}: {name}", call
    sample = torch.zeros(40)
    yield "ppo_loss", partial(ppo_loss, trained(40), sample, sample, torch.tensor(0.01), **ON_TRITON)
    yield "value_loss", partial(value_loss, trained(40), sample, sample, 0.2, **ON_TRITON)
    for T in (16, 500):
        number, flag = torch.zeros(T, 40), torch.zeros(T, 40, dtype=torch.bool)
        yield f"gae, T = {T}", partial(gae, number, number, number, sample, flag, flag, 0.99, 0.95, **ON_TRITON)
    for name, C, L, groups in (("Square", 64, 4, 8), ("Furniture", 256, 4, 8), ("largest group", 63, 31, 1)):
        yield f"{name}: norm_act_film", norm_act_film_call(40, C, L, groups, trained(40, 2 * C))
    yield "Furniture: norm_act_film, no FiLM", norm_act_film_call(40, 64, 16, 8, None)
    for B in (40, 4096):
        yield f"Hopper: mlp_chain, B = {B}", mlp_chain_call(B, 12)


def trained(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def chain_calls(B: int, Th: int, Da: int, F: int = 10) -> Iterator[tuple[str, Callable[[], object]]]:
    ids, sample, schedule = torch.arange(B), torch.zeros(B), NoiseSchedule(20, ddim_steps=F)
    chain, noise, log_probs = torch.zeros(B, F + 1, Th, Da), torch.zeros(B, Th, Da), torch.zeros(B, F)
    x, eps, k = chain[:, 0], trained(B, Th, Da), ids % F
    key, score = NoiseKey(2**40, ids, ids, 3), Score(0.1, Th)
    one, eta = schedule.coefficients(2), schedule.coefficients(k, eta=trained(B, Da))
    into = {"out": chain[:, 1], "log_prob_out": log_probs[:, 1], **ON_TRITON}
    for name, draw, c, bounds in (
        ("given noise", noise, one, Bounds(1.0, None, 3.0, 1.0)),
        ("keyed noise", key, one, Bounds(1.0, None, 3.0, 1.0)),
        ("eta of each sample", key, eta, Bounds(1.0, 1.0, 3.0, 1.0)),
    ):
        yield f"sampling_step, {name}", partial(sampling_step, eps, x, draw, c, c.std, bounds, score, **into)
    likelihood = partial(chain_log_prob, eps, x, x, min_std=0.1, reward_horizon=Th, x0_clip=1.0, **ON_TRITON)
    yield "chain_log_prob", partial(likelihood, c=schedule.coefficients(k))
    yield "chain_log_prob, learned eta", partial(likelihood, c=eta, eps_clip=1.0)
    arguments = eps, x, x, sample, sample, k, schedule.table, torch.zeros(F), torch.ones(F), 0.1, Th, 1.0
    yield "chain_ppo_loss", partial(chain_ppo_loss, *arguments, **ON_TRITON)
    yield "keyed_normal", partial(keyed_normal, 2**40, ids, ids, F + 1, Th * Da, **ON_TRITON)


def norm_act_film_call(B: int, C: int, L: int, groups: int, film: Tensor | None) -> Callable[[], object]:
    """Forward and backward."""
    x, weight, bias = trained(B, C, L), trained(C), trained(C)
    return lambda: torch.autograd.backward(norm_act_film(x, weight, bias, film, groups, **ON_TRITON).sum())


def mlp_chain_call(B: int, A: int, H: int = 512) -> Callable[[], object]:
    layers = tuple((torch.zeros(n, H), torch.zeros(n)) for n in (H, H, A))
    network = MLPStep(torch.zeros(H, A), layers, "Mish", residual=True)
    segment = MLPSegment(network, torch.zeros(3, H), torch.zeros(B, H), "tf32")
    key, options = NoiseKey(2**40, torch.arange(B), torch.arange(B), 0), ChainOptions(1.0, None, 3.0, 1.0, 1, A, 0.1)
    return partial(mlp_chain_triton, [segment], key, torch.ones(3, 7), torch.ones(3), options)


class Resources(NamedTuple):
    """Registers per thread, bytes of shared memory per block, bytes of local memory (spills) per thread."""

    registers: int
    shared: int
    local: int


@dataclass(frozen=True)
class Driver:
    """Stands for that of a GPU of compute capability ``target`` / 10, which need not be there."""

    target: int

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0


def kernels(call: Callable[[], object], target: int) -> list[Any]:
    """What Triton compiles for the launches of an op, once each; nothing is launched."""
    found: dict[int, Any] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        found[id(compiled)] = compiled

    driver.set_active(Driver(target))
    with patch.object(JITFunction, "run", compile_only), patch.dict(os.environ, TRITON_INTERPRET="1"):
        call()
    return list(found.values())


def resources(compiled: Any) -> Resources:
    """From the compiler's own tools."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(numbers["REG"], compiled.metadata.shared, numbers["STACK"] + numbers["LOCAL"])


def table() -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| call | kernel | target | registers | shared memory | spills |"
    yield "|---|---|---|---|---|---|"
    for name, call in calls():
        for same in zip(*(kernels(call, target) for target in TARGETS), strict=True):
            for target, compiled in zip(TARGETS, same, strict=True):
                numbers = " | ".join(map(str, resources(compiled)))
                yield f"| {name} | `{compiled.metadata.name}` | sm_{target} | {numbers} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a file whose table is to be replaced, instead of printing it")
    path = parser.parse_args().write
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    made = "\n".join(table()) + "\n"
    if path is None:
        print(made, end="")
    else:
        path.write_text(re.sub(r"(?m)^\| call \|.*\n(\|.*\n)*", lambda _: made, path.read_text()))
