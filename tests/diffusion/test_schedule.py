"""Against the formulas of the papers, written out in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dppo_fast.diffusion.schedule import CosineSchedule, NoiseSchedule
from dppo_fast.types import UserError

COLUMNS = ("cx", "ce", "m0", "mx", "std", "sa", "s")
K = 20


def cosine(denoising_steps: int) -> tuple[Any, Any]:
    """beta and abar [K], Nichol & Dhariwal 2021, eq. 17."""

    def f(i: int) -> float:
        return math.cos((i / denoising_steps + 0.008) / 1.008 * math.pi / 2) ** 2

    beta = np.array([min(max(1 - f(i + 1) / f(i), 0.0), 0.999) for i in range(denoising_steps)])
    return beta, np.cumprod(1 - beta)


def check(table: torch.Tensor, **columns: Any) -> None:
    """Rows in the order of sampling against columns with t ascending."""
    for name, column in columns.items():
        ours = table[:, COLUMNS.index(name)].flip(0).double().numpy()
        np.testing.assert_allclose(ours, column, rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("steps", [1, 2, K, 100])
def test_the_forward_process(steps: int) -> None:
    beta, abar = cosine(steps)
    forward = CosineSchedule.build(steps)
    np.testing.assert_allclose(forward.betas, beta, rtol=1e-6)
    np.testing.assert_allclose(forward.alphas, 1 - beta, rtol=1e-4)
    np.testing.assert_allclose(forward.alphas_cumprod, abar, rtol=1e-4)
    np.testing.assert_allclose(forward.alphas_cumprod_prev, [1, *abar[:-1]], rtol=1e-4)


@pytest.mark.parametrize("predict_epsilon", [True, False])
def test_ddpm(predict_epsilon: bool) -> None:
    beta, abar = cosine(K)
    prev = np.array([1, *abar[:-1]])
    variance = beta * (1 - prev) / (1 - abar)
    schedule = NoiseSchedule(K, predict_epsilon=predict_epsilon)
    check(
        schedule.table,
        cx=abar**-0.5 if predict_epsilon else np.zeros(K),
        ce=-((1 / abar - 1) ** 0.5) if predict_epsilon else np.ones(K),
        m0=beta * prev**0.5 / (1 - abar),
        mx=(1 - prev) * (1 - beta) ** 0.5 / (1 - abar),
        std=np.maximum(variance, 1e-20) ** 0.5,
        sa=abar**0.5,
        s=(1 - abar) ** 0.5,
    )
    assert schedule.steps == K
    assert schedule.timesteps.tolist() == list(range(K))[::-1]
    assert schedule.deterministic_table.equal(schedule.table)
    assert float(schedule.table[-1, 4]) == pytest.approx(1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 5, 7, K])
def test_ddim(steps: int, eta: float) -> None:
    """Song et al. 2021, eq. 12 and 16, on timesteps 0, K // S, 2 (K // S)..."""
    visited = np.arange(steps) * (K // steps)
    a = cosine(K)[1][visited]
    prev = np.array([1, *a[:-1]])
    schedule = NoiseSchedule(K, ddim_steps=steps, eta=eta)
    assert schedule.timesteps.tolist() == visited[::-1].tolist()
    for table, scale in ((schedule.table, eta), (schedule.deterministic_table, 0.0)):
        sigma = np.maximum(scale * ((1 - prev) / (1 - a) * (1 - a / prev)) ** 0.5, 1e-10)
        direction = np.maximum(1 - prev - sigma**2, 0) ** 0.5
        check(table, m0=prev**0.5 - direction * (a / (1 - a)) ** 0.5, mx=direction / (1 - a) ** 0.5, std=sigma)
    assert schedule.deterministic_std().tolist() == [0.0] * steps


def test_every_step_may_have_its_own_eta() -> None:
    schedule, k = NoiseSchedule(K, ddim_steps=5), torch.tensor([0, 3, 4])
    etas = torch.tensor([[0.2, 0.7], [0.5, 0.9], [0.0, 1.0]])
    c = schedule.coefficients(k, eta=etas)
    for row, (step, pair) in enumerate(zip(k.tolist(), etas.tolist(), strict=True)):
        for column, eta in enumerate(pair):
            expected = NoiseSchedule(K, ddim_steps=5, eta=eta).table[step]
            for name in ("m0", "mx", "std"):
                torch.testing.assert_close(getattr(c, name)[row, 0, column], expected[COLUMNS.index(name)])
        for name in ("cx", "ce", "sa", "s"):
            torch.testing.assert_close(getattr(c, name)[row, 0, 0], schedule.table[step, COLUMNS.index(name)])
    plain = schedule.coefficients(3, deterministic=True)
    assert torch.stack(plain).equal(schedule.deterministic_table[3])
    ignored = schedule.coefficients(k, deterministic=True, eta=etas)
    assert torch.stack(ignored, -1)[:, 0, 0].equal(schedule.deterministic_table[k])


def test_the_std_of_deterministic_ddpm() -> None:
    schedule = NoiseSchedule(100)
    std = schedule.deterministic_std()
    assert std[:-1].equal(schedule.table[:-1, 4].clamp(min=1e-3))
    assert float(std[:-1].min()) > float(schedule.table[-1, 4])
    assert std[-1] == 0
    assert schedule.table[-1, 4] > 0


def test_noise_is_added_sample_by_sample() -> None:
    schedule = NoiseSchedule(K)
    x0, noise = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 7, 19])
    abar = torch.from_numpy(cosine(K)[1])[t][:, None, None]
    expected = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    torch.testing.assert_close(schedule.add_noise(x0, t, noise).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [0, K + 1])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=f"ddim_steps={steps} must lie between 1 and denoising_steps=20"):
        NoiseSchedule(K, ddim_steps=steps)


def test_nothing_of_it_is_saved() -> None:
    """It follows from the configuration."""
    assert not NoiseSchedule(K).state_dict()
