"""The authors' code, irom-princeton/dppo v0.8.0, imported from a checkout and driven as its own agent drives it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from unittest.mock import patch

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import AdamW

from dppo_fast.algorithms.dppo import DPPO
from dppo_fast.types import Obs, UserError

Array: TypeAlias = NDArray[Any]

LOG_PROB_BATCH = 10000
"""Decisions whose log-probs the agent recomputes at once."""


class Rollout(NamedTuple):
    """What the agent keeps of M decisions; ``log_prob`` [M, F, Th, Da] is elementwise, ``chain`` [M, F+1, Th, Da]."""

    state: Tensor
    chain: Tensor
    log_prob: Tensor
    returns: Tensor
    value: Tensor
    advantage: Tensor


class Reference:
    """Its PPODiffusion with the weights and settings of our ``algorithm``, and its agent's two optimizers.

    ``network`` and ``critic`` are the arguments of its networks. DDPM only. Raises UserError where ``checkout`` does
    not hold its classes or they cannot be imported.
    """

    def __init__(self, checkout: Path, algorithm: DPPO, network: Mapping[str, Any], critic: Mapping[str, Any]) -> None:
        policy, config = algorithm.policy, algorithm.config
        options = policy.config
        assert options.ddim_steps is None
        diffusion, networks, critics, scaling = (
            load(checkout, name)
            for name in ("model.diffusion.diffusion_ppo", "model.diffusion.mlp_diffusion", "model.common.critic",
                         "util.reward_scaling")
        )  # fmt: skip
        dims = {"horizon_steps": policy.horizon_steps, "action_dim": policy.action_dim}
        self.model = diffusion.PPODiffusion(
            actor=networks.DiffusionMLP(**network, **dims),
            critic=critics.CriticObs(**critic),
            obs_dim=network["cond_dim"],
            device=algorithm.device,
            denoising_steps=options.denoising_steps,
            ft_denoising_steps=policy.ft_steps,
            denoised_clip_value=options.denoised_clip_value,
            randn_clip_value=options.randn_clip_value,
            final_action_clip_value=options.final_action_clip_value,
            min_sampling_denoising_std=options.min_sampling_denoising_std,
            min_logprob_denoising_std=options.min_logprob_denoising_std,
            gamma_denoising=config.gamma_denoising,
            clip_ploss_coef=config.clip_ploss_coef,
            clip_ploss_coef_base=config.clip_ploss_coef_base,
            clip_ploss_coef_rate=config.clip_ploss_coef_rate,
            clip_vloss_coef=config.clip_vloss_coef,
            norm_adv=config.norm_adv,
            **dims,
        )
        self.take_weights(algorithm)
        self.config = config
        self.device = algorithm.device
        self.reward_horizon = policy.reward_horizon
        self.actor_optimizer = AdamW(
            self.model.actor_ft.parameters(), lr=config.actor_lr, weight_decay=config.actor_weight_decay
        )
        self.critic_optimizer = AdamW(
            self.model.critic.parameters(), lr=config.critic_lr, weight_decay=config.critic_weight_decay
        )
        self.reward_scaler = scaling.RunningRewardScaler(algorithm.buffer.num_envs)

    def take_weights(self, algorithm: DPPO) -> None:
        self.model.actor.load_state_dict(algorithm.policy.actor.state_dict())
        self.model.actor_ft.load_state_dict(algorithm.policy.actor_ft.state_dict())
        self.model.critic.load_state_dict(algorithm.critic.state_dict())

    def sample(self, obs: Obs) -> tuple[Tensor, Tensor]:
        """Actions [B, Th, Da] and chains [B, F+1, Th, Da]."""
        samples = self.model(cond=obs, deterministic=False, return_chain=True)
        return samples.trajectories, samples.chains

    @torch.no_grad()
    def log_prob(self, obs: Obs, chain: Tensor) -> Tensor:
        """Elementwise log-probs [B, F, Th, Da] of chains."""
        elements: Tensor = self.model.get_logprobs(obs, chain)
        return elements.view(len(chain), -1, *chain.shape[2:])

    def loss(self, rollout: Rollout, row: Tensor, k: Tensor, fix: bool) -> Tensor:
        """The total loss of the pairs (``row``, ``k``)."""
        pairs = (
            {"state": rollout.state[row]},
            rollout.chain[row, k],
            rollout.chain[row, k + 1],
            k.as_subclass(IteratedAtOnce) if fix else k,
            rollout.returns[row],
            rollout.value[row],
            rollout.advantage[row],
            rollout.log_prob[row, k],
        )
        with vectorised_discount() if fix else nullcontext():
            policy, entropy, value, *_ = self.model.loss(*pairs, reward_horizon=self.reward_horizon)
        total: Tensor = policy + self.config.ent_coef * entropy + self.config.vf_coef * value
        return total

    def minibatch(self, rollout: Rollout, row: Tensor, k: Tensor, fix: bool) -> None:
        """One step of both optimizers."""
        loss = self.loss(rollout, row, k, fix)
        self.actor_optimizer.zero_grad()
        self.critic_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.actor_optimizer.step()
        self.critic_optimizer.step()

    def iteration(self, envs: ReferenceEnvs, steps: int, epochs: int, batch_size: int, fix: bool) -> None:
        """Collect ``steps`` decisions of every env and learn from them, with the host arrays of the agent."""
        with torch.no_grad():
            rollout = self._collect(envs, steps)
        pairs = len(rollout.state) * rollout.log_prob.shape[1]
        for _ in range(epochs):
            order = torch.randperm(pairs, device=self.device)
            for start in range(0, pairs - batch_size + 1, batch_size):
                pair = order[start : start + batch_size]
                row, k = torch.unravel_index(pair, rollout.log_prob.shape[:2])
                self.minibatch(rollout, row, k, fix)

    def _collect(self, envs: ReferenceEnvs, steps: int) -> Rollout:
        states, chains, rewards, terminated, first = [], [], [], [], [envs.first]
        for _ in range(steps):
            action, chain = self.sample({"state": self._tensor(envs.state)})
            states.append(envs.state)
            chains.append(chain.cpu().numpy())
            reward, over = envs.step(action.cpu().numpy())
            rewards.append(reward)
            terminated.append(over)
            first.append(envs.first)
        state = self._tensor(np.stack(states)).flatten(0, 1)
        chain = self._tensor(np.stack(chains)).flatten(0, 1)
        value, log_prob = [], []
        for rows, points in zip(*(torch.split(x, LOG_PROB_BATCH) for x in (state, chain)), strict=True):
            value.append(self.model.critic({"state": rows}).cpu().numpy().reshape(-1))
            log_prob.append(self.log_prob({"state": rows}, points).cpu().numpy())
        values = np.concatenate(value).reshape(steps, envs.num_envs)
        scaled = self.reward_scaler(reward=np.stack(rewards).T, first=np.stack(first[:-1]).T).T
        last = self.model.critic({"state": self._tensor(envs.state)}).cpu().numpy().reshape(-1)
        config = self.config
        advantage = advantages(
            scaled * config.reward_scale_const,
            np.concatenate([values, last[None]]),
            np.stack(terminated),
            config.gamma,
            config.gae_lambda,
        )
        return Rollout(
            state,
            chain,
            self._tensor(np.concatenate(log_prob)),
            *(self._tensor(array).flatten() for array in (advantage + values, values, advantage)),
        )

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).float().to(self.device)


def advantages(reward: Array, value: Array, terminated: Array, gamma: float, lam: float) -> Array:
    """GAE [T, N] as its agent has it: a NumPy operation at a time, knowing terminations only; ``value`` [T + 1, N]."""
    going = 1.0 - terminated
    advantage = np.zeros_like(reward)
    carry = np.zeros(reward.shape[1])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * value[t + 1] * going[t] - value[t]
        carry = delta + gamma * lam * going[t] * carry
        advantage[t] = carry
    return advantage


class ReferenceEnvs:
    """Its environments: gymnasium's processes, one per env, around the checkout's own two wrappers.

    Those were written for the old gym, whose calls `_OldCalls` and `_NewCalls` translate to gymnasium's.
    """

    def __init__(self, checkout: Path, env_id: str, num_envs: int, act_steps: int, limit: int, normalization: str):
        folder = checkout / "env/gym_utils/wrapper"
        with patch.dict(sys.modules, {"gym": gymnasium}):
            lowdim = load_file(folder / "mujoco_locomotion_lowdim.py").MujocoLocomotionLowdimWrapper
            multi_step = load_file(folder / "multi_step.py").MultiStep

        def make() -> gymnasium.Env[Any, Any]:
            env = gymnasium.make(env_id, max_episode_steps=limit, disable_env_checker=True)
            inner = lowdim(_OldCalls(env), normalization)
            return _NewCalls(
                multi_step(inner, n_action_steps=act_steps, max_episode_steps=limit, reset_within_step=True)
            )

        self._envs = AsyncVectorEnv([make] * num_envs, context="fork", autoreset_mode=AutoresetMode.DISABLED)
        self.num_envs = num_envs
        self.state: Array = self._envs.reset()[0]["state"]
        self.first = np.ones(num_envs)

    def step(self, action: Array) -> tuple[Array, Array]:
        """Rewards and terminations [N]; afterwards ``state`` [N, To, Do] and ``first`` [N] are the next decision's."""
        obs, reward, terminated, truncated, _ = self._envs.step(action)
        self.state, self.first = obs["state"], (terminated | truncated).astype(float)
        return reward, terminated

    def close(self) -> None:
        self._envs.close()


