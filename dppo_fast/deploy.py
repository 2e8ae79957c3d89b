"""A trained policy on a robot: observations and actions in the robot's units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dppo_fast.build import LoadedPolicy, pick_device
from dppo_fast.build import load_policy as load_checkpoint
from dppo_fast.envs.normalize import BoundedMinMax, MinMax, Normalization, Running
from dppo_fast.policies.diffusion import DiffusionPolicy
from dppo_fast.policies.probability_flow import FlowPolicy
from dppo_fast.types import NoiseStream, Obs, UserError

Array: TypeAlias = NDArray[np.generic]


class Units(nn.Module):
    """A `Normalization` in PyTorch, float64 as there: (o - center) scale, bounded; (a + 1) / 2 (high - low) + low."""

    center: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, normalization: Normalization | None) -> None:
        super().__init__()
        center, scale, self.bound = np.zeros(1), np.ones(1), math.inf
        low, high = -np.ones(1), np.ones(1)
        if normalization is not None:
            low, high = normalization.action_min, normalization.action_max
        if isinstance(normalization, MinMax):
            spread = normalization.obs_max - normalization.obs_min + normalization.epsilon
            center, scale = normalization.obs_min + spread / 2, 2 / spread
        if isinstance(normalization, BoundedMinMax):
            self.bound = normalization.bound.item()
        elif isinstance(normalization, Running):
            center, scale, self.bound = normalization.mean, 1 / np.sqrt(normalization.variance + 1e-8), 10.0
        for name, value in {"center": center, "scale": scale, "low": low, "high": high}.items():
            self.register_buffer(name, torch.tensor(value))

    def normalize(self, state: Tensor) -> Tensor:
        """Raw states [..., Do] in the policy's units, float32."""
        return ((state.double() - self.center) * self.scale).clamp(-self.bound, self.bound).float()

    def unnormalize(self, action: Tensor) -> Tensor:
        """The policy's actions [..., Da] in raw units, float32."""
        return ((action.double() + 1) / 2 * (self.high - self.low) + self.low).float()


class DeployedPolicy(nn.Module):
    """The policy of a checkpoint, with its normalisation, deciding as in evaluation: without exploration, and chosen by
    critics where its algorithm does so.

    ``obs_shapes``: what it observes, by name, [To, ...]. It decides on the next ``act_steps`` actions of ``action_dim``
    dimensions.
    """

    def __init__(self, loaded: LoadedPolicy, device: torch.device, seed: int = 0) -> None:
        super().__init__()
        self.policy = loaded.policy.eval().requires_grad_(False)
        self.policy.noise = NoiseStream(seed)
        self.decide, self.judged = loaded.actor.act, loaded.actor is not loaded.policy
        if isinstance(self.policy, DiffusionPolicy):
            self.policy.sampler.enabled = device.type == "cuda"
        self.units = Units(loaded.normalization).to(device)
        self.device = device
        self.obs_shapes = loaded.obs_shapes
        self.act_steps = loaded.config.task.act_steps
        self.action_dim = self.policy.action_dim

    @overload
    def act(self, obs: Tensor | Mapping[str, Tensor]) -> Tensor: ...

    @overload
    def act(self, obs: Array | Mapping[str, Array]) -> Array: ...

    def act(self, obs: Tensor | Array | Mapping[str, Tensor] | Mapping[str, Array]) -> Tensor | Array:
        """The next actions [Ta, Da] for a raw observation: a state [To, Do], or such by name with images [To, C, H, W].

        A leading batch dimension is kept. NumPy gives NumPy; a tensor gives a tensor on its device; float32 both.
        Raises UserError where the observation has other names or shapes than ``obs_shapes``, and for NaN and Inf, which
        are looked for on the CPU.
        """
        named: Mapping[str, Tensor | Array] = obs if isinstance(obs, Mapping) else {"state": obs}
        if named.keys() != self.obs_shapes.keys():
            raise UserError(f"the observation holds {sorted(named)}, the policy takes {sorted(self.obs_shapes)}")
        state = named["state"]
        tensors = {name: torch.as_tensor(value) for name, value in named.items()}
        single = tensors["state"].dim() == len(self.obs_shapes["state"])
        inputs: Obs = {}
        for name, value in tensors.items():
            given, expected = tuple(value.shape if single else value.shape[1:]), tuple(self.obs_shapes[name])
            if given != expected:
                raise UserError(f"the observation's {name!r} has shape {list(value.shape)}, expected {list(expected)}")
            if value.device.type == "cpu" and not value.isfinite().all():
                raise UserError(f"the observation's {name!r} holds NaN or Inf")
            inputs[name] = (value[None] if single else value).to(self.device)
        action = self.raw(self.decide(self.normalized(inputs), deterministic=True).action)
        action = action[0] if single else action
        return action.to(state.device) if isinstance(state, Tensor) else action.cpu().numpy()

    def normalized(self, obs: Obs) -> Obs:
        return {**obs, "state": self.units.normalize(obs["state"])}

    def raw(self, action: Tensor) -> Tensor:
        """What is executed of a chunk [B, Th, Da], in raw units: [B, Ta, Da]."""
        return self.units.unnormalize(action[:, : self.act_steps])


class WholeChain(nn.Module):
    """A deployed diffusion policy as a function: noise [S + 1, B, Th, Da] and the observations of ``names`` [B, ...],
    raw, to raw actions [B, Ta, Da].

    Raises UserError for another kind of policy, and for one of whose chains critics choose.
    """

    def __init__(self, deployed: DeployedPolicy) -> None:
        super().__init__()
        if not isinstance(deployed.policy, DiffusionPolicy):
            raise UserError(f"{type(deployed.policy).__name__} has no denoising chain; give a diffusion policy")
        if isinstance(deployed.policy, FlowPolicy):
            raise UserError("FlowPolicy decides by its probability flow, and a graph would be its denoising chain")
        if deployed.judged:
            raise UserError("critics choose among several of its chains, and a graph would be a single one")
        self.deployed = deployed
        self.chain = deployed.policy
        self.names = ("noise", *deployed.obs_shapes)

    def forward(self, noise: Tensor, *observations: Tensor) -> Tensor:
        obs = self.deployed.normalized(dict(zip(self.names[1:], observations, strict=True)))
        return self.deployed.raw(self.chain.sample(obs, noise, deterministic=True).action)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Random arguments."""
        policy, generator = self.chain, torch.Generator().manual_seed(0)
        noise = torch.randn(
            policy.schedule.steps + 1, batch, policy.horizon_steps, policy.action_dim, generator=generator
        )
        values = [noise]
        for name, shape in self.deployed.obs_shapes.items():
            value = torch.rand(batch, *shape, generator=generator)
            values.append(value if name == "state" else (255 * value).byte())
        return tuple(value.to(self.deployed.device) for value in values)


def load_policy(path: str | Path, device: str = "auto", seed: int = 0) -> DeployedPolicy:
    """The policy of one of our checkpoints, or of a run directory's latest, ready to act.

    ``seed``: what its noise follows from. Raises UserError where the file is missing, damaged or not ours.
    """
    chosen = pick_device(device)
    return DeployedPolicy(load_checkpoint(path, chosen), chosen, seed)
