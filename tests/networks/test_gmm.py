from __future__ import annotations

from typing import Any

import pytest
import torch

from dppo_fast.networks.gmm import GMMMLP
from dppo_fast.networks.mlp import MLP, GaussianMLP, ResidualMLP
from dppo_fast.types import UserError
from tests.small import ACTION_DIM, HORIZON, observations

B, M = 6, 3
OUT = HORIZON * ACTION_DIM


def gmm(**options: Any) -> GMMMLP:
    torch.manual_seed(0)
    return GMMMLP(ACTION_DIM, HORIZON, cond_dim=6, **{"mlp_dims": (16, 16), "num_modes": M, **options})


@pytest.mark.parametrize("residual", [False, True])
def test_shapes_and_ranges(residual: bool) -> None:
    network = gmm(residual_style=residual, mlp_dims=(16, 16, 16), std_min=0.5, std_max=0.6)
    assert isinstance(network.mlp_mean, ResidualMLP if residual else MLP)
    obs = observations(B)
    mean, std, logits = network({"state": 100 * obs["state"]})
    assert mean.shape == std.shape == (B, M, OUT)
    assert logits.shape == (B, M)
    assert mean.abs().max() <= 1
    torch.testing.assert_close(torch.stack((std.min(), std.max())), torch.tensor([0.5, 0.6]))


def test_a_learned_std_is_of_a_mode_and_an_action_dimension() -> None:
    network = gmm(fixed_std=0.2, learn_fixed_std=True)
    with torch.no_grad():
        network.logvar.copy_(2 * torch.linspace(0.1, 0.6, M * ACTION_DIM).log())
    _, std, _ = network(observations(B))
    expected = torch.linspace(0.1, 0.6, M * ACTION_DIM).view(M, 1, ACTION_DIM).expand(B, M, HORIZON, ACTION_DIM)
    torch.testing.assert_close(std.view(B, M, HORIZON, ACTION_DIM), expected)


@pytest.mark.parametrize("std", [{"fixed_std": 0.2}, {"fixed_std": 0.2, "learn_fixed_std": True}])
def test_std_starts_from_fixed_std(std: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        network = GMMMLP(ACTION_DIM, HORIZON, cond_dim=6, mlp_dims=(16,), **std)
    _, value, _ = network(observations(B))
    torch.testing.assert_close(value, torch.full_like(value, 0.2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn_fixed_std": True}, "learn_fixed_std=true needs fixed_std"),
        ({"fixed_std": 0.0}, r"fixed_std=0.0 must lie in \(0, inf\)"),
        ({"std_min": 0.0}, r"std_min=0.0 must lie in \(0, 1.0\]"),
        ({"std_min": 0.3, "std_max": 0.2}, r"std_min=0.3 must lie in \(0, 0.2\]"),
        ({"num_modes": 0}, r"num_modes=0 must lie in \[1, inf\)"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gmm(**options)


@pytest.mark.parametrize("fixed_std", [None, 0.1])
def test_dropout_stands_before_all_activations_but_the_last(fixed_std: float | None) -> None:
    network = GaussianMLP(ACTION_DIM, HORIZON, cond_dim=6, mlp_dims=(8, 8, 8), dropout=0.5, fixed_std=fixed_std)
    trunk = network.mlp_mean if fixed_std else network.mlp_base
    *hidden, last = trunk.moduleList
    assert all(list(dict(layer.named_children())) == ["linear_1", "dropout_1", "act_1"] for layer in hidden)
    assert list(dict(last.named_children())) == ["linear_1", "act_1"]
    obs = observations(B)
    assert not network(obs)[0].equal(network(obs)[0])
    network.eval()
    assert network(obs)[0].equal(network(obs)[0])
    with pytest.raises(UserError, match=r"dropout=0\.5 needs residual_style=false"):
        GaussianMLP(ACTION_DIM, HORIZON, cond_dim=6, dropout=0.5, residual_style=True, fixed_std=fixed_std)