class _OldCalls(gymnasium.Wrapper[Any, Any, Any, Any]):
    """reset() -> obs, step() -> obs, reward, done, info."""

    def reset(self, **arguments: Any) -> Any:
        return self.env.reset()[0]

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        if truncated:
            info["TimeLimit.truncated"] = not terminated
        return obs, reward, terminated or truncated, info


class _NewCalls(gymnasium.Wrapper[Any, Any, Any, Any]):
    """reset() -> obs, info. The agent reads nothing of info, so none of it crosses the processes."""

    def reset(self, **arguments: Any) -> Any:
        return self.env.reset(), {}

    def step(self, action: Any) -> Any:
        return *self.env.step(action)[:4], {}


class IteratedAtOnce(Tensor):
    """A tensor whose only element, to a loop over it, is itself."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Tensor]:
        return iter([self.as_subclass(Tensor)])


@contextmanager
def vectorised_discount() -> Iterator[None]:
    """What "+fix" means: the loss makes its denoising discount in a Python loop over the samples, and a tensor of that
    list. With indices that are `IteratedAtOnce` the loop runs once, over all of them.
    """
    tensor = torch.tensor

    def unpacked(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        whole = isinstance(data, list) and len(data) == 1 and isinstance(data[0], Tensor)
        return data[0] if whole else tensor(data, *args, **kwargs)

    with patch.object(torch, "tensor", unpacked):
        yield


def load(checkout: Path, module: str) -> Any:
    """Import a module of the checkout. Raises UserError if it is not there or needs a package that is not."""
    with patch.object(sys, "path", [str(checkout), *sys.path]):
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"--reference {checkout}: cannot import {module} ({error})") from error


def load_file(path: Path) -> Any:
    """Import a file by itself, without the package that it lies in."""
    spec = importlib.util.spec_from_file_location(f"reference_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
