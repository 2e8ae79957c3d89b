from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from dppo_fast.algorithms.ppo import PPO, PPOConfig
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.kernels.denoise_step import LOG_PROB_RANGE
from dppo_fast.networks.gmm import GMMMLP
from dppo_fast.networks.transformer import GMMTransformer
from dppo_fast.policies.base import inverse_transform
from dppo_fast.policies.gaussian import GaussianConfig
from dppo_fast.policies.gmm import GMMPolicy
from dppo_fast.types import NoiseStream, Obs
from tests.algorithms.test_bc import cloning, demonstrations
from tests.algorithms.test_golden_losses import COEFFICIENTS, batch_of, check_parts, loss_of
from tests.golden_files import Case
from tests.golden_models import check_gradients, gaussian_of, gmm_cases, load_critic, options
from tests.golden_models import observations as observations_of
from tests.small import ACTION_DIM, HORIZON, learn_bandit, observations, perturb, seeded
from tests.tolerances import LOG_PROB, LOSS, SAMPLE

B, M = 6, 3
CASES = gmm_cases("08_gaussian_gmm_ppo")
MLP_OPTIONS: dict[str, Any] = {"mlp_dims": (16, 16)}
TRANSFORMER_OPTIONS: dict[str, Any] = {
    "transformer_embed_dim": 16,
    "transformer_num_heads": 2,
    "transformer_num_layers": 1,
}
STDS: dict[str, dict[str, Any]] = {
    "fixed": {"fixed_std": 0.3},
    "learned": {"fixed_std": 0.3, "learn_fixed_std": True},
    "network": {"fixed_std": None},
}


def gmm_policy(
    std: dict[str, Any], network: type[nn.Module] = GMMMLP, config: GaussianConfig | None = None
) -> GMMPolicy:
    style = MLP_OPTIONS if network is GMMMLP else TRANSFORMER_OPTIONS
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actor = network(ACTION_DIM, HORIZON, cond_dim=6, num_modes=M, **style, **std)
    perturb(actor, 0.2)
    policy = GMMPolicy(actor, config or GaussianConfig(), HORIZON, ACTION_DIM)
    policy.generator, policy.noise = seeded(1), NoiseStream(2)
    return policy


@pytest.fixture(params=[GMMMLP, GMMTransformer])
def network(request: pytest.FixtureRequest) -> type[nn.Module]:
    return request.param


@pytest.fixture(params=STDS.values(), ids=STDS.keys())
def policy(request: pytest.FixtureRequest, network: type[nn.Module]) -> GMMPolicy:
    return gmm_policy(request.param, network)


def mixture(policy: GMMPolicy, obs: Obs) -> MixtureSameFamily:
    """The same density, by PyTorch's own distributions."""
    mean, std, logits = policy.actor_ft(obs)
    return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, std), 1))


def draw(noise: Tensor) -> Any:
    return lambda draws: noise[:draws]


def test_acting_and_scoring_agree_with_torchs_mixture(policy: GMMPolicy) -> None:
    obs = observations(B)
    act = policy.act(obs)
    assert act.action.shape == (B, HORIZON, ACTION_DIM)
    expected = mixture(policy, obs).log_prob(act.action.flatten(1))
    torch.testing.assert_close(act.record["log_prob"][:, 0], expected)
    row, k = torch.tensor([4, 0]), torch.zeros(2, dtype=torch.int64)
    again = policy.log_prob({"state": obs["state"][row]}, policy.select(act.record, row, k), k)
    torch.testing.assert_close(again, expected[row])
    torch.testing.assert_close(policy.cloning_loss(obs, act.action), -expected.mean())


def test_a_decision_is_one_modes_sample_and_deterministic_its_mean(policy: GMMPolicy) -> None:
    obs = observations(B)
    mean, std, _ = policy.actor_ft(obs)
    action = policy.act(obs).action.flatten(1)
    policy.noise.step -= 1
    noise = policy.draw_noise(B, 2)[1].flatten(1)
    policy.noise.step -= 1
    deterministic = policy.act(obs, deterministic=True)
    assert deterministic.record == {}
    chosen = ((deterministic.action.flatten(1)[:, None] - mean).abs() < 1e-5).all(-1)  # [B, M]
    assert (chosen.sum(-1) == 1).all()
    torch.testing.assert_close(action, mean[chosen] + std[chosen] * noise)


