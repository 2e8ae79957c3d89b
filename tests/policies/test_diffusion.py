from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dppo_fast.networks.embed import SinusoidalPosEmb
from dppo_fast.networks.eta import Eta, EtaAction, EtaFixed, EtaState, EtaStateAction
from dppo_fast.networks.vision import VisionDiffusionMLP, VitConfig
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.runtime.native import native
from dppo_fast.types import NoiseStream, Obs, UserError
from tests.small import ACTION_DIM, HORIZON, diffusion_policy, distance, observations, weights

S, B = 4, 6
DDIM = {"denoising_steps": 20, "ddim_steps": S}
ETAS: dict[str, Callable[[], Eta]] = {
    "fixed": lambda: EtaFixed(0.6),
    "action": lambda: EtaAction(ACTION_DIM, 0.6),
    "state": lambda: EtaState(6, [8], base_eta=0.6),
    "state_action": lambda: EtaStateAction(6, ACTION_DIM, [8], base_eta=0.6),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rescored(policy: DiffusionPolicy, obs: Obs, record: dict[str, Tensor]) -> Tensor:
    """Log-probs [B, F] of a record, as the update computes them."""
    row = torch.arange(B).repeat_interleave(policy.decisions)
    k = torch.arange(policy.decisions).repeat(B)
    part = policy.select(record, row, k)
    return policy.log_prob({"state": obs["state"][row]}, part, k).view(B, policy.decisions)


@pytest.mark.parametrize("F", range(1, S + 1))
@pytest.mark.parametrize("options", [{}, DDIM, {**DDIM, "eps_clip_value": 0.5, "final_action_clip_value": 0.3}])
def test_the_sampler_emits_what_the_update_computes(F: int, options: dict[str, Any]) -> None:
    policy, obs = diffusion_policy(ft_denoising_steps=F, reward_horizon=2, **options), observations(B)
    act = policy.act(obs)
    assert act.record["chain"].shape == (B, F + 1, HORIZON, ACTION_DIM)
    assert act.record["chain"][:, -1].equal(act.action)
    assert len(act.record["log_prob"].unique()) == B * F
    torch.testing.assert_close(act.record["log_prob"], rescored(policy, obs, act.record), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spatial_emb", [8, 0])
def test_dropout_acts_in_imitation_alone(spatial_emb: int) -> None:
    vit = VitConfig(patch_size=4, embed_dim=8, num_heads=2)
    network = VisionDiffusionMLP(
        action_dim=ACTION_DIM, horizon_steps=HORIZON, cond_dim=6, mlp_dims=[8, 8], dropout=0.5,
        image_shapes={"rgb": (1, 3, 8, 8)}, backbone=vit, spatial_emb=spatial_emb, visual_feature_dim=8,
    )  # fmt: skip
    policy = DiffusionPolicy(network, DiffusionConfig(S, ft_denoising_steps=2), HORIZON, ACTION_DIM)
    obs = {**observations(B), "rgb": torch.randint(0, 256, (B, 1, 3, 8, 8)).byte()}
    before, draws = policy.act(obs), policy.cloning_draws(B)
    assert len({policy.cloning_errors(obs, before.action, draws).mean().item() for _ in range(5)}) == 5
    policy.noise.step = 0
    after = policy.act(obs)
    assert after.action.equal(before.action)
    assert after.record["log_prob"].equal(before.record["log_prob"])
    k = torch.ones(B, dtype=torch.int64)
    log_prob = policy.log_prob(obs, policy.select(after.record, torch.arange(B), k), k)
    torch.testing.assert_close(log_prob, after.record["log_prob"][:, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS.keys())
def test_the_same_with_every_eta(eta: Callable[[], Eta], learn: bool) -> None:
    policy, obs = diffusion_policy(eta(), learn_eta=learn, **DDIM), observations(B)
    act = policy.act(obs)
    log_prob = rescored(policy, obs, act.record)
    torch.testing.assert_close(act.record["log_prob"], log_prob, rtol=0, atol=1e-5)
    log_prob.sum().backward()
    assert policy.eta is not None
    gradients = [parameter.grad for parameter in policy.eta.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients) == learn
    assert all(gradient is None for gradient in gradients) == (not learn)


@pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS.keys())
def test_eta_changes_the_chain_and_nothing_deterministic(eta: Callable[[], Eta]) -> None:
    obs, options = observations(B), {**DDIM, "min_sampling_denoising_std": 0.0}
    policy, plain = diffusion_policy(eta(), **options), diffusion_policy(**options)
    assert not policy.act(obs).action.allclose(plain.act(obs).action, atol=1e-3)
    assert policy.act(obs, deterministic=True).action.equal(plain.act(obs, deterministic=True).action)


def test_the_base_policy_is_frozen_and_used_early() -> None:
    policy, obs = diffusion_policy(ft_denoising_steps=2), observations(B)
    rescored(policy, obs, policy.act(obs).record).sum().backward()
    assert all(parameter.grad is None for parameter in policy.actor.parameters())
    assert all(parameter.grad is not None for parameter in policy.actor_ft.parameters())
    noise = policy.draw_noise(B, S + 1)
    base = policy.sample(obs, noise, score=True, base_policy=True)
    tuned = policy.sample(obs, noise, score=True)
    assert base.points is not None
    assert tuned.points is not None
    torch.testing.assert_close(base.points[:, 0], tuned.points[:, 0])
    assert not base.action.allclose(tuned.action, atol=1e-3)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("options", [{}, DDIM])
def test_a_policy_without_fine_tuned_steps_acts(options: dict[str, int], deterministic: bool) -> None:
    """In the reference the plain model cannot sample, and evaluation with DDIM not stochastically."""
    policy = diffusion_policy(ft_denoising_steps=0, **options)
    act = policy.act(observations(B), deterministic)
    assert act.action.shape == (B, HORIZON, ACTION_DIM)
    assert act.record == ({} if deterministic else {"action": act.action})


@pytest.mark.parametrize("std", [1, 1.0])
def test_stds_may_be_integers(std: float) -> None:
    options = {"min_sampling_denoising_std": std, "min_logprob_denoising_std": std}
    policy, obs = diffusion_policy(**options), observations(B)
    act = policy.act(obs)
    torch.testing.assert_close(act.record["log_prob"], rescored(policy, obs, act.record), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, DDIM])
def test_min_sampling_std_holds_at_the_last_step_too(options: dict[str, int]) -> None:
    policy = diffusion_policy(min_sampling_denoising_std=0.25, **options)
    obs = observations(B)
    one, other = policy.draw_noise(B, S + 1), policy.draw_noise(B, S + 1)
    other[:-1] = one[:-1]
    moved = policy.sample(obs, one).action - policy.sample(obs, other).action
    torch.testing.assert_close(moved, 0.25 * (one[-1] - other[-1]), rtol=1e-4, atol=1e-5)


def test_reward_horizon_is_the_part_of_the_chunk_that_is_scored() -> None:
    obs = observations(B)
    short, whole = diffusion_policy(reward_horizon=1), diffusion_policy(reward_horizon=None)
    a, b = short.act(obs), whole.act(obs)
    assert a.action.equal(b.action)
    later = {"chain": a.record["chain"].clone(), "log_prob": a.record["log_prob"]}
    later["chain"][:, -1, 1:] += 0.3
    assert rescored(short, obs, later).allclose(a.record["log_prob"], atol=1e-5)
    assert not rescored(whole, obs, later).allclose(b.record["log_prob"], atol=1e-2)


def test_all_randomness_comes_from_the_noise_stream() -> None:
    policy, obs = diffusion_policy(), observations(B)
    policy.noise = NoiseStream(1, step=4)
    first = policy.act(obs).action
    policy.noise = NoiseStream(1, step=4)
    before = torch.get_rng_state()
    again = policy.act(obs).action
    assert torch.get_rng_state().equal(before)
    assert policy.noise == NoiseStream(1, step=5)
    assert again.equal(first)
    assert not policy.act(obs).action.equal(first)


def test_an_env_gets_the_same_noise_in_every_batch() -> None:
    policy = diffusion_policy()
    policy.noise = NoiseStream(1)
    few = policy.draw_noise(2, S + 1)
    policy.noise = NoiseStream(1)
    assert policy.draw_noise(B, S + 1)[:, :2].equal(few)


def test_entropy_is_the_mean_eta() -> None:
    obs = observations(B)
    assert float(diffusion_policy().entropy(obs)) == 1.0
    assert float(diffusion_policy(EtaFixed(0.6), **DDIM).entropy(obs)) == pytest.approx(0.6)
    policy = diffusion_policy(EtaState(6, [8], base_eta=0.6), **DDIM)
    assert policy.eta is not None
    assert float(policy.entropy(obs)) == pytest.approx(float(policy.eta(obs).mean()))


def test_the_pre_training_loss_is_that_of_predicting_the_noise() -> None:
    policy, obs = diffusion_policy(ft_denoising_steps=0), observations(B)
    action, noise = policy.randn(B, HORIZON, ACTION_DIM), policy.randn(B, HORIZON, ACTION_DIM)
    t = torch.arange(B) % S
    x = policy.schedule.add_noise(action, t, noise)
    expected = (policy.actor(x, t, obs) - noise).square().mean()
    torch.testing.assert_close(policy.denoising_loss(obs, action, t, noise), expected)
    assert torch.isfinite(policy.cloning_loss(obs, action))


def test_fewer_fine_tuned_steps_leave_the_policy_as_it_is() -> None:
    """The steps given up keep the fine-tuned weights, so the chain from one noise stays the same."""
    policy, obs = diffusion_policy(ft_denoising_steps=S), observations(B)
    noise, trained = policy.draw_noise(B, S + 1), weights(policy.actor_ft)
    tensors = list(policy.actor_ft.parameters())
    before = policy.sample(obs, noise).action
    policy.set_ft_steps(1)
    assert policy.decisions == 1
    torch.testing.assert_close(policy.sample(obs, noise).action, before)
    assert distance(weights(policy.actor), trained) == 0
    assert all(now is then for now, then in zip(policy.actor_ft.parameters(), tensors, strict=True))
    assert not any(parameter.requires_grad for parameter in policy.actor.parameters())
    with pytest.raises(ValueError, match="between 1 and the present 1"):
        policy.set_ft_steps(2)


SPECIAL = {"Optimizer", "Muon", "SparseAdam"}
OPTIMIZERS = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name not in SPECIAL}


