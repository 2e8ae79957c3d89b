"""The probability flow: its likelihood and its samples are the data's where those are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dppo_fast.diffusion.probability_flow import (
    PROBES,
    SOLVERS,
    FlowConfig,
    Path,
    ProbabilityFlow,
    angle,
    flow_coefficients,
)
from dppo_fast.types import Obs, UserError
from tests.golden_files import Case
from tests.golden_flows import flow_cases, flow_policy, probes
from tests.golden_models import observations
from tests.tolerances import LOG_PROB

SHAPE = (2, 2)
"""Th, Da."""
MEAN = torch.tensor([0.3, -0.2, 0.0, 0.5], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[0.09, 0.03, 0.0, 0.0], [0.03, 0.04, 0.01, 0.0], [0.0, 0.01, 0.16, -0.05], [0.0, 0.0, -0.05, 0.25]],
    dtype=torch.float64,
)
OBS: Obs = {}
FINE = {"sde_method": "rk4", "sde_step_size": 0.02}


class GaussianData:
    """The ideal denoising network for x(0) ~ N(mean + shift, scale * covariance), of any timestep."""

    def __init__(
        self, denoising_steps: int, scale: float = 1.0, shift: float = 0.0, predict_epsilon: bool = True
    ) -> None:
        self.K, self.predict_epsilon = denoising_steps, predict_epsilon
        self.mean, self.covariance = MEAN + shift, scale * COVARIANCE
        self.variances, self.axes = torch.linalg.eigh(self.covariance)

    def time_table(self, t: Tensor) -> Tensor:
        return angle((t.double() + 1) / self.K)

    def encode_obs(self, obs: Obs) -> Tensor:
        return torch.zeros(1)

    def denoise(self, x: Tensor, time: Tensor, obs: Tensor) -> Tensor:
        signal, noise = time.cos(), time.sin()
        precision = 1 / (signal.square() * self.variances + noise.square())
        score = -(((x.flatten(1) - signal * self.mean) @ self.axes) * precision) @ self.axes.T
        eps = -noise * score.view_as(x)
        return eps if self.predict_epsilon else (x - noise * eps) / signal

    def step(self, t: Tensor) -> None:
        return None

    def log_density(self, x: Tensor) -> Tensor:
        normal = torch.distributions.MultivariateNormal(self.mean, self.covariance)
        return normal.log_prob(x.flatten(1))


def flow(denoising_steps: int, switch: float = 1.0, **more: Any) -> ProbabilityFlow:
    config = FlowConfig(**{key: more.pop(key) for key in list(more) if key.startswith("sde_")})
    return ProbabilityFlow(denoising_steps, switch, config, **more)


def actions(batch: int = 16) -> Tensor:
    """Drawn from the data, so that the densest and the rare are there."""
    normal = torch.randn(batch, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (MEAN + normal @ torch.linalg.cholesky(COVARIANCE).T).view(batch, *SHAPE)


def every_direction(batch: int) -> Tensor:
    """Probes [B, 4, Th, Da] with which the divergence is the trace itself."""
    return (2 * torch.eye(4, dtype=torch.float64)).view(1, 4, *SHAPE).expand(batch, -1, -1, -1)


def error(model: ProbabilityFlow, base: GaussianData, tuned: GaussianData) -> float:
    """The largest of the log-likelihood of ``tuned``'s data, in nats."""
    x = actions()
    estimate = model.log_likelihood(base, tuned, OBS, x, every_direction(len(x))).detach()
    return float((estimate - tuned.log_density(x)).abs().max())


@pytest.mark.parametrize("predict_epsilon", [True, False])
def test_the_log_likelihood_of_gaussian_data_is_the_true_one(predict_epsilon: bool) -> None:
    network = GaussianData(1000, predict_epsilon=predict_epsilon)
    assert error(flow(1000, predict_epsilon=predict_epsilon, **FINE), network, network) < 0.02


def test_it_is_the_truer_the_more_timesteps_were_trained() -> None:
    errors = [error(flow(K, **FINE), GaussianData(K), GaussianData(K)) for K in (20, 100, 500)]
    assert errors[0] < 1
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_the_networks_take_turns_at_the_switch() -> None:
    """What is alike in both makes no difference, and each matters on its side only."""
    x, probes = actions(), every_direction(16)
    one, other = GaussianData(100), GaussianData(100, scale=2.0)

    def likelihood(switch: float, base: GaussianData, tuned: GaussianData) -> Tensor:
        return flow(100, switch, **FINE).log_likelihood(base, tuned, OBS, x, probes)

    torch.testing.assert_close(likelihood(0.0, one, other), likelihood(1.0, other, one))
    assert (likelihood(0.5, one, other) - likelihood(0.5, one, one)).abs().max() > 0.1
    assert (likelihood(0.5, other, one) - likelihood(0.5, one, one)).abs().max() > 0.1
    torch.testing.assert_close(likelihood(0.5, one, one), likelihood(1.0, other, one), rtol=0, atol=1e-3)