def test_modes_are_drawn_by_their_weights() -> None:
    n = 20_000
    mean = torch.arange(M, dtype=torch.float32)[:, None].expand(n, M, HORIZON * ACTION_DIM)
    weights = torch.tensor([0.2, 0.0, 0.8])
    density = mean, torch.ones_like(mean), weights.log().expand(n, M)
    noise = torch.randn(2, n, HORIZON, ACTION_DIM, generator=seeded(0))
    mode = gmm_policy(STDS["fixed"]).sample(density, draw(noise), deterministic=True)[:, 0].long()
    share = torch.bincount(mode, minlength=M) / n
    torch.testing.assert_close(share, weights, rtol=0, atol=0.01)
    assert share[1] == 0


@pytest.mark.parametrize(("uniform", "index"), [(0.0, 0), (0.2, 0), (0.3, 2), (0.62, 2), (0.63, 3), (1.0, 3)])
def test_inverse_transform(uniform: float, index: int) -> None:
    """By weights that do not add up to 1, of which one is 0."""
    weights = torch.tensor([[2.0, 0, 3, 3], [0, 0, 0, 1]])
    assert inverse_transform(weights, torch.full((2,), uniform)).tolist() == [index, 3 if uniform else 0]


def test_an_env_decides_the_same_in_every_batch(policy: GMMPolicy) -> None:
    obs = observations(B)
    many = policy.act(obs).action
    policy.noise = NoiseStream(2)
    few = policy.act({"state": obs["state"][:2]}).action
    torch.testing.assert_close(many[:2], few)


def test_draws_are_bounded() -> None:
    policy, obs = gmm_policy(STDS["fixed"], config=GaussianConfig(randn_clip_value=0.1)), observations(B)
    noise = policy.draw_noise(B, 2)
    density = policy.actor_ft(obs)
    moved = policy.sample(density, draw(noise)) - policy.sample(density, draw(noise), deterministic=True)
    torch.testing.assert_close(moved, 0.3 * noise[1].flatten(1).clamp(-0.1, 0.1))


def test_the_entropy_is_a_lower_bound_and_exact_for_one_mode(policy: GMMPolicy) -> None:
    obs = observations(1)
    mean, std, logits = policy.actor_ft(obs)
    components = Independent(Normal(mean, std), 1).entropy()
    torch.testing.assert_close(policy.entropy(obs), (logits.softmax(-1) * components).sum())
    density = mixture(policy, obs)
    samples = density.sample((4000,))
    assert policy.entropy(obs) < -density.log_prob(samples).mean() + 0.1
    one = mean, std, torch.tensor([[0.0, -1e9, -1e9]])
    torch.testing.assert_close(policy.mean_entropy(one), components[0, 0])


