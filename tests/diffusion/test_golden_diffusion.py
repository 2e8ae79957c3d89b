"""Noise schedules and denoising losses against the reference's."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from dppo_fast.diffusion.schedule import CosineSchedule, NoiseSchedule
from dppo_fast.policies.diffusion import DiffusionPolicy
from tests.golden_files import Case, golden_cases
from tests.golden_models import check_gradients, diffusion_cases, diffusion_policy
from tests.tolerances import EXACT, FORWARD, LOSS, TABLE


@pytest.mark.parametrize("case", golden_cases("01_schedules", lambda case: "betas" in case))
def test_cosine_schedule(case: Case) -> None:
    forward = CosineSchedule.build(len(case["betas"]))
    abar = forward.alphas_cumprod
    tables = {
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
    }
    for name in case:
        TABLE.check(tables[name] if name in tables else getattr(forward, name), case[name], name)


@pytest.mark.parametrize("case", golden_cases("01_schedules", lambda case: "betas" in case))
def test_ddpm_table(case: Case) -> None:
    K = len(case["betas"])
    schedule = NoiseSchedule(K)
    columns = {
        "cx": case.tensor("sqrt_recip_alphas_cumprod"),
        "ce": -case.tensor("sqrt_recipm1_alphas_cumprod"),
        "m0": case.tensor("ddpm_mu_coef1"),
        "mx": case.tensor("ddpm_mu_coef2"),
        "std": (0.5 * case.tensor("ddpm_logvar_clipped")).exp(),
        "sa": case.tensor("sqrt_alphas_cumprod"),
        "s": case.tensor("sqrt_one_minus_alphas_cumprod"),
    }
    EXACT.check(schedule.timesteps, torch.arange(K).flip(0))
    for name, column in columns.items():
        ours = torch.stack([getattr(schedule.coefficients(k), name) for k in range(K)])
        TABLE.check(ours, column.flip(0), name)


@pytest.mark.parametrize("case", golden_cases("01_schedules", lambda case: "ddim_t" in case))
def test_ddim_table(case: Case) -> None:
    match = re.match(r"K(\d+)_ddim(\d+)", case.name)
    assert match
    K, S = map(int, match.groups())
    schedule = NoiseSchedule(K, ddim_steps=S)
    for prefix, order in (("", 0), ("unflipped/", 1)):
        ours = {
            "ddim_t": schedule.timesteps,
            "ddim_alphas": schedule.alpha_bar,
            "ddim_alphas_sqrt": schedule.alpha_bar.sqrt(),
            "ddim_alphas_prev": schedule.alpha_bar_prev,
            "ddim_sqrt_one_minus_alphas": (1 - schedule.alpha_bar).sqrt(),
            "ddim_sigmas": schedule.deterministic_std(),
        }
        for name, table in ours.items():
            TABLE.check(table.flip(0) if order else table, case[prefix + name], prefix + name)


def policy_of(case: Case) -> DiffusionPolicy:
    horizon_steps, action_dim = case["in/x_start"].shape[1:]
    cfg = {**case.cfg, "horizon_steps": horizon_steps, "action_dim": action_dim}
    return diffusion_policy(cfg, case.tensors("w/"))


@pytest.mark.parametrize("case", diffusion_cases("03_diffusion_losses"))
def test_denoising_loss(case: Case) -> None:
    policy = policy_of(case)
    obs, x0, t, noise = ({"state": case.tensor("in/state")}, *map(case.tensor, ("in/x_start", "in/t", "noise")))
    FORWARD.check(policy.schedule.add_noise(x0, t, noise), case["x_noisy"])
    loss = policy.denoising_loss(obs, x0, t, noise)
    LOSS.check(loss, case["loss"])
    loss.backward()
    check_gradients(case.tensors("grad/"), nn.ModuleDict({"network": policy.actor}))
    drawn = policy.denoising_loss(obs, x0, case.tensor("loss_call/t"), case.tensor("loss_call/noise"))
    LOSS.check(drawn, case["loss_call/loss"])
