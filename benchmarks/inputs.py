"""The sizes of real runs, and arguments for the ops at these sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dppo_fast.algorithms.dppo import DPPO, DPPOConfig
from dppo_fast.algorithms.ppo import Batch
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.denoise_step import Bounds, Score
from dppo_fast.kernels.mlp_chain import ChainOptions, MLPSegment, MLPStep
from dppo_fast.networks.critic import CriticObs
from dppo_fast.networks.mlp import DiffusionMLP
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy

Arguments: TypeAlias = dict[str, Any]

MIN_STD = 0.1
X0_CLIP = 1.0
NOISE_CLIP = 3.0


@dataclass(frozen=True)
class Shape:
    """The sizes of a run. ``rows`` are (decision, denoising step) pairs in a minibatch; ``layers`` hidden layers of
    ``width`` in the denoising network, whose observation goes through ``encoder`` first. The task's U-Net starts with
    ``channels`` over ``unet_Th`` steps.
    """

    T: int
    N: int
    Do: int
    Th: int
    Da: int
    S: int
    F: int
    rows: int
    width: int
    layers: int = 3
    critic_width: int = 256
    encoder: tuple[int, ...] = ()
    K: int = 20
    channels: int = 64
    unet_Th: int = 4

    @property
    def chunk(self) -> int:
        """Numbers in an action chunk."""
        return self.Th * self.Da

    @property
    def network_dims(self) -> tuple[list[int], list[int]]:
        """Widths of what the denoising network does at every step, and of what it does once per observation."""
        return [self.chunk, *[self.width] * self.layers, self.chunk], [self.Do, *self.encoder, self.width]

    @property
    def critic_dims(self) -> list[int]:
        return [self.Do, *[self.critic_width] * 3, 1]


HOPPER = Shape(T=500, N=40, Do=11, Th=4, Da=3, S=20, F=10, rows=50000, width=512)
SHAPES = {
    "tiny": Shape(T=3, N=2, Do=3, Th=2, Da=2, S=3, F=2, rows=8, width=8, critic_width=8, K=3, channels=16),
    "hopper": HOPPER,
    "square": Shape(T=400, N=50, Do=23, Th=4, Da=7, S=20, F=10, rows=10000, width=1024, encoder=(512, 64)),
    "furniture": Shape(
        T=88, N=1000, Do=58, Th=8, Da=10, S=5, F=5, rows=17600, width=1024, layers=7, critic_width=512,
        encoder=(512, 64), K=100, unet_Th=16,
    ),
    "envs4096": replace(HOPPER, N=4096),
}  # fmt: skip
"""The paper's state-based runs by task, Hopper with the many envs of a simulator on a GPU, and one for tests."""


def rollout(shape: Shape, device: torch.device) -> Arguments:
    """Random rewards, values and ends of T steps in N envs: one in a hundred terminates, one in a hundred truncates."""
    floats = ("reward", "value", "bootstrap")
    end = torch.rand(shape.T, shape.N, device=device)
    return {
        **{name: torch.randn(shape.T, shape.N, device=device) for name in floats},
        "last_value": torch.randn(shape.N, device=device),
        "terminated": end < 0.01,
        "truncated": end > 0.99,
    }


def gae_arguments(shape: Shape, device: torch.device) -> Arguments:
    return {**rollout(shape, device), "gamma": 0.99, "lam": 0.95}


def discounted_sum_arguments(shape: Shape, device: torch.device) -> Arguments:
    ends = rollout(shape, device)
    carry = torch.zeros(shape.N, dtype=torch.float64, device=device)
    return {"reward": ends["reward"], "first": ends["terminated"] | ends["truncated"], "carry": carry, "gamma": 0.99}


def keyed_normal_arguments(shape: Shape, device: torch.device) -> Arguments:
    env = torch.arange(shape.N, device=device)
    return {"seed": 0, "env": env, "step": torch.zeros_like(env), "draws": shape.S + 1, "size": shape.chunk}


def make_schedule(shape: Shape, device: torch.device) -> NoiseSchedule:
    return NoiseSchedule(shape.K, None if shape.S == shape.K else shape.S).to(device)


def sampling_step_arguments(shape: Shape, device: torch.device) -> Arguments:
    row = make_schedule(shape, device).coefficients(0)
    return {
        **dict(zip(("eps", "x", "noise"), torch.randn(3, shape.N, shape.Th, shape.Da, device=device), strict=True)),
        "c": row,
        "std": row.std.clamp(min=MIN_STD),
        "bounds": Bounds(x0=X0_CLIP, randn=NOISE_CLIP),
        "score": Score(MIN_STD, shape.Th),
    }


def transitions(shape: Shape, device: torch.device) -> Arguments:
    """What the update knows of ``rows`` denoising steps."""
    points = torch.randn(3, shape.rows, shape.Th, shape.Da, device=device)
    scoring = {"min_std": MIN_STD, "reward_horizon": shape.Th, "x0_clip": X0_CLIP}
    return {**dict(zip(("eps", "x", "x_next"), points, strict=True)), **scoring}