def optimized(name: str, **options: Any) -> Callable[[nn.Module], None]:
    def change(network: nn.Module) -> None:
        parameters = list(network.requires_grad_().parameters())
        optimizer = OPTIMIZERS[name](parameters, lr=0.1, **options)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(lambda: torch.zeros(()))

    return change


def each(change: Callable[[nn.Parameter], object]) -> Callable[[nn.Module], None]:
    def changed(network: nn.Module) -> None:
        with torch.no_grad():
            for parameter in network.parameters():
                change(parameter)

    return changed


def replace_parameters(network: nn.Module) -> None:
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(1.1 * parameter.detach()))


def replace_layers(network: Any) -> None:
    block = network.mlp_mean.layers[1]
    block.l1 = nn.Linear(16, 16)
    network.time_embedding[3] = nn.Linear(32, 16)


def other_precision_and_back(network: nn.Module) -> None:
    each(lambda x: x.mul_(1.1))(network.double())
    network.float()


CHANGES: dict[str, Callable[[Any], object]] = {
    **{name: optimized(name) for name in OPTIMIZERS},
    **{f"{name}, fused": optimized(name, fused=True) for name in ("AdamW", "Adam", "SGD", "Adagrad")},
    **{f"{name}, foreach": optimized(name, foreach=True) for name in ("AdamW", "Adam", "SGD")},
    "in place": each(lambda x: x.mul_(1.1)),
    "copied": each(lambda x: x.copy_(1.1 * x)),
    "loaded": lambda net: net.load_state_dict({name: 1.1 * x for name, x in net.state_dict().items()}),
    "assigned": lambda net: net.load_state_dict({name: 1.1 * x for name, x in net.state_dict().items()}, assign=True),
    "data in place": each(lambda x: x.data.mul_(1.1)),
    "data replaced": each(lambda x: setattr(x, "data", 1.1 * x.data)),
    "data transposed": each(lambda x: setattr(x, "data", x.data.t()) if x.shape == (16, 16) else None),
    "other memory": each(lambda x: x.set_(1.1 * x)),
    "NumPy": each(lambda x: np.multiply(x.numpy(), 1.1, out=x.numpy())),
    "shared memory": lambda net: each(lambda x: x.mul_(1.1))(net.share_memory()),
    "to": other_precision_and_back,
    "parameters replaced": replace_parameters,
    "layers replaced": replace_layers,
}


