from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dppo_fast.networks.eta import Eta, EtaAction, EtaFixed, EtaState, EtaStateAction
from dppo_fast.types import UserError
from tests.small import ACTION_DIM, diffusion_policy, observations

B = 6
DDIM = {"denoising_steps": 20, "ddim_steps": 4, "min_sampling_denoising_std": 0.0, "min_logprob_denoising_std": 0.0}
ETAS: dict[str, tuple[int, Callable[..., Eta]]] = {
    "fixed": (1, EtaFixed),
    "action": (ACTION_DIM, lambda **bounds: EtaAction(ACTION_DIM, **bounds)),
    "state": (1, lambda **bounds: EtaState(6, [8], **bounds)),
    "state_action": (ACTION_DIM, lambda **bounds: EtaStateAction(6, ACTION_DIM, [8], **bounds)),
}


@pytest.mark.parametrize(("outputs", "make"), ETAS.values(), ids=ETAS.keys())
def test_it_starts_from_its_base_within_its_bounds(outputs: int, make: Callable[..., Eta]) -> None:
    eta = make(base_eta=0.6, min_eta=0.5, max_eta=0.9)(observations(B))
    assert eta.shape == (B, outputs)
    torch.testing.assert_close(eta, torch.full_like(eta, 0.6), rtol=0, atol=0.1)
    assert eta.min() >= 0.5


@pytest.mark.parametrize(("outputs", "make"), ETAS.values(), ids=ETAS.keys())
def test_every_parameter_learns_from_the_log_prob(outputs: int, make: Callable[..., Eta]) -> None:
    """And as finite differences say. The step is not the last one, to which DDIM adds no noise at any eta."""
    torch.manual_seed(0)
    policy = diffusion_policy(make(base_eta=0.6, min_eta=0.1, max_eta=1.0), learn_eta=True, **DDIM).double()
    obs = {"state": observations(B)["state"].double()}
    assert policy.eta is not None
    with torch.no_grad():
        chain = policy.sample(obs, policy.draw_noise(B, 5).double(), score=True).points
    assert chain is not None
    part, steps = {"x": chain[:, 0], "x_next": chain[:, 1]}, torch.zeros(B, dtype=torch.int64)
    parameters = list(policy.eta.parameters())
    gradients = torch.autograd.grad(policy.log_prob(obs, part, steps).sum(), parameters)
    assert all(gradient.abs().max() > 0 for gradient in gradients)

    direction, h = [torch.randn_like(parameter) for parameter in parameters], 1e-5
    values = []
    with torch.no_grad():
        for sign in (h, -2 * h):
            for parameter, step in zip(parameters, direction, strict=True):
                parameter += sign * step
            values.append(float(policy.log_prob(obs, part, steps).sum()))
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(("outputs", "make"), ETAS.values(), ids=ETAS.keys())
@pytest.mark.parametrize("bounds", [(0.05, 0.1, 1.0), (1.1, 0.1, 1.0), (0.5, 0.5, 0.5)])
def test_bounds_that_do_not_hold_the_base_are_named(
    outputs: int, make: Callable[..., Eta], bounds: tuple[float, float, float]
) -> None:
    base, low, high = bounds
    with pytest.raises(UserError, match=rf"base_eta={base} must lie in \[min_eta, max_eta\] = \[{low}, {high}\]"):
        make(base_eta=base, min_eta=low, max_eta=high)
