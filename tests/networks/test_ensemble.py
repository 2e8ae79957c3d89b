"""Ensembles against their members, one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dppo_fast.networks.critic import CriticObs, CriticObsAct
from dppo_fast.networks.ensemble import Ensemble
from tests.small import ACTION_DIM, HORIZON, observations, seeded


def members(n: int = 3) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [CriticObsAct(6, ACTION_DIM, HORIZON, (16, 16), use_layernorm=True) for _ in range(n)]


def actions(batch: int) -> torch.Tensor:
    return torch.randn(batch, HORIZON, ACTION_DIM, generator=seeded(1))


@pytest.mark.parametrize("chosen", [None, [2, 0]])
def test_outputs_and_gradients_are_the_members(chosen: list[int] | None) -> None:
    alone = members()
    ensemble = Ensemble(copy.deepcopy(alone))
    obs, action = observations(5), actions(5)
    index = None if chosen is None else torch.tensor(chosen)
    out = ensemble(obs, action, members=index)
    expected = torch.stack([alone[i](obs, action) for i in chosen or range(3)])
    assert out.shape == (len(chosen or alone), 2, 5)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in ensemble.members.named_parameters():
        own = [m.get_parameter(name) for m in alone]
        wanted = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in own])
        torch.testing.assert_close(parameter.grad, wanted, msg=name)


def test_every_member_has_its_own_trained_parameters() -> None:
    alone = members()
    ensemble = Ensemble(alone)
    total = sum(p.numel() for p in ensemble.parameters())
    assert total == sum(p.numel() for m in alone for p in m.parameters())
    assert set(ensemble.state_dict()) == {f"members.{name}" for name in alone[0].state_dict()}


def test_copies_are_independent() -> None:
    """As targets are, which are frozen."""
    ensemble = Ensemble(members())
    target = copy.deepcopy(ensemble).requires_grad_(False)
    with torch.no_grad():
        list(ensemble.parameters())[-1].add_(1)
    obs, action = observations(5), actions(5)
    assert not torch.allclose(ensemble(obs, action), target(obs, action))
    assert not target(obs, action).requires_grad


def test_inputs_may_be_observations_alone() -> None:
    values = Ensemble([CriticObs(6, (8,)) for _ in range(2)])(observations(5))
    assert values.shape == (2, 5)
