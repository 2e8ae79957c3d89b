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
"""

from __future__ import annotations

import torch
from torch import Tensor

from dppo_fast.kernels._dispatch import Backend, check_tensor, resolve
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
    chosen = resolve("gae", device, ("reference", "native"), backend)
    run = _gae_native if chosen == "native" else gae_reference
    return run(reward, value, bootstrap, last_value, terminated, truncated, gamma, lam)
