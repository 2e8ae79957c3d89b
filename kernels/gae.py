"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16), with time limits told from ends.

For step t of one environment, with V = value:

    next_t      = 0             if terminated_t
                  bootstrap_t   if truncated_t     the value of the last observation before the reset
                  V_{t+1}       otherwise          last_value at t = T-1
    delta_t     = reward_t + gamma * next_t - V_t
    advantage_t = delta_t                                   if the episode ended at t, either way
                  delta_t + gamma * lam * advantage_{t+1}   otherwise, with advantage_T = 0
    returns_t   = advantage_t + V_t

All sums are in float64; T steps, N envs.

Two kernels: one walks backwards through time, a program for a block of environments; the other takes many steps at a
time and solves advantage_t = delta_t + decay_t advantage_{t+1} by a scan with the associative operation

    (delta', decay') after (delta, decay) = (delta' + decay' delta, decay' decay)           Blelloch 1990
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dppo_fast.kernels._dispatch import Backend, check_tensor, resolve
from dppo_fast.kernels._triton import jit, tl
from dppo_fast.runtime.native import native

FLOATS = (torch.float32, torch.float64)


def gae_reference(
    reward: Tensor,
    value: Tensor,
    bootstrap: Tensor,
    last_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """`gae` in plain PyTorch: the specification."""
    values = value.double()  # [T, N]
    following = torch.cat([values, last_value.double()[None]])[1:]  # [T, N]
    beyond = torch.where(truncated, bootstrap.double(), following).masked_fill(terminated, 0.0)
    delta = reward.double() + gamma * beyond - values
    ended = terminated | truncated
    decay = gamma * lam
    advantage = torch.empty_like(delta)
    carry = torch.zeros_like(last_value, dtype=torch.float64)  # [N]
    for t in range(len(delta) - 1, -1, -1):
        carry = torch.where(ended[t], delta[t], delta[t] + decay * carry)
        advantage[t] = carry
    return advantage.to(value.dtype), (advantage + values).to(value.dtype)


def _gae_native(
    reward: Tensor,
    value: Tensor,
    bootstrap: Tensor,
    last_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    module = native()
    assert module is not None
    floats = (reward, value, bootstrap, last_value)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32
    results = module.gae(
        *(x.detach().to("cpu", dtype).contiguous().numpy() for x in floats),
        *(x.cpu().contiguous().numpy() for x in (terminated, truncated)),
        gamma,
        lam,
    )
    advantage, returns = (torch.from_numpy(x).to(value.device, value.dtype) for x in results)
    return advantage, returns


@jit
def _delta(  # type: ignore[no-untyped-def]
    reward, value, bootstrap, last_value, terminated, truncated, t, n, inside, T: tl.constexpr, N, GAMMA: tl.constexpr
):
    """delta and V at steps t of environments n, and whether the episode ended there."""
    i = t * N + n
    v = tl.load(value + i, mask=inside, other=0.0).to(tl.float64)
    following = tl.load(value + i + N, mask=inside & (t < T - 1), other=0.0).to(tl.float64)
    last = tl.load(last_value + (i - t * N), mask=inside & (t == T - 1), other=0.0).to(tl.float64)
    terminal = tl.load(terminated + i, mask=inside, other=0) != 0
    cut = tl.load(truncated + i, mask=inside, other=0) != 0
    beyond = tl.where(t == T - 1, last, following)
    beyond = tl.where(cut, tl.load(bootstrap + i, mask=inside & cut, other=0.0).to(tl.float64), beyond)
    delta = tl.load(reward + i, mask=inside, other=0.0).to(tl.float64) + GAMMA * tl.where(terminal, 0.0, beyond) - v
    return delta, v, terminal | cut


@jit
def _sequential_kernel(  # type: ignore[no-untyped-def]
    reward,
    value,
    bootstrap,
    last_value,
    terminated,
    truncated,
    advantage,
    returns,
    N,
    T: tl.constexpr,
    GAMMA: tl.constexpr,
    DECAY: tl.constexpr,
    ENVS: tl.constexpr,
):
    n = tl.program_id(0) * ENVS + tl.arange(0, ENVS)
    inside = n < N
    carry = tl.zeros([ENVS], tl.float64)
    for i in range(T):
        t = tl.zeros([ENVS], tl.int32) + (T - 1 - i)
        delta, v, ended = _delta(reward, value, bootstrap, last_value, terminated, truncated, t, n, inside, T, N, GAMMA)
        carry = tl.where(ended, delta, delta + DECAY * carry)
        tl.store(advantage + t * N + n, carry, mask=inside)
        tl.store(returns + t * N + n, carry + v, mask=inside)


@jit
def _after(delta_later, decay_later, delta, decay):  # type: ignore[no-untyped-def]
    """An episode's end, decay = 0, keeps out even what is not finite."""
    return tl.where(decay == 0.0, delta, delta + decay * delta_later), decay * decay_later


@jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    reward,
    value,
    bootstrap,
    last_value,
    terminated,
    truncated,
    advantage,
    returns,
    N,
    T: tl.constexpr,
    GAMMA: tl.constexpr,
    DECAY: tl.constexpr,
    ENVS: tl.constexpr,
    STEPS: tl.constexpr,
):
    n = (tl.program_id(0) * ENVS + tl.arange(0, ENVS))[None, :]
    carry = tl.zeros([1, ENVS], tl.float64)
    for i in range((T + STEPS - 1) // STEPS):
        t = ((T - 1) // STEPS - i) * STEPS + tl.arange(0, STEPS)[:, None]
        inside = (t < T) & (n < N)
        delta, v, ended = _delta(reward, value, bootstrap, last_value, terminated, truncated, t, n, inside, T, N, GAMMA)
        decay = tl.where(ended, 0.0, tl.full([STEPS, ENVS], DECAY, tl.float64))
        sums, decays = tl.associative_scan((delta, decay), 0, _after, reverse=True)
        sums, _ = _after(carry, 0.0, sums, decays)
        carry = tl.sum(tl.where(tl.arange(0, STEPS)[:, None] == 0, sums, 0.0), 0, keep_dims=True)
        tl.store(advantage + t * N + n, sums, mask=inside)
        tl.store(returns + t * N + n, sums + v, mask=inside)


class Launch(NamedTuple):
    """Environments and, of the scan, steps that a program takes at a time; STEPS = 0 walks through time."""

    ENVS: int
    STEPS: int
    num_warps: int


def _launch_config(T: int, N: int) -> Launch:
    """Walk through short rollouts and very many environments; of few, a long walk would wait for memory T times."""
    if T <= 16 or N >= 2**15:
        return Launch(ENVS=32, STEPS=0, num_warps=1)
    return Launch(ENVS=8, STEPS=min(128, 1 << (T - 1).bit_length()), num_warps=4)


def _gae_triton(
    reward: Tensor,
    value: Tensor,
    bootstrap: Tensor,
    last_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    T, N = reward.shape
    advantage, returns = torch.empty(2, T, N, dtype=value.dtype, device=value.device)
    launch = _launch_config(T, N)
    sizes = {"T": T, "GAMMA": gamma, "DECAY": gamma * lam, "ENVS": launch.ENVS, "num_warps": launch.num_warps}
    if launch.STEPS:
        kernel, sizes = _scan_kernel, sizes | {"STEPS": launch.STEPS}
    else:
        kernel = _sequential_kernel
    flags = (flag.contiguous().view(torch.uint8) for flag in (terminated, truncated))
    floats = (x.contiguous() for x in (reward, value, bootstrap, last_value))
    kernel[(-(-N // launch.ENVS),)](*floats, *flags, advantage, returns, N, **sizes)
    return advantage, returns


@torch.no_grad()
def gae(
    reward: Tensor,
    value: Tensor,
    bootstrap: Tensor,
    last_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of a rollout.

    ``reward``, ``value``, ``bootstrap`` [T, N] and ``last_value`` [N] are float32 or float64, in any mixture;
    ``terminated`` and ``truncated`` [T, N] are bool; all are on one device. ``bootstrap`` is read only where
    ``truncated`` is set, and there it is the critic's value of the episode's final observation. Where both flags are
    set, termination wins.

    Returns (advantage, returns), [T, N] each, in the dtype and on the device of ``value``, without gradients. The C++
    backend takes CUDA tensors through the host, once there and once back.

    Raises TypeError for another dtype, ValueError for another shape or device, and what ``resolve`` raises.
    """
    if reward.ndim != 2:
        raise ValueError(f"gae: reward has shape {tuple(reward.shape)}, expected [T, N]")
    shape, device = reward.shape, reward.device
    for name, tensor in {"reward": reward, "value": value, "bootstrap": bootstrap}.items():
        check_tensor("gae", name, tensor, shape, FLOATS, device)
    check_tensor("gae", "last_value", last_value, shape[1:], FLOATS, device)
    for name, tensor in {"terminated": terminated, "truncated": truncated}.items():
        check_tensor("gae", name, tensor, shape, (torch.bool,), device)
    chosen = resolve("gae", device, ("reference", "triton", "native"), backend)
    run = {"reference": gae_reference, "triton": _gae_triton, "native": _gae_native}[chosen]
    return run(reward, value, bootstrap, last_value, terminated, truncated, gamma, lam)
