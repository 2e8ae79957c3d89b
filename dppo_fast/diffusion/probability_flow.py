"""The probability flow of a diffusion model, and the likelihood that it gives (Song et al. 2021, arXiv 2011.13456).

The variance-preserving SDE and the ODE with the same marginals, t in [0, 1] from data to noise (eq. 11 and 13):

    dx = -beta(t)/2 x dt + sqrt(beta(t)) dw,     dx/dt = -beta(t)/2 (x + score(x, t)),   score = -eps / sqrt(1 - abar)

    log p(x(0)) = log N(x(1); 0, I) + integral of div f(x(t), t) dt,   f = dx/dt                eq. 39
    div f = E[probe^T (df/dx) probe],   E[probe probe^T] = I                                    Hutchinson, eq. 40

beta(t) = -d log abar / dt is infinite at t = 1 and the score is, for deterministic x(0), at t = 0. With the angle a of
abar = cos^2 a in the place of t, the ODE has neither (Salimans & Ho 2022, arXiv 2202.00512):

    dx/da = (eps - x sin a) / cos a

abar is that of the cosine schedule in continuous time (Nichol & Dhariwal 2021, eq. 17), of which timestep i of the K
trained ones is the moment (i + 1) / K. A network is asked for the times between them, too, and before the first one
for the eps of the first, as in the chain's last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dppo_fast.diffusion.sampler import DenoisingNetwork
from dppo_fast.diffusion.schedule import CosineSchedule
from dppo_fast.types import Obs, UserError, require_ranges

PROBES = ("Rademacher", "Gaussian")

COSINE_START = 0.008 / 1.008 * math.pi / 2
COSINE_RATE = math.pi / 2 / 1.008
"""sqrt(abar(t)) = cos(start + rate t) / cos(start)."""

REFERENCE_START = 1e-4


class Solver(NamedTuple):
    """An explicit Runge-Kutta method: where in a step each slope is taken, how much of the earlier slopes leads there,
    and what each weighs in the step.
    """

    nodes: tuple[float, ...]
    coupling: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


SOLVERS = {
    "euler": Solver((0.0,), ((),), (1.0,)),
    "rk4": Solver((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@dataclass(frozen=True)
class FlowConfig:
    """How the ODE is solved and its divergence estimated; keys as in the reference.

    ``sde_method``: one of SOLVERS, with steps of at most ``sde_step_size`` in t. ``sde_num_epsilon``: probes per
    estimate, of a kind in PROBES.
    """

    sde_method: str = "euler"
    sde_step_size: float = 0.05
    sde_hutchinson_type: str = "Rademacher"
    sde_num_epsilon: int = 2

    def __post_init__(self) -> None:
        require_ranges(self, "policy.options", {"sde_step_size": "(0, 1]", "sde_num_epsilon": "[1, inf)"})
        for key, known in (("sde_method", tuple(SOLVERS)), ("sde_hutchinson_type", PROBES)):
            if getattr(self, key) not in known:
                raise UserError(f"policy.options.{key}={getattr(self, key)} is unknown; choose {' or '.join(known)}")

    def probes(self, noise: Tensor) -> Tensor:
        """Probes of the configured kind from standard normals of the same shape."""
        return noise.sign() if self.sde_hutchinson_type == "Rademacher" else noise


class Coefficients(NamedTuple):
    """Of n moments: dx/ds = noise * eps - signal * x, and the level sqrt(1 - abar) and timestep of the network asked
    for eps. Each [n].
    """

    noise: Tensor
    signal: Tensor
    sigma: Tensor
    label: Tensor


def angle(t: Tensor) -> Tensor:
    """arccos sqrt(abar(t))."""
    return ((COSINE_START + COSINE_RATE * t).cos() / math.cos(COSINE_START)).clamp(max=1).acos()


def flow_coefficients(s: Tensor, denoising_steps: int) -> Coefficients:
    """Where s is the angle."""
    t = ((s.cos() * math.cos(COSINE_START)).acos() - COSINE_START) / COSINE_RATE
    asked = t.clamp(min=1 / denoising_steps)
    return Coefficients(1 / s.cos(), s.tan(), angle(asked).sin(), asked * denoising_steps - 1)


def reference_coefficients(s: Tensor, denoising_steps: int) -> Coefficients:
    """Where s is t, of the K trained timesteps only, and with beta_i for beta(t), which is about K beta_i."""
    forward = CosineSchedule.build(denoising_steps)
    i = (s * denoising_steps).round().long().clamp(max=denoising_steps - 1)
    beta, sigma = forward.betas[i], (1 - forward.alphas_cumprod[i]).sqrt()
    return Coefficients(beta / (2 * sigma), beta / 2, sigma, i)


class Path(nn.Module):
    """The steps between the moments ``s`` [n + 1], in that order, and the coefficients at all their stages.

    ``tuned`` [n] tells which network each step follows: the fine-tuned one or the base.
    """

    label: Tensor

    def __init__(
        self, s: Tensor, tuned: list[bool], solver: Solver, coefficients: Callable[[Tensor], Coefficients]
    ) -> None:
        super().__init__()
        length = s.diff()
        stages = s[:-1, None] + length[:, None] * torch.tensor(solver.nodes, dtype=s.dtype)  # [n, stages]
        noise, signal, sigma, label = coefficients(stages.flatten())
        self.solver = solver
        self.tuned = tuned
        self.length: list[float] = length.tolist()
        self.noise: list[float] = noise.tolist()
        self.signal: list[float] = signal.tolist()
        self.sigma: list[float] = sigma.tolist()
        self.register_buffer("label", label.float(), persistent=False)

    def follow(self, slope: Callable[[int, bool, Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the ODE leads from ``x``, and the integral of its divergence [B].

        ``slope(stage, tuned, x)`` gives dx/ds and its divergence; stages are counted through all steps.
        """
        integral, stage = x.new_zeros(len(x)), 0
        for h, tuned in zip(self.length, self.tuned, strict=True):
            slopes: list[Tensor] = []
            for coupling, weight in zip(self.solver.coupling, self.solver.weights, strict=True):
                velocity, divergence = slope(stage, tuned, _advance(x, h, coupling, slopes))
                slopes.append(velocity)
                integral = integral + h * weight * divergence
                stage += 1
            x = _advance(x, h, self.solver.weights, slopes)
        return x, integral