def test_losses_train_the_fine_tuned_network_only(policy: GMMPolicy) -> None:
    obs = observations(B)
    perturb(policy.actor_ft, 0.1)
    policy.generator = seeded(9)
    noise = torch.randn(2, B, HORIZON, ACTION_DIM, generator=seeded(9))
    action = policy.sample(policy.actor(obs), draw(noise))
    loss = policy.behaviour_cloning_loss(obs)
    torch.testing.assert_close(loss, -mixture(policy, obs).log_prob(action).mean())
    loss.backward()
    assert all(parameter.grad is None for parameter in policy.actor.parameters())
    trained = {name for name, parameter in policy.actor_ft.named_parameters() if parameter.requires_grad}
    moved = {name for name, p in policy.actor_ft.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    unused = {name for name in trained if "norm2" in name or "multihead_attn.in_proj" in name}
    assert trained - unused <= moved <= trained


@pytest.mark.parametrize("std", STDS.values(), ids=STDS.keys())
def test_ppo_learns(std: dict[str, Any]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = GMMMLP(2, 1, cond_dim=1, mlp_dims=(16,), num_modes=M, **std)
    policy = GMMPolicy(network, GaussianConfig(), 1, 2)
    policy.generator, policy.noise = seeded(1), NoiseStream(2)
    before, after = learn_bandit(policy, iterations=20, batch_size=64, clip_ploss_coef=0.2)
    assert after > before + 0.5


def test_pre_training_lowers_the_loss(network: type[nn.Module]) -> None:
    learner = cloning(gmm_policy(STDS["learned"], network), demonstrations())
    losses = [float(learner.update(epoch)["loss/bc"]) for epoch in range(10)]
    assert losses[-1] < losses[0] - 0.5


def test_dropout_acts_in_pre_training_alone() -> None:
    style = {**TRANSFORMER_OPTIONS, "p_drop_emb": 0.5, "p_drop_attn": 0.5}
    network = GMMTransformer(ACTION_DIM, HORIZON, cond_dim=6, num_modes=M, fixed_std=0.3, **style)
    policy, obs = GMMPolicy(network, GaussianConfig(), HORIZON, ACTION_DIM), observations(B)
    action = policy.act(obs).action
    losses = {policy.cloning_loss(obs, action).item() for _ in range(5)}
    assert len(losses) == 5
    assert -mixture(policy, obs).log_prob(action.flatten(1)).mean().item() not in losses
    policy.noise.step = 0
    assert policy.act(obs).action.equal(action)


@pytest.mark.parametrize("case", CASES)
def test_golden_modes(case: Case) -> None:
    """The recorded actions are of weights that were disturbed since, but near enough to tell which mode they are of."""
    mode, normal = case.tensor("sample/noise/000_multinomial_index"), case.tensor("sample/noise/001_randn")
    mean, std, logits = gaussian_of(case).actor_ft(observations_of(case))
    distance = (case.tensor("sample/actions").flatten(1)[:, None] - mean - std * normal).norm(dim=-1)  # [B, M]
    assert distance.argmin(-1).equal(mode)

    weights, row = logits.softmax(-1), torch.arange(len(mode))
    middle = torch.special.ndtri((weights.cumsum(-1) - weights / 2)[row, mode])  # as a draw that falls to the mode
    noise = torch.stack((middle[:, None].expand_as(normal[:, 0]), normal[row, mode]))
    action = gaussian_of(case).sample((mean, std, logits), draw(noise))
    SAMPLE.check(action, (mean + std * normal)[row, mode].detach())


@pytest.mark.parametrize("case", CASES)
def test_golden_log_probs_and_pre_training_loss(case: Case) -> None:
    policy, obs, action = gaussian_of(case), observations_of(case), case.tensor("in/actions")
    log_prob = policy.log_prob(obs, {"action": action}, torch.zeros(len(action), dtype=torch.int64))
    LOG_PROB.check(log_prob, case["logprobs"])
    LOSS.check(policy.cloning_loss(obs, action), case["bc/loss"])
    LOSS.check(policy.entropy(obs), case["entropy"])


@pytest.mark.parametrize("case", CASES)
def test_golden_ppo_loss(case: Case) -> None:
    """With the reference's clamp of the joint log-probs."""
    policy, critic = gaussian_of(case, clamp_log_prob=True), load_critic(case.tensors("w/"))
    algorithm = PPO(policy, critic, options(PPOConfig, case.cfg, COEFFICIENTS), RolloutBuffer(1, 1))
    old_log_prob = case.tensor("in/oldlogprobs").clamp(*LOG_PROB_RANGE)[:, None]
    batch = batch_of(case, {"action": case.tensor("in/actions"), "log_prob": old_log_prob})
    loss, parts = loss_of(algorithm, batch, torch.zeros(len(batch.advantage), dtype=torch.int64))
    check_parts(parts, case.sub("out/"))
    loss.backward()
    check_gradients(case.tensors("grad/"), nn.ModuleDict({"network": policy.actor_ft, "critic": critic}))
