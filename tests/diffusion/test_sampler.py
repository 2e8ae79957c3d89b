"""What a chain is made of, whatever the network predicts."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dppo_fast.diffusion.sampler import Chain, Clips, Scoring, Segment, differentiable_chain, sample_chain
from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.denoise_step import LOG_PROB_RANGE
from dppo_fast.networks.mlp import DiffusionMLP
from dppo_fast.types import Obs
from tests.small import seeded
from tests.tolerances import GRADIENT, SAMPLE

S, B, SHAPE = 5, 3, (4, 2)
OBS: Obs = {"state": torch.zeros(B, 1, 1)}
NO_CLIPS = Clips(x0=None, randn=None)
SCHEDULES = {"ddpm": NoiseSchedule(S), "ddim": NoiseSchedule(100, S)}


@dataclass
class Linear:
    """Predicts ``weight x + t / 100``."""

    weight: float = 0.3

    def encode_obs(self, obs: Obs) -> Tensor:
        return obs["state"]

    def time_table(self, t: Tensor) -> Tensor:
        return t[:, None] / 100

    def step(self, t: Tensor) -> None:
        return None

    def denoise(self, x: Tensor, time: Tensor, obs: Tensor) -> Tensor:
        return self.weight * x + time


@dataclass(kw_only=True)
class Oracle(Linear):
    """Predicts the noise that leads from ``x0`` to x."""

    x0: Tensor
    schedule: NoiseSchedule

    def denoise(self, x: Tensor, time: Tensor, obs: Tensor) -> Tensor:
        t = int((time * 100).round())
        s = self.schedule.sqrt_one_minus_alphas_cumprod[t]
        return (x - self.schedule.sqrt_alphas_cumprod[t] * self.x0) / s


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return request.param


def draws(seed: int = 0) -> Tensor:
    return torch.randn(S + 1, B, *SHAPE, generator=seeded(seed))


def sample(
    schedule: NoiseSchedule,
    noise: Tensor,
    clips: Clips = NO_CLIPS,
    deterministic: bool = False,
    first: int | None = None,
    network: Linear | None = None,
    horizon: int = 4,
) -> Chain:
    """One network all along; ``first`` is the first scored step."""
    std = schedule.deterministic_std() if deterministic else schedule.table[:, 4].clamp(min=0.1)
    scoring = None if first is None else Scoring(first, min_std=0.2, reward_horizon=horizon)
    segments = [Segment(network or Linear(), range(S))]
    return sample_chain(segments, schedule, OBS, noise, std, clips, deterministic, scoring=scoring)


def test_a_perfect_prediction_ends_at_the_clean_action(schedule: NoiseSchedule) -> None:
    x0 = torch.rand(B, *SHAPE, generator=seeded(5)) * 2 - 1
    oracle = Oracle(x0=x0, schedule=schedule)
    action = sample(schedule, draws(), deterministic=True, network=oracle).action
    torch.testing.assert_close(action, x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [0, 2, S - 1])
def test_the_points_surround_the_scored_steps(schedule: NoiseSchedule, first: int) -> None:
    noise = draws()
    chain = sample(schedule, noise, first=first)
    assert chain.points is not None
    assert chain.points.shape == (B, S - first + 1, *SHAPE)
    assert chain.points[:, -1].equal(chain.action)
    if first == 0:
        assert chain.points[:, 0].equal(noise[0])
    whole = sample(schedule, noise, first=0).points
    assert whole is not None
    assert chain.points.equal(whole[:, first:])


@pytest.mark.parametrize("horizon", [1, 4])
def test_log_probs_are_the_densities_of_the_steps_taken(schedule: NoiseSchedule, horizon: int) -> None:
    chain = sample(schedule, draws(), first=1, horizon=horizon)
    assert chain.points is not None
    assert chain.log_prob is not None
    for k in range(1, S):
        x, x_next = chain.points[:, k - 1].double(), chain.points[:, k].double()
        cx, ce, m0, mx, std = schedule.table[k, :5].double()
        eps = 0.3 * x + schedule.timesteps[k] / 100
        mean = m0 * (cx * x + ce * eps) + mx * x
        density = torch.distributions.Normal(mean, std.clamp(min=0.2)).log_prob(x_next).clamp(*LOG_PROB_RANGE)
        expected = density[:, :horizon].mean((1, 2)).float()
        torch.testing.assert_close(chain.log_prob[:, k - 1], expected, rtol=1e-5, atol=1e-5)


def test_each_network_denoises_its_segment(schedule: NoiseSchedule) -> None:
    noise, std = draws(), schedule.table[:, 4].clamp(min=0.1)
    early, late = Linear(0.3), Linear(-0.2)

    def points(*segments: Segment) -> Tensor:
        chain = sample_chain(segments, schedule, OBS, noise, std, NO_CLIPS, scoring=Scoring(0, 0.1, 4))
        assert chain.points is not None
        return chain.points

    both = points(Segment(early, range(2)), Segment(late, range(2, S)))
    assert both[:, :3].equal(points(Segment(early, range(S)))[:, :3])
    assert not both[:, 3].equal(points(Segment(early, range(S)))[:, 3])
    assert both.equal(points(Segment(early, range(2)), Segment(late, range(2, 4)), Segment(late, range(4, S))))


def test_the_draws_are_bounded_and_the_start_is_not(schedule: NoiseSchedule) -> None:
    noise = 100 * draws()
    bounded = torch.cat((noise[:1], noise[1:].clamp(-3, 3)))
    assert sample(schedule, noise, Clips(x0=None, randn=3.0)).action.equal(sample(schedule, bounded).action)
    start = sample(schedule, noise, Clips(randn=3.0), first=0).points
    assert start is not None
    assert start[:, 0].equal(noise[0])


def test_the_last_point_is_clipped_as_it_is_stored(schedule: NoiseSchedule) -> None:
    noise = 3 * draws()
    free, clipped = (sample(schedule, noise, Clips(x0=None, action=bound), first=0) for bound in (None, 0.3))
    assert free.points is not None
    assert clipped.points is not None
    assert clipped.points[:, :-1].equal(free.points[:, :-1])
    assert clipped.points[:, -1].equal(free.action.clamp(-0.3, 0.3))
    assert clipped.action.equal(clipped.points[:, -1])


def test_deterministic_sampling_draws_nothing_with_ddim_and_nothing_last_with_ddpm() -> None:
    one, other = draws(), draws(1)
    other[0] = one[0]
    ddim, ddpm = SCHEDULES["ddim"], SCHEDULES["ddpm"]
    assert sample(ddim, one, deterministic=True).action.equal(sample(ddim, other, deterministic=True).action)
    assert not sample(ddpm, one, deterministic=True).action.equal(sample(ddpm, other, deterministic=True).action)
    other[:-1] = one[:-1]
    assert sample(ddpm, one, deterministic=True).action.equal(sample(ddpm, other, deterministic=True).action)


def test_ddim_over_all_steps_with_full_noise_is_ddpm() -> None:
    ddpm, ddim = NoiseSchedule(S), NoiseSchedule(S, S)
    torch.testing.assert_close(ddim.table, ddpm.table, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sample(ddim, draws()).action, sample(ddpm, draws()).action)


def test_eta_of_each_sample_is_its_own() -> None:
    ddim, noise, std = SCHEDULES["ddim"], draws(), torch.full((S,), 0.1)
    etas = torch.tensor([[0.2], [0.5], [1.0]])
    scoring = Scoring(0, 0.1, 4)
    together = sample_chain([Segment(Linear(), range(S))], ddim, OBS, noise, std, NO_CLIPS, eta=etas, scoring=scoring)
    for b, eta in enumerate(etas):
        schedule = NoiseSchedule(100, S, eta=float(eta))
        alone = sample_chain([Segment(Linear(), range(S))], schedule, OBS, noise, std, NO_CLIPS, scoring=scoring)
        assert alone.log_prob is not None
        assert together.log_prob is not None
        torch.testing.assert_close(together.action[b], alone.action[b])
        torch.testing.assert_close(together.log_prob[b], alone.log_prob[b])


def test_gradients_run_back_through_the_whole_chain(schedule: NoiseSchedule) -> None:
    """Against the chain written out in float64; all bounds are reached by some elements."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiffusionMLP(2, 4, 1, mlp_dims=(16, 16))
    noise, std = 2 * draws(), schedule.table[:, 4].clamp(min=0.3)
    clips = Clips(x0=0.8, randn=1.5, action=0.7)
    segments = [Segment(network, range(S))]
    action = differentiable_chain(segments, schedule, OBS, noise, std, clips)
    SAMPLE.check(action, sample_chain(segments, schedule, OBS, noise, std, clips).action)
    weight = torch.randn(action.shape, generator=seeded(7))
    (action * weight).sum().backward()

    exact = copy.deepcopy(network).double()
    state = {"state": OBS["state"].double()}
    x = noise[0].double()
    for k in range(S):
        cx, ce, m0, mx, *_ = schedule.table[k].double()
        eps = exact(x, schedule.timesteps[k].expand(B), state)
        x = m0 * (cx * x + ce * eps).clamp(-0.8, 0.8) + mx * x + std[k] * noise[k + 1].double().clamp(-1.5, 1.5)
    (x.clamp(-0.7, 0.7) * weight).sum().backward()
    for (name, ours), theirs in zip(network.named_parameters(), exact.parameters(), strict=True):
        GRADIENT.check(ours.grad, theirs.grad, name)
