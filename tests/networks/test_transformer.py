from __future__ import annotations

from typing import Any

import pytest
import torch

from dppo_fast.networks.gaussian import GaussianNetwork
from dppo_fast.networks.transformer import GaussianTransformer, GMMTransformer, Transformer
from dppo_fast.types import UserError
from tests.small import ACTION_DIM, HORIZON, observations, perturb

B, M, E = 6, 3, 16
OUT = HORIZON * ACTION_DIM


def policy_network(cls: type[GaussianNetwork], **options: Any) -> GaussianNetwork:
    torch.manual_seed(0)
    size = {"transformer_embed_dim": E, "transformer_num_heads": 2, "transformer_num_layers": 2}
    network = cls(ACTION_DIM, HORIZON, cond_dim=6, **size, **options)
    perturb(network.transformer, 0.3)
    return network


def transformer(**options: Any) -> Transformer:
    torch.manual_seed(0)
    network = Transformer(5, HORIZON, 6, **{"T_cond": 5, "n_layer": 2, "n_head": 2, "n_emb": E, **options})
    perturb(network, 0.3)
    return network


@pytest.mark.parametrize("fixed_std", [None, 0.3])
def test_a_mixture_of_one_mode_is_the_gaussian(fixed_std: float | None) -> None:
    gaussian = policy_network(GaussianTransformer, fixed_std=fixed_std)
    mixture = policy_network(GMMTransformer, fixed_std=fixed_std, num_modes=1)
    mixture.load_state_dict(gaussian.state_dict(), strict=False)
    obs = observations(B)
    mean, std = gaussian(obs)
    assert mean.shape == std.shape == (B, OUT)
    assert mean.abs().max() <= 1
    of_mode = mixture(obs)
    torch.testing.assert_close(of_mode[0].squeeze(1), mean)
    torch.testing.assert_close(of_mode[1].squeeze(1), std)
    assert of_mode[2].shape == (B, 1)


def test_outputs_are_of_means_then_log_variances_each_by_mode() -> None:
    """At every step of the chunk the head puts out [mean or log-variance, mode, action dimension]."""
    network = policy_network(GMMTransformer, num_modes=M, std_min=1e-3, std_max=1e3)
    with torch.no_grad():
        network.transformer.head.weight.zero_()
        network.transformer.head.bias.copy_(torch.linspace(-0.5, 0.5, 2 * M * ACTION_DIM))
    mean, std, logits = network(observations(B))
    expected = torch.linspace(-0.5, 0.5, 2 * M * ACTION_DIM).view(2, M, 1, ACTION_DIM).expand(2, M, HORIZON, ACTION_DIM)
    torch.testing.assert_close(mean.view(B, M, HORIZON, ACTION_DIM)[0], expected[0].tanh())
    torch.testing.assert_close(std.view(B, M, HORIZON, ACTION_DIM)[0], (0.5 * expected[1]).exp())
    assert logits.shape == (B, M)


@pytest.mark.parametrize("cls", [GaussianTransformer, GMMTransformer])
def test_the_networks_std_is_clamped(cls: type[GaussianNetwork]) -> None:
    network = policy_network(cls, std_min=0.5, std_max=0.51)
    with torch.no_grad():
        network.transformer.head.bias[-2:] = torch.tensor([-9.0, 9.0])
    std = network(observations(B))[1]
    torch.testing.assert_close(torch.stack((std.min(), std.max())), torch.tensor([0.5, 0.51]))


def test_the_whole_history_is_seen() -> None:
    network = policy_network(GMMTransformer, fixed_std=0.1)
    obs = observations(B)
    oldest = {"state": obs["state"].clone()}
    oldest["state"][:, 0] += 0.5
    for before, after in zip(network(obs)[::2], network(oldest)[::2], strict=True):
        assert (before - after).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("n_cond_layers", [0, 1])
def test_a_step_sees_no_later_step_with_causal_attention(n_cond_layers: int) -> None:
    """Step t follows from the positions up to t, and the encoded tokens up to t + 1."""
    tokens = torch.randn(B, 5, 6, generator=torch.Generator().manual_seed(0))
    causal = transformer(causal_attn=True, n_cond_layers=n_cond_layers)
    free = transformer(n_cond_layers=n_cond_layers)
    assert causal.state_dict().keys() - free.state_dict().keys() == {"mask", "memory_mask"}
    for network in (causal, free):
        before, _ = network(tokens)
        with torch.no_grad():
            network.pos_emb[:, 2] += torch.linspace(-1, 1, E)
        moved = (network(tokens)[0] - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == ([False, False, True, True] if network is causal else [True] * HORIZON)
    if n_cond_layers == 0:
        later = tokens.clone()
        later[:, 3] += 1
        moved = (causal(later)[0] - causal(tokens)[0]).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [False, False, True, True]


def test_embeddings_and_weights_start_small_and_norms_as_the_identity() -> None:
    torch.manual_seed(0)
    network = Transformer(5, HORIZON, 6, n_layer=2, n_head=2, n_emb=64, n_cond_layers=1)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
        else:
            assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all(), name


@pytest.mark.parametrize("cls", [GaussianTransformer, GMMTransformer])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformer_embed_dim": 18, "transformer_num_heads": 4}, "transformer_embed_dim=18 must be a multiple of"),
        ({"transformer_activation": "mish"}, "transformer_activation=mish is unknown; choose gelu or relu"),
        ({"learn_fixed_std": True}, "learn_fixed_std=true needs fixed_std"),
    ],
)
def test_mistakes_are_named(cls: type[GaussianNetwork], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cls(ACTION_DIM, HORIZON, cond_dim=6, **options)
