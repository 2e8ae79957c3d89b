"""Running reward scaling: rewards divided by the standard deviation of their discounted sum so far.

Per environment, carried over calls, R starts anew where an episode does (first_t = 1):

    R_t = reward_t + gamma * R_{t-1} * (1 - first_t)

Then all T * N new sums, of mean m and (biased) variance v, enter the running moments at once (Chan et al. 1979), which
start as mean 0, var 1, count 1e-4:

    d = m - mean,  total = count + T * N
    M2   = var * count + v * T * N + d^2 * count * T * N / total
    mean = mean + d * T * N / total,  var = M2 / (total - 1),  count = total

and the rewards are scaled with the moments that include them: clip(reward / sqrt(var + eps), -clip, clip).
All in float64; T steps, N envs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dppo_fast.kernels._dispatch import Backend, check_tensor, resolve
from dppo_fast.runtime.native import native


def discounted_sum_reference(reward: Tensor, first: Tensor, carry: Tensor, gamma: float) -> Tensor:
    """`discounted_sum` in plain PyTorch: the specification."""
    sums = torch.empty_like(reward, dtype=torch.float64)
    for t, now in enumerate(reward.double()):
        carry = torch.where(first[t], now, now + gamma * carry)
        sums[t] = carry
    return sums


def _discounted_sum_native(reward: Tensor, first: Tensor, carry: Tensor, gamma: float) -> Tensor:
    module = native()
    assert module is not None
    arrays = (x.detach().cpu().contiguous().numpy() for x in (reward, first, carry))
    return torch.from_numpy(module.discounted_sum(*arrays, gamma)).to(reward.device)


@torch.no_grad()
def discounted_sum(
    reward: Tensor, first: Tensor, carry: Tensor, gamma: float, backend: Backend | None = None
) -> Tensor:
    """R_t of the module's formula, [T, N] float64.

    ``reward`` [T, N] is float32 or float64, ``first`` [T, N] bool, ``carry`` = R_{-1} [N] float64; all on one device.
    Raises TypeError for another dtype, ValueError for another shape or device, and what ``resolve`` raises.
    """
    if reward.ndim != 2:
        raise ValueError(f"discounted_sum: reward has shape {tuple(reward.shape)}, expected [T, N]")
    check_tensor("discounted_sum", "reward", reward, reward.shape, (torch.float32, torch.float64), reward.device)
    check_tensor("discounted_sum", "first", first, reward.shape, (torch.bool,), reward.device)
    check_tensor("discounted_sum", "carry", carry, reward.shape[1:], (torch.float64,), reward.device)
    chosen = resolve("discounted_sum", reward.device, ("reference", "native"), backend)
    run = _discounted_sum_native if chosen == "native" else discounted_sum_reference
    return run(reward, first, carry, gamma)


class RewardScaler:
    """Scales the rewards of ``num_envs`` environments; see the module's formula.

    ``gamma`` is the scaler's own discount, not the training's. The state (``ret`` = R [N], ``mean``, ``var`` and
    ``count``) is float64 and follows the rewards to their device.
    """

    def __init__(self, num_envs: int, gamma: float = 0.99, clip: float = 10.0, eps: float = 1e-8) -> None:
        self.gamma = gamma
        self.clip = clip
        self.eps = eps
        self.ret = torch.zeros(num_envs, dtype=torch.float64)
        self.mean = torch.zeros((), dtype=torch.float64)
        self.var = torch.ones((), dtype=torch.float64)
        self.count = 1e-4

    @torch.no_grad()
    def __call__(self, reward: Tensor, first: Tensor) -> Tensor:
        """Take in ``reward`` [T, N] and give it scaled, in its own dtype; ``first`` [T, N] bool marks episode starts.

        Raises TypeError and ValueError as `discounted_sum` does.
        """
        self.ret, self.mean, self.var = (x.to(reward.device) for x in (self.ret, self.mean, self.var))
        sums = discounted_sum(reward, first, self.ret, self.gamma)  # [T, N]
        self.ret = sums[-1].clone()
        self._update(sums)
        scaled = reward.double() / torch.sqrt(self.var + self.eps)
        return scaled.clamp(-self.clip, self.clip).to(reward.dtype)

    def _update(self, sums: Tensor) -> None:
        batch = sums.numel()
        total = self.count + batch
        difference = sums.mean() - self.mean
        m2 = self.var * self.count + sums.var(correction=0) * batch + difference**2 * self.count * batch / total
        self.mean = self.mean + difference * batch / total
        self.var = m2 / (total - 1)
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """The running state: ``ret`` [N], ``mean`` and ``var`` (0-d) tensors and the number ``count``."""
        return {"ret": self.ret.clone(), "mean": self.mean.clone(), "var": self.var.clone(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of a scaler of as many envs. Raises ValueError for another number."""
        if state["ret"].shape != self.ret.shape:
            raise ValueError(f"reward scaler: the state is for {len(state['ret'])} envs, this run has {len(self.ret)}")
        self.ret, self.mean, self.var = (state[key].clone() for key in ("ret", "mean", "var"))
        self.count = float(state["count"])