def chain_log_prob_arguments(shape: Shape, device: torch.device) -> Arguments:
    k = torch.randint(shape.F, (shape.rows,), device=device)
    return {**transitions(shape, device), "c": make_schedule(shape, device).coefficients(shape.S - shape.F + k)}


def ppo_loss_arguments(shape: Shape, device: torch.device) -> Arguments:
    old_log_prob, advantage, change = torch.randn(3, shape.rows, device=device)
    clip = torch.full_like(advantage, 0.01)
    return {
        "log_prob": old_log_prob + 0.01 * change,
        "old_log_prob": old_log_prob,
        "advantage": advantage,
        "clip": clip,
    }


def chain_ppo_loss_arguments(shape: Shape, device: torch.device) -> Arguments:
    old_log_prob, advantage = torch.randn(2, shape.rows, device=device)
    return {
        **transitions(shape, device),
        "old_log_prob": old_log_prob,
        "advantage": advantage,
        "k": torch.randint(shape.F, (shape.rows,), device=device),
        "table": make_schedule(shape, device).table[shape.S - shape.F :],
        "clip_table": torch.full((shape.F,), 0.01, device=device),
        "weight_table": torch.ones(shape.F, device=device),
    }


def value_loss_arguments(shape: Shape, device: torch.device) -> Arguments:
    value, returns, old_value = torch.randn(3, shape.rows, device=device)
    return {"value": value, "returns": returns, "old_value": old_value, "clip": 0.2}


def norm_act_film_arguments(shape: Shape, device: torch.device) -> Arguments:
    """What follows a first convolution in the U-Net's update."""
    weight, bias = torch.randn(2, shape.channels, device=device)
    return {
        "x": torch.randn(shape.rows, shape.channels, shape.unet_Th, device=device),
        "weight": weight,
        "bias": bias,
        "film": torch.randn(shape.rows, 2 * shape.channels, device=device),
        "groups": 8,
    }


def mlp_chain_arguments(shape: Shape, device: torch.device) -> Arguments:
    table = make_schedule(shape, device).table
    A, H = shape.chunk, shape.width

    def segment(steps: int) -> MLPSegment:
        layers = tuple(
            (matrix(n_out, H, device), torch.zeros(n_out, device=device)) for n_out in [H] * (shape.layers - 1) + [A]
        )
        network = MLPStep(matrix(H, A, device), layers, "ReLU", residual=True)
        return MLPSegment(network, torch.randn(steps, H, device=device), torch.randn(shape.N, H, device=device))

    return {
        "segments": [segment(shape.S - shape.F), segment(shape.F)],
        "noise": torch.randn(shape.S + 1, shape.N, A, device=device),
        "table": table,
        "std": table[:, 4].clamp(min=MIN_STD),
        "options": ChainOptions(X0_CLIP, noise_clip=NOISE_CLIP, first=shape.S - shape.F, scored=A, min_std=MIN_STD),
    }


def matrix(n_out: int, n_in: int, device: torch.device) -> Tensor:
    """A layer's weight, about as large as PyTorch makes it."""
    return torch.randn(n_out, n_in, device=device) / math.sqrt(3 * n_in)


def make_policy(shape: Shape, device: torch.device) -> DiffusionPolicy:
    network = DiffusionMLP(
        shape.Da,
        shape.Th,
        shape.Do,
        mlp_dims=[shape.width] * shape.layers,
        cond_mlp_dims=shape.encoder or None,
        activation_type="ReLU",
        residual_style=True,
    )
    ddim_steps = None if shape.S == shape.K else shape.S
    config = DiffusionConfig(shape.K, ddim_steps, ft_denoising_steps=shape.F, randn_clip_value=NOISE_CLIP)
    return DiffusionPolicy(network, config, shape.Th, shape.Da).to(device)


def decision_arguments(shape: Shape, device: torch.device) -> Arguments:
    return {"policy": make_policy(shape, device), "obs": {"state": torch.randn(shape.N, 1, shape.Do, device=device)}}


def minibatch_arguments(shape: Shape, device: torch.device) -> Arguments:
    policy = make_policy(shape, device)
    critic = CriticObs(shape.Do, [shape.critic_width] * 3, residual_style=True).to(device)
    algorithm = DPPO(policy, critic, DPPOConfig(), RolloutBuffer(shape.T, shape.N, device))
    M = -(-shape.rows // shape.F)
    record = {
        "chain": torch.randn(M, shape.F + 1, shape.Th, shape.Da, device=device),
        "log_prob": torch.zeros(M, shape.F, device=device),
    }
    obs = {"state": torch.randn(M, 1, shape.Do, device=device)}
    pair = torch.randperm(M * shape.F, device=device)[: shape.rows]
    algorithm.batch = Batch(obs, record, *torch.randn(3, M, device=device))
    going = torch.zeros((), device=device)
    return {"algorithm": algorithm, "row": pair // shape.F, "k": pair % shape.F, "stop": going}