def _advance(x: Tensor, h: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + h * weight * slope
    return x


class ProbabilityFlow(nn.Module):
    """The flow that two denoising networks make: the fine-tuned one from data to the moment ``switch``, then the base.

    It ends half a timestep before t = 1. ``x0_clip`` bounds the clean action behind eps as in the chain.

    ``reference=True`` reproduces the reference: beta_i for beta(t), so that an action moves K times too slowly to ever
    become noise; the divergence of the base network, whichever one x follows; no ``x0_clip``.
    """

    def __init__(
        self,
        denoising_steps: int,
        switch: float,
        config: FlowConfig,
        predict_epsilon: bool = True,
        x0_clip: float | None = None,
        reference: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.predict_epsilon = predict_epsilon
        self.x0_clip = None if reference else x0_clip
        self.reference = reference
        K, solver = denoising_steps, SOLVERS[config.sde_method]
        if reference:
            s = torch.tensor([*_grid(REFERENCE_START, 1.0, config.sde_step_size), 1.0])
            tuned = ((s[:-1] * K).round() <= round(switch * K)).tolist()
        else:
            end = 1 - 0.5 / K
            spans = (0.0, min(switch, end)), (min(switch, end), end)
            low, high = (_grid(start, stop, config.sde_step_size) for start, stop in spans)
            s = angle(torch.tensor([*low, *high, end], dtype=torch.float64))
            tuned = [True] * len(low) + [False] * len(high)
        coefficients = reference_coefficients if reference else flow_coefficients
        self.to_noise = Path(s, tuned, solver, lambda s: coefficients(s, K))
        self.to_data = Path(s.flip(0), tuned[::-1], solver, lambda s: coefficients(s, K))

    @torch.no_grad()
    def sample(self, base: DenoisingNetwork, tuned: DenoisingNetwork, obs: Obs, noise: Tensor) -> Tensor:
        """The action [B, Th, Da] that the flow makes of ``noise`` [B, Th, Da], standard normal."""
        velocity = self._velocities(self.to_data, base, tuned, obs)
        zero = noise.new_zeros(())
        return self.to_data.follow(lambda stage, on, x: (velocity[on](stage, x), zero), noise)[0]

    def log_likelihood(
        self, base: DenoisingNetwork, tuned: DenoisingNetwork, obs: Obs, action: Tensor, probes: Tensor
    ) -> Tensor:
        """log p(action | obs) in nats [B], differentiable; ``action`` [B, Th, Da], ``probes`` [B, P, Th, Da].

        An unbiased estimate of what the solver gives with the whole Jacobian, which Rademacher probes meet exactly
        where that is diagonal.
        """
        velocity = self._velocities(self.to_noise, base, tuned, obs)
        B, P = probes.shape[:2]
        directions = probes.transpose(0, 1).flatten(0, 1)  # [P * B, Th, Da]

        def slope(stage: int, on: bool, x: Tensor) -> tuple[Tensor, Tensor]:
            probed = velocity[on and not self.reference]
            values, estimates = value_and_divergence(lambda y: probed(stage, y), x.repeat(P, 1, 1), directions)
            return velocity[on](stage, x) if self.reference else values[:B], estimates.view(P, B).mean(0)

        noise, integral = self.to_noise.follow(slope, action)
        log_prior = -0.5 * (noise.square() + math.log(2 * math.pi)).sum((1, 2))
        return log_prior + integral

    def _velocities(
        self, path: Path, base: DenoisingNetwork, tuned: DenoisingNetwork, obs: Obs
    ) -> dict[bool, Callable[[int, Tensor], Tensor]]:
        return {False: self._velocity(path, base, obs), True: self._velocity(path, tuned, obs)}

    def _velocity(self, path: Path, network: DenoisingNetwork, obs: Obs) -> Callable[[int, Tensor], Tensor]:
        """dx/ds at (stage, x) for x [P * B, Th, Da], P blocks of all B observations."""
        times, encoded = network.time_table(path.label), network.encode_obs(obs)

        def velocity(stage: int, x: Tensor) -> Tensor:
            output = network.denoise(x, times[stage], torch.cat([encoded] * (len(x) // len(encoded))))
            eps = self._eps(output, x, path.sigma[stage])
            return path.noise[stage] * eps - path.signal[stage] * x

        return velocity

    def _eps(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        if self.predict_epsilon and self.x0_clip is None:
            return output
        scale = math.sqrt(1 - sigma**2)
        x0 = (x - sigma * output) / scale if self.predict_epsilon else output
        if self.x0_clip is not None:
            x0 = x0.clamp(-self.x0_clip, self.x0_clip)
        return (x - scale * x0) / sigma


def value_and_divergence(f: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and probe^T (df/dx) probe [B] of rows ``x`` [B, Th, Da] that f treats one by one, differentiable."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        value = f(x)
        (pulled,) = torch.autograd.grad(value, x, probe, create_graph=differentiable)
    return value if differentiable else value.detach(), (pulled * probe).sum((1, 2))


def _grid(start: float, stop: float, step: float) -> list[float]:
    """``start`` and every ``step`` after it, up to but without ``stop``."""
    return [start + i * step for i in range(math.ceil((stop - start) / step - 1e-6))]
