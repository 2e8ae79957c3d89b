"""What PPO asks of a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dppo_fast.kernels.philox import keyed_normal
from dppo_fast.types import Act, NoiseStream, Obs, Record


class Policy(nn.Module, ABC):
    """A trainable policy whose decisions consist of ``decisions`` scored parts: F denoising steps, or one action.

    ``noise`` is the source of all randomness in ``act``, ``generator`` that of the losses; None means PyTorch's default
    one. Dropout, where a network has it, acts only where ``dropout`` says so, and is always of the default one.
    """

    actor: Any
    """The frozen base network, or the only one."""
    actor_ft: Any
    """The network that is fine-tuned; None where there is none."""
    horizon_steps: int
    action_dim: int
    generator: torch.Generator | None = None

    def __init__(self) -> None:
        super().__init__()
        self.noise = NoiseStream(0)
        self.env_ids: Tensor
        self.register_buffer("env_ids", torch.arange(0), persistent=False)

    @property
    @abstractmethod
    def decisions(self) -> int:
        """Scored parts per action chunk; ``record["log_prob"]`` is [N, decisions]."""

    @abstractmethod
    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        """Decide for N envs. Deterministic decisions carry an empty record."""

    @abstractmethod
    def select(self, record: Record, row: Tensor, k: Tensor) -> Record:
        """What scores part ``k`` [B] of decision ``row`` [B]; ``record`` leads with all decisions [M]."""

    @abstractmethod
    def log_prob(self, obs: Obs, part: Record, k: Tensor) -> Tensor:
        """Log-probs [B] of selected parts under the current parameters, differentiable."""

    @abstractmethod
    def entropy(self, obs: Obs) -> Tensor:
        """What ``ent_coef`` rewards: the entropy of a Gaussian, the mean eta of a diffusion policy; 0-d."""

    @abstractmethod
    def cloning_errors(self, obs: Obs, action: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """What pre-training minimises, of each of the chunks ``action`` [B, Th, Da]: [B]."""

    def cloning_draws(self, batch: int) -> dict[str, Tensor]:
        """The random numbers that ``cloning_errors`` takes; here none."""
        return {}

    def cloning_loss(self, obs: Obs, action: Tensor) -> Tensor:
        """The pre-training loss on demonstrated chunks ``action`` [B, Th, Da]."""
        return self.cloning_errors(obs, action, self.cloning_draws(len(action))).mean()

    @abstractmethod
    def behaviour_cloning_loss(self, obs: Obs) -> Tensor:
        """Minus the mean log-prob of what the frozen base policy samples for ``obs``."""

    def trained(self) -> nn.Module:
        """The network that the actor's optimizer trains."""
        network: nn.Module = self.actor if self.actor_ft is None else self.actor_ft
        return network

    @contextmanager
    def dropout(self) -> Iterator[Any]:
        """The trained network, with dropout."""
        network = self.trained()
        yield network.train()
        network.eval()

    def draw_noise(self, batch: int, draws: int) -> Tensor:
        """[draws, B, Th, Da]: the standard normals of this decision, which are the same in every batch."""
        first = self.noise.first_env
        if len(self.env_ids) < first + batch:
            self.env_ids = torch.arange(first + batch, device=self.env_ids.device)
        env = self.env_ids[first : first + batch]
        step = torch.full_like(env, self.noise.step)
        self.noise.step += 1
        noise = keyed_normal(self.noise.seed, env, step, draws, self.horizon_steps * self.action_dim)
        return noise.view(draws, batch, self.horizon_steps, self.action_dim)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal draws on the policy's device."""
        device = next(self.parameters()).device
        return torch.randn(shape, generator=self.generator, device=device)


def inverse_transform(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices [...] in proportion to ``weights`` [..., M], decided by numbers ``uniform`` [...] in [0, 1].

    The sums are not `Tensor.cumsum`, which PyTorch refuses on CUDA where algorithms have to be deterministic.
    """
    M = weights.shape[-1]
    upto = torch.ones(M, M, dtype=torch.bool, device=weights.device).tril()
    sums = torch.where(upto, weights[..., None, :], 0).sum(-1)
    return (sums[..., :-1] < uniform[..., None] * sums[..., -1:]).sum(-1)
