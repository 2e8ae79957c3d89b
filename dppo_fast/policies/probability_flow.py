"""The diffusion policy as a flow: actions by the probability-flow ODE, scored by their likelihood under it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dppo_fast.diffusion.probability_flow import FlowConfig, ProbabilityFlow
from dppo_fast.diffusion.sampler import Chain
from dppo_fast.networks.eta import Eta
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.runtime.precision import matmul_precision
from dppo_fast.types import Act, Obs, Record


@dataclass(frozen=True)
class FlowPolicyConfig(DiffusionConfig, FlowConfig):
    """Of the chain's options the flow knows ``denoising_steps``, ``predict_epsilon``, and by how many steps of the
    chain (``ddim_steps``, ``ft_denoising_steps``) are fine-tuned, where one network takes over from the other.
    """

    def __post_init__(self) -> None:
        DiffusionConfig.__post_init__(self)
        FlowConfig.__post_init__(self)


class FlowPolicy(DiffusionPolicy):
    """A decision is one part, the whole chunk: the ODE makes it of noise, and nothing else is random.

    Log-probs are log-likelihoods / (ln 2 * Th * Da), bits per dimension. ``record``: ``action`` [N, Th, Da], ``probes``
    [N, P, Th, Da], with which it is scored now and later, so that the ratio of two log-probs does not depend on two
    draws, and ``log_prob`` [N, 1].

    ``reference=True`` decides with the stochastic chain and scores as `ProbabilityFlow` does with that flag.
    """

    config: FlowPolicyConfig

    def __init__(
        self,
        network: nn.Module,
        config: FlowPolicyConfig,
        horizon_steps: int,
        action_dim: int,
        eta: Eta | None = None,
        reference: bool = False,
    ) -> None:
        super().__init__(network, config, horizon_steps, action_dim, eta)
        K, F, S = config.denoising_steps, self.ft_steps, self.schedule.steps
        switch = float(self.schedule.timesteps[S - F] + 1) / K if 0 < F < S else float(F > 0)
        self.flow = ProbabilityFlow(K, switch, config, config.predict_epsilon, config.denoised_clip_value, reference)

    @property
    def decisions(self) -> int:
        return 1

    @torch.no_grad()
    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        """As `Policy.act`; deterministic decisions of a flow are its samples, too."""
        draws = (self.schedule.steps + 1 if self.flow.reference else 1) + self.config.sde_num_epsilon
        noise = self.draw_noise(len(obs["state"]), draws)
        chain = self.sampler({**obs, "noise": noise}, deterministic)
        action = chain.action.clone() if self.sampler.enabled else chain.action
        if chain.log_prob is None:
            return Act(action, {})
        return Act(action, {"action": chain.action, "probes": self._probes(noise), "log_prob": chain.log_prob})

    def _sample(self, inputs: Mapping[str, Tensor], deterministic: bool) -> Chain:
        obs, noise = dict(inputs), inputs["noise"]
        with matmul_precision(self.recipe.trained):
            if self.flow.reference:
                action = self.sample(obs, noise[: self.schedule.steps + 1], deterministic).action
            else:
                action = self.flow.sample(*self._networks, obs, noise[0])
            if deterministic:
                return Chain(action)
            return Chain(action, log_prob=self.likelihood(obs, action, self._probes(noise))[:, None])

    def _probes(self, noise: Tensor) -> Tensor:
        """[B, P, Th, Da], of the last P draws."""
        return self.config.probes(noise[-self.config.sde_num_epsilon :]).transpose(0, 1)

    @property
    def _networks(self) -> tuple[Any, Any]:
        return self.actor, self.trained()

    def select(self, record: Record, row: Tensor, k: Tensor) -> Record:
        return {name: record[name][row] for name in ("action", "probes")}

    def log_prob(self, obs: Obs, part: Record, k: Tensor) -> Tensor:
        return self.likelihood(obs, part["action"], part["probes"])

    def likelihood(self, obs: Obs, action: Tensor, probes: Tensor) -> Tensor:
        """Bits per dimension [B] of ``action`` [B, Th, Da], estimated with ``probes`` [B, P, Th, Da]."""
        nats = self.flow.log_likelihood(*self._networks, obs, action, probes)
        return nats / (math.log(2) * self.horizon_steps * self.action_dim)

    def behaviour_cloning_loss(self, obs: Obs) -> Tensor:
        P, shape = self.config.sde_num_epsilon, (len(obs["state"]), self.horizon_steps, self.action_dim)
        action = self.flow.sample(self.actor, self.actor, obs, self.randn(*shape))
        return -self.likelihood(obs, action, self.config.probes(self.randn(shape[0], P, *shape[1:]))).mean()
