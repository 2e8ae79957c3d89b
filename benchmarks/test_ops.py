"""Microbenchmarks of the paths that a Hopper iteration takes: ``make bench``."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dppo_fast.algorithms.dppo import DPPO, DPPOConfig
from dppo_fast.algorithms.ppo import Batch
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.envs import EnvConfig, make_env
from dppo_fast.kernels.gae import gae
from dppo_fast.networks.critic import CriticObs
from dppo_fast.networks.mlp import DiffusionMLP
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.runtime.native import native

HOPPER = {"horizon_steps": 4, "action_dim": 3}
OBS_DIM = 11


def hopper_policy() -> DiffusionPolicy:
    torch.manual_seed(0)
    network = DiffusionMLP(**HOPPER, cond_dim=OBS_DIM, mlp_dims=[512] * 3, activation_type="ReLU", residual_style=True)
    return DiffusionPolicy(network, DiffusionConfig(ft_denoising_steps=10, randn_clip_value=3.0), **HOPPER)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shape", [(500, 40), (88, 1000), (500, 4096)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_gae(benchmark: BenchmarkFixture, backend: str, shape: tuple[int, int]) -> None:
    if backend == "native" and native() is None:
        pytest.skip("the C++ extension is not built")
    reward, value, bootstrap = torch.randn(3, *shape)
    ended = torch.rand(2, *shape) < 0.01
    terminated, truncated = ended[0], ended[1] & ~ended[0]
    benchmark(gae, reward, value, bootstrap, value[0], terminated, truncated, 0.99, 0.95, backend=backend)


@pytest.mark.parametrize("batch", [1, 40, 256, 1024])
def test_sample_chain(benchmark: BenchmarkFixture, batch: int) -> None:
    """20 DDPM steps with 10 fine-tuned ones and their log-probs."""
    policy = hopper_policy()
    benchmark(policy.act, {"state": torch.randn(batch, 1, OBS_DIM)})


@pytest.mark.parametrize("microbatch", [1024, 10000], ids=lambda m: f"microbatch{m}")
def test_update_minibatch(benchmark: BenchmarkFixture, microbatch: int) -> None:
    """One optimizer step on 10,000 pairs."""
    policy, critic = hopper_policy(), CriticObs(OBS_DIM, [256] * 3, residual_style=True)
    rows = 2000
    algorithm = DPPO(policy, critic, DPPOConfig(microbatch_size=microbatch), RolloutBuffer(1, 1))
    record = {"chain": torch.randn(rows, 11, 4, 3), "log_prob": torch.zeros(rows, 10)}
    batch = Batch({"state": torch.randn(rows, 1, OBS_DIM)}, record, *torch.randn(3, rows))
    pair = torch.randperm(rows * 10)
    benchmark(algorithm.minibatch, batch, pair // 10, pair % 10, 0, 0, torch.zeros(()))


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_env_step(benchmark: BenchmarkFixture, backend: str) -> None:
    """One chunk of 4 actions in 40 Hopper environments."""
    env = make_env(EnvConfig(id="Hopper-v4", backend=backend, num_envs=40, act_steps=4), "cpu", 0)
    env.reset()
    generator = torch.Generator().manual_seed(0)
    benchmark(lambda: env.step(2 * torch.rand(40, 4, 3, generator=generator) - 1))
    env.close()
