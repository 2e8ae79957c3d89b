"""The diffusion policy: a denoising chain whose last F steps are fine-tuned (Ren et al. 2024, arXiv 2409.00588)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dppo_fast.diffusion.likelihood import denoising_errors, predict
from dppo_fast.diffusion.sampler import Chain, Clips, Scoring, Segment, differentiable_chain, sample_chain
from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.chain_log_prob import chain_log_prob
from dppo_fast.kernels.denoise_step import gaussian_log_density, posterior_mean
from dppo_fast.networks.eta import Eta
from dppo_fast.policies.base import Policy
from dppo_fast.runtime.graph import GraphedFunction
from dppo_fast.runtime.precision import RECIPES
from dppo_fast.types import Act, Obs, Record, UserError, require_ranges


@dataclass(frozen=True)
class DiffusionConfig:
    """Hyperparameters of the chain; keys as in the reference.

    ``ddim_steps=None`` samples with DDPM. ``ft_denoising_steps=0`` is a policy that is only pre-trained or evaluated.
    ``reward_horizon=None`` scores the whole chunk.
    """

    denoising_steps: int = 20
    ddim_steps: int | None = None
    ft_denoising_steps: int = 0
    predict_epsilon: bool = True
    denoised_clip_value: float | None = 1.0
    eps_clip_value: float | None = None
    randn_clip_value: float | None = 10.0
    final_action_clip_value: float | None = None
    min_sampling_denoising_std: float = 0.1
    min_logprob_denoising_std: float = 0.1
    reward_horizon: int | None = None
    learn_eta: bool = False

    def __post_init__(self) -> None:
        ranges = {
            "denoising_steps": "[1, inf)",
            "denoised_clip_value": "(0, inf)",
            "eps_clip_value": "(0, inf)",
            "randn_clip_value": "(0, inf)",
            "final_action_clip_value": "(0, inf)",
            "min_sampling_denoising_std": "[0, inf)",
            "min_logprob_denoising_std": "[0, inf)",
            "reward_horizon": "[1, inf)",
        }
        require_ranges(self, "policy.options", ranges)


class DiffusionPolicy(Policy):
    """``actor`` denoises the first S-F steps and is frozen once F > 0; ``actor_ft`` denoises the last F and is trained.

    ``record``: ``chain`` [N, F+1, Th, Da], the points around each fine-tuned step, and ``log_prob`` [N, F], the
    behaviour log-probs that the sampler emits; with F = 0, ``action``.
    """

    def __init__(
        self,
        network: nn.Module,
        config: DiffusionConfig,
        horizon_steps: int,
        action_dim: int,
        eta: Eta | None = None,
    ) -> None:
        super().__init__()
        constant = 1.0 if eta is None or eta.constant is None else eta.constant
        self.schedule = NoiseSchedule(config.denoising_steps, config.ddim_steps, config.predict_epsilon, constant)
        F = config.ft_denoising_steps
        if not 0 <= F <= self.schedule.steps:
            raise UserError(
                f"ft_denoising_steps={F} must lie between 0 and the {self.schedule.steps} denoising steps sampled"
            )
        if config.learn_eta and (eta is None or not self.schedule.ddim):
            raise UserError("learn_eta=true needs DDIM (ddim_steps) and an eta network")
        if config.learn_eta and eta is not None and not all(p.isfinite().all() for p in eta.parameters()):
            raise UserError("learn_eta=true needs base_eta inside (min_eta, max_eta): at a bound it has no gradient")
        self.config = config
        self.horizon_steps = horizon_steps
        self.action_dim = action_dim
        self.ft_steps = F
        self.reward_horizon = min(config.reward_horizon or horizon_steps, horizon_steps)
        self.clips = Clips(
            config.denoised_clip_value,
            config.eps_clip_value,
            config.randn_clip_value,
            config.final_action_clip_value,
        )
        self.min_sampling_std = float(config.min_sampling_denoising_std)
        self.min_log_prob_std = float(config.min_logprob_denoising_std)
        self.actor = network.eval()
        self.actor_ft = None
        self.eta = eta
        if F > 0:
            self.actor_ft = copy.deepcopy(network)
            self.actor.requires_grad_(False)
        if eta is not None and not config.learn_eta:
            eta.requires_grad_(False)
        self.recipe = RECIPES["fp32"]
        self.sampler = GraphedFunction(self._sample)

    @property
    def decisions(self) -> int:
        return self.ft_steps

    @property
    def first_ft_step(self) -> int:
        """S - F: where the fine-tuned network takes over."""
        return self.schedule.steps - self.ft_steps

    def eta_of(self, obs: Obs) -> Tensor | None:
        """[B, 1 or Da] where eta depends on the observation or is learned; None where the schedule's table holds it."""
        if self.eta is None or (self.eta.constant is not None and not self.config.learn_eta):
            return None
        eta: Tensor = self.eta(obs)
        return eta

    @torch.no_grad()
    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        """As `Policy.act`; in a CUDA graph (``sampler.enabled``) a record holds until the next call."""
        noise = self.draw_noise(len(obs["state"]), self.schedule.steps + 1)
        chain = self.sampler({**obs, "noise": noise}, deterministic)
        action = chain.action.clone() if self.sampler.enabled else chain.action
        if chain.points is None or chain.log_prob is None:
            return Act(action, {} if deterministic else {"action": action})
        return Act(action, {"chain": chain.points, "log_prob": chain.log_prob})

    def _sample(self, inputs: Mapping[str, Tensor], deterministic: bool) -> Chain:
        score = self.ft_steps > 0 and not deterministic
        return self.sample(dict(inputs), inputs["noise"], deterministic, score)

    def sample(
        self,
        obs: Obs,
        noise: Tensor,
        deterministic: bool = False,
        score: bool = False,
        base_policy: bool = False,
    ) -> Chain:
        """Denoise ``noise`` [S + 1, B, Th, Da]; ``base_policy`` uses the frozen network at every step."""
        segments = self._segments(base_policy)
        eta = None if deterministic else self.eta_of(obs)
        std = self.schedule.deterministic_std() if deterministic else self._sampling_std(eta)
        scoring = Scoring(self.first_ft_step, self.min_log_prob_std, self.reward_horizon) if score else None
        return sample_chain(segments, self.schedule, obs, noise, std, self.clips, deterministic, eta, scoring)

    def rsample(self, obs: Obs, noise: Tensor) -> Tensor:
        """The action [B, Th, Da] of the stochastic `sample`, differentiable through the whole chain."""
        eta = self.eta_of(obs)
        std = self._sampling_std(eta)
        return differentiable_chain(self._segments(), self.schedule, obs, noise, std, self.clips, eta)

    def _segments(self, base_policy: bool = False) -> list[Segment]:
        S, first = self.schedule.steps, self.first_ft_step
        if base_policy or self.actor_ft is None:
            return [Segment(self.actor, range(S), self.recipe.trained)]
        return [
            Segment(self.actor, range(first), self.recipe.base),
            Segment(self.actor_ft, range(first, S), self.recipe.trained),
        ]

    def _sampling_std(self, eta: Tensor | None) -> Tensor:
        """[S], or [S, B, 1, 1 or Da] with ``eta``."""
        if eta is None:
            std = self.schedule.table[:, 4]
        else:
            std = torch.stack([self.schedule.coefficients(k, eta=eta).std for k in range(self.schedule.steps)])
        return std.clamp(min=self.min_sampling_std)

    def select(self, record: Record, row: Tensor, k: Tensor) -> Record:
        chain = record["chain"].flatten(0, 1)
        point = row * (self.ft_steps + 1) + k
        return {"x": chain[point], "x_next": chain[point + 1]}

    def log_prob(self, obs: Obs, part: Record, k: Tensor) -> Tensor:
        return self._score(obs, part["x"], part["x_next"], k, self.reward_horizon)

    def _score(self, obs: Obs, x: Tensor, x_next: Tensor, k: Tensor, horizon: int) -> Tensor:
        row = self.schedule.coefficients(self.first_ft_step + k, eta=self.eta_of(obs))
        eps, clips = self.predict(obs, x, k), self.clips
        return chain_log_prob(eps, x, x_next, row, self.min_log_prob_std, horizon, clips.x0, clips.eps)

    def predict(self, obs: Obs, x: Tensor, k: Tensor, base_policy: bool = False) -> Tensor:
        """The fine-tuned network's output [B, Th, Da] at ``x`` and its steps k [B] (0 = earliest)."""
        network = self.actor if base_policy else self.actor_ft
        return predict(network, self.schedule, obs, x, k, self.first_ft_step)

    def log_density(self, obs: Obs, x: Tensor, x_next: Tensor, k: Tensor, base_policy: bool = False) -> Tensor:
        """Elementwise log-density [B, Th, Da] of fine-tuned transitions k [B], always stochastic."""
        row = self.schedule.coefficients(self.first_ft_step + k, eta=self.eta_of(obs))
        mean = posterior_mean(self.predict(obs, x, k, base_policy), x, row, self.clips.x0, self.clips.eps)
        return gaussian_log_density(x_next, mean, row.std.clamp(min=self.min_log_prob_std))

    def behaviour_cloning_loss(self, obs: Obs) -> Tensor:
        batch = len(obs["state"])
        with torch.no_grad():
            noise = self.randn(self.schedule.steps + 1, batch, self.horizon_steps, self.action_dim)
            chain = self.sample(obs, noise, score=True, base_policy=True).points
        assert chain is not None
        k = torch.arange(self.ft_steps, device=chain.device).repeat(batch)
        repeated = {name: value.repeat_interleave(self.ft_steps, 0) for name, value in obs.items()}
        x, x_next = chain[:, :-1].flatten(0, 1), chain[:, 1:].flatten(0, 1)
        return -self._score(repeated, x, x_next, k, self.horizon_steps).mean()

    def entropy(self, obs: Obs) -> Tensor:
        eta = self.eta_of(obs)
        constant = self.eta.constant if self.eta is not None and self.eta.constant is not None else 1.0
        return torch.full((), constant, device=obs["state"].device) if eta is None else eta.mean()

    def cloning_draws(self, batch: int) -> dict[str, Tensor]:
        """Uniform timesteps ``t`` [B] among all K, and ``noise`` [B, Th, Da]."""
        K = self.schedule.denoising_steps
        t = torch.randint(K, (batch,), generator=self.generator, device=self.schedule.table.device)
        return {"t": t, "noise": self.randn(batch, self.horizon_steps, self.action_dim)}

    def cloning_errors(self, obs: Obs, action: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """The mean squared errors, with dropout, of denoising from the timesteps and the noise drawn."""
        epsilon = self.config.predict_epsilon
        with self.dropout() as network:
            return denoising_errors(network, self.schedule, obs, action, draws["t"], draws["noise"], epsilon)

    def denoising_loss(self, obs: Obs, action: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The mean of ``cloning_errors`` at timesteps ``t`` [B] with ``noise`` [B, Th, Da]."""
        return self.cloning_errors(obs, action, {"t": t, "noise": noise}).mean()

    def set_ft_steps(self, ft_steps: int) -> None:
        """Fine-tune fewer steps from now on: the steps given up keep the present fine-tuned weights, frozen.

        The trained parameters stay the same tensors, so that their optimizer goes on training them.
        """
        if not 1 <= ft_steps <= self.ft_steps:
            raise ValueError(f"ft_steps={ft_steps} must lie between 1 and the present {self.ft_steps}")
        if ft_steps < self.ft_steps:
            self.actor.load_state_dict(self.actor_ft.state_dict())
            self.ft_steps = ft_steps
            self.sampler.forget()

    def set_min_sampling_std(self, std: float) -> None:
        """Another floor of the sampling std from now on."""
        if std != self.min_sampling_std:
            self.min_sampling_std = std
            self.sampler.forget()
