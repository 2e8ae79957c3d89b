"""Microbenchmarks at Hopper's sizes, and its environment: ``make bench``. For other sizes, GPUs and CSV see `run`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.inputs import SHAPES, make_policy
from benchmarks.registry import OPS
from dppo_fast.envs import EnvConfig, make_env

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name, op in OPS.items() for backend in ("reference", "native") if backend in op.backends],
)
def test_op(benchmark: BenchmarkFixture, name: str, backend: str) -> None:
    op = OPS[name]
    if obstacle := op.obstacle(backend, CPU):
        pytest.skip(obstacle)
    benchmark.group = name
    benchmark(op.call(op.arguments(SHAPES["hopper"], CPU), backend))


@pytest.mark.parametrize("batch", [1, 40, 256, 1024])
def test_decision(benchmark: BenchmarkFixture, batch: int) -> None:
    """A chain with its log-probs, on the backends that a run takes."""
    benchmark.group = "decision by batch"
    policy = make_policy(SHAPES["hopper"], CPU)
    benchmark(policy.act, {"state": torch.randn(batch, 1, SHAPES["hopper"].Do)})


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_env_step(benchmark: BenchmarkFixture, backend: str) -> None:
    """One chunk of 4 actions in 40 Hopper environments."""
    benchmark.group = "env step"
    env = make_env(EnvConfig(id="Hopper-v4", backend=backend, num_envs=40, act_steps=4), "cpu", 0)
    env.reset()
    generator = torch.Generator().manual_seed(0)
    benchmark(lambda: env.step(2 * torch.rand(40, 4, 3, generator=generator) - 1))
    env.close()