def assert_follows(policy: DiffusionPolicy, changed: Callable[[], object]) -> None:
    """The policy decides otherwise after ``changed``, and as one with the same weights that never decided before."""
    obs, noise = observations(B), policy.draw_noise(B, S + 1)
    before = policy.sample(obs, noise, score=True).points
    changed()
    after = policy.sample(obs, noise, score=True).points
    fresh = copy.deepcopy(policy)
    expected = fresh.sample(obs, noise, score=True).points
    assert before is not None
    assert after is not None
    assert expected is not None
    assert not after.equal(before)
    assert after.equal(expected)


@pytest.mark.parametrize("network", ["actor", "actor_ft"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_decisions_follow_the_weights(network: str, change: Callable[[Any], object]) -> None:
    policy = diffusion_policy()
    assert_follows(policy, lambda: change(getattr(policy, network)))


@pytest.mark.parametrize("network", ["actor", "actor_ft"])
@pytest.mark.parametrize("name", [name for name, _ in diffusion_policy().actor.named_parameters()])
def test_decisions_follow_every_weight(network: str, name: str) -> None:
    policy = diffusion_policy()
    weight = getattr(policy, network).get_parameter(name).data
    assert_follows(policy, lambda: weight.view(-1)[-1:].add_(0.5))


def test_decisions_follow_other_timesteps() -> None:
    policy = diffusion_policy()
    assert_follows(policy, lambda: policy.schedule.timesteps.add_(1))


def test_decisions_follow_weights_that_come_back() -> None:
    policy, obs = diffusion_policy(), observations(B)
    noise = policy.draw_noise(B, S + 1)
    first = policy.sample(obs, noise).action
    for _ in range(2):
        each(lambda x: x.mul_(2))(policy.actor_ft)
        assert not policy.sample(obs, noise).action.equal(first)
        each(lambda x: x.div_(2))(policy.actor_ft)
        assert policy.sample(obs, noise).action.equal(first)


@pytest.fixture
def embedded() -> Iterator[Counter[int]]:
    """How many timesteps each time embedding has been computed for."""
    rows: Counter[int] = Counter()

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, SinusoidalPosEmb):
            rows[id(module)] += len(output)

    hook = nn.modules.module.register_module_forward_hook(count)
    yield rows
    hook.remove()


@pytest.mark.skipif(native() is None, reason="the C++ extension is not built")
def test_what_follows_from_the_weights_alone_is_computed_once(embedded: Counter[int]) -> None:
    policy, obs = diffusion_policy(), observations(B)
    base, tuned = (id(network.time_embedding[0]) for network in (policy.actor, policy.actor_ft))
    for _ in range(3):
        policy.act(obs)
    assert embedded == {base: 2, tuned: 2}
    optimized("AdamW", fused=True)(policy.actor_ft)
    for _ in range(3):
        policy.act(obs)
    assert embedded == {base: 2, tuned: 4}


@pytest.mark.parametrize("F", [0, 2])
@pytest.mark.parametrize("eta", [None, *ETAS])
def test_the_differentiable_sample_is_the_sample(eta: str | None, F: int) -> None:
    policy = diffusion_policy(ETAS[eta]() if eta else None, ft_denoising_steps=F, **(DDIM if eta else {}))
    obs, noise = observations(B), policy.randn(S + 1, B, HORIZON, ACTION_DIM)
    action = policy.rsample(obs, noise)
    torch.testing.assert_close(action, policy.sample(obs, noise).action, rtol=0, atol=1e-5)
    action.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.trained().parameters())
    assert F == 0 or all(parameter.grad is None for parameter in policy.actor.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ft_denoising_steps": 5}, "ft_denoising_steps=5 must lie between 0 and the 4"),
        ({"ddim_steps": 9}, "ddim_steps=9 must lie between 1 and denoising_steps=4"),
        ({"learn_eta": True}, "learn_eta=true needs DDIM"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        diffusion_policy(**options)