def test_the_divergence_is_that_of_the_fine_tuned_network() -> None:
    """The reference takes the base network's, so that a fine-tuned policy's density is none."""
    base, tuned = GaussianData(1000, scale=4.0, shift=0.5), GaussianData(1000)
    assert error(flow(1000, **FINE), base, tuned) < 0.02


def test_an_action_becomes_noise() -> None:
    """In the reference, whose beta is K times too small, it stays an action, of which the prior knows nothing."""
    network, x = GaussianData(100), actions(512)
    noise = follow_to_noise(flow(100, **FINE), network, x)
    assert noise.mean(0).abs().max() < 0.2
    assert (noise.flatten(1).T.cov() - torch.eye(4)).abs().max() < 0.2
    assert error(flow(100, **FINE), network, network) < 0.3
    assert error(flow(100, reference=True, sde_step_size=0.01), network, network) > 2


def test_samples_have_the_datas_moments_and_lead_back() -> None:
    network, model = GaussianData(500), flow(500, **FINE)
    noise = torch.randn(4096, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = model.sample(network, network, OBS, noise)
    torch.testing.assert_close(x.flatten(1).mean(0), MEAN, rtol=0, atol=0.03)
    torch.testing.assert_close(x.flatten(1).T.cov(), COVARIANCE, rtol=0, atol=0.02)
    torch.testing.assert_close(follow_to_noise(model, network, x), noise, rtol=0, atol=0.01)


def follow_to_noise(model: ProbabilityFlow, network: GaussianData, x: Tensor) -> Tensor:
    velocity = model._velocity(model.to_noise, network, OBS)
    return model.to_noise.follow(lambda stage, _, x: (velocity(stage, x), x.new_zeros(len(x))), x)[0]


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("rk4", 4)])
def test_solvers_have_their_order(method: str, order: int) -> None:
    """On dx/ds = x cos s, whose solution is x e^{sin s} and whose divergence integrates to sin s."""
    solver = SOLVERS[method]

    def errors(steps: int) -> list[float]:
        s = torch.linspace(0, 1.5, steps + 1, dtype=torch.float64)
        path = Path(s, [True] * steps, solver, lambda s: flow_coefficients(s, 20))
        rate = (s[:-1, None] + s.diff()[:, None] * torch.tensor(solver.nodes)).flatten().cos()
        x, integral = path.follow(lambda stage, _, x: (rate[stage] * x, rate[stage]), torch.ones(1, dtype=s.dtype))
        return [float(x - math.exp(math.sin(1.5))), float(integral - math.sin(1.5))]

    for coarse, fine in zip(errors(20), errors(40), strict=True):
        assert math.log2(abs(coarse / fine)) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("kind", PROBES)
def test_the_estimate_of_random_probes_has_no_bias(kind: str) -> None:
    model, network, x, n = flow(20), GaussianData(20), actions(4), 4000
    noise = torch.randn(4 * n, 1, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    draws = FlowConfig(sde_hutchinson_type=kind).probes(noise)
    estimates = model.log_likelihood(network, network, OBS, x.repeat_interleave(n, 0), draws).view(4, n)
    exact = model.log_likelihood(network, network, OBS, x, every_direction(4))
    assert ((estimates.mean(1) - exact).abs() < 4 * estimates.std(1) / n**0.5).all()
    assert (estimates.std(1) > 0.1).all()
    several = model.log_likelihood(network, network, OBS, x, draws.view(4, n, *SHAPE)[:, :8])
    torch.testing.assert_close(several, estimates[:, :8].mean(1))


def test_clean_actions_are_clipped_as_in_the_chain() -> None:
    """A base network far off cannot throw samples out of the range that the chain keeps."""
    network = GaussianData(20, shift=3.0)
    noise = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert flow(20).sample(network, network, OBS, noise).mean() > 2.5
    assert flow(20, x0_clip=1.0).sample(network, network, OBS, noise).max() < 1.1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"sde_method": "RK23"}, "sde_method=RK23 is unknown; choose euler or rk4"),
        ({"sde_hutchinson_type": "none"}, "sde_hutchinson_type=none is unknown; choose Rademacher or Gaussian"),
        ({"sde_num_epsilon": 0}, "sde_num_epsilon=0 must lie in"),
        ({"sde_step_size": 0.0}, "sde_step_size=0.0 must lie in"),
    ],
)
def test_bad_options_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlowConfig(**option)


@pytest.mark.parametrize("case", flow_cases("logprob/out"))
def test_the_references_likelihood_comes_with_its_flag_only(case: Case) -> None:
    arguments = observations(case), case.tensor("in/samples"), probes(case, "logprob")
    LOG_PROB.check(flow_policy(case).likelihood(*arguments), case["logprob/out"])
    ours = flow_policy(case, reference=False).likelihood(*arguments)
    assert (ours - case.tensor("logprob/out")).abs().max() > 0.1
