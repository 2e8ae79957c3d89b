"""The drop-in for the reference's policy objects.

With DPPO_REFERENCE=<checkout of irom-princeton/dppo>, and einops installed, it is compared with the live classes.
Stand-ins of the same names and interface (`tests.stand_in`) are always accelerated, and held to golden numbers.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.reference import load
from dppo_fast import accelerate
from dppo_fast.types import Obs, UserError
from tests import stand_in
from tests.golden_files import Case
from tests.golden_models import check_gradients, diffusion_cases, observations, weights_of
from tests.policies.test_golden_diffusion import chains
from tests.small import perturb, seeded
from tests.stand_in import DiffusionEval, DiffusionMLP, DiffusionModel, PPODiffusion, VPGDiffusion
from tests.tolerances import LOSS, SAMPLE, Tolerance, log_densities

EXACTLY = Tolerance(relative=1e-5, absolute=1e-5)
B, TH, DA, DO = 6, 4, 3, 5
SIZE = 16
"""Of images."""


# The numbers of golden cases, through stand-ins


@pytest.mark.parametrize(("case", "mode"), chains())
def test_golden_sampling(case: Case, mode: str) -> None:
    model = stand_in.model(VPGDiffusion, case.cfg, weights_of(case))
    fast, obs, theirs = accelerate(model, strict=True), observations(case), case.case(mode)
    flags = {"deterministic": mode == "det", "use_base_policy": mode == "base"}
    sample = fast(obs, **flags, noise=theirs.tensor("noise"))
    SAMPLE.check(sample.trajectories, theirs["trajectories"])
    SAMPLE.check(sample.chains, theirs["chains"])
    assert fast(obs, return_chain=False, **flags).chains is None
    for base, name in ((False, "logprobs"), (True, "logprobs_base")):
        points = theirs.tensor("chains")
        density, eta = fast.get_logprobs(obs, points, get_ent=True, use_base_policy=base)
        log_densities(points, theirs[name], model.min_logprob_denoising_std).check(density, theirs[name], name)
        EXACTLY.check(eta, theirs["eta"], "eta")
    assert not model.calls


@pytest.mark.parametrize("case", diffusion_cases("04_base_sampling") + diffusion_cases("04_eval_sampling"))
def test_golden_evaluation(case: Case) -> None:
    cls = DiffusionEval if case.cfg["ft_denoising_steps"] else DiffusionModel
    fast = accelerate(stand_in.model(cls, case.cfg, weights_of(case)), strict=True)
    for mode in ("", "det/", "stoch/"):
        if mode + "noise" in case:
            sample = fast(observations(case), deterministic=mode != "stoch/", noise=case.tensor(mode + "noise"))
            SAMPLE.check(sample.trajectories, case[mode + "trajectories"], mode)
            assert sample.chains is None


@pytest.mark.parametrize("case", diffusion_cases("06_ppo_loss", "out/v_loss"))
def test_golden_loss(case: Case) -> None:
    model = stand_in.model(PPODiffusion, case.cfg, weights_of(case))
    fast, names = accelerate(model, strict=True), ("chains_prev", "chains_next", "denoising_inds", "returns")
    pairs = [case.tensor(f"in/{name}") for name in (*names, "oldvalues", "advantages", "oldlogprobs")]
    parts = fast.loss(observations(case), *pairs, reward_horizon=case.cfg["reward_horizon"])
    theirs = {**case.sub("out/"), **case.sub("sane/")}
    names = ("pg_loss", "entropy_loss", "v_loss", "clipfrac", "approx_kl", "ratio", "bc_loss", "eta")
    for name, ours in zip(names, parts, strict=True):
        if name in theirs:
            LOSS.check(ours, theirs[name], name)
    (parts[0] + 0.1 * parts[1] + 0.5 * parts[2]).backward()
    check_gradients(case.tensors("grad/"), model)


@pytest.mark.parametrize("case", diffusion_cases("03_diffusion_losses"))
def test_golden_denoising_loss(case: Case) -> None:
    Th, Da = case["in/x_start"].shape[1:]
    model = stand_in.model(DiffusionModel, {**case.cfg, "horizon_steps": Th, "action_dim": Da}, case.tensors("w/"))
    fast, obs, noise = accelerate(model, strict=True), observations(case), case.tensor("noise")
    loss = fast.p_losses(case.tensor("in/x_start"), obs, case.tensor("in/t"), noise=noise)
    LOSS.check(loss, case["loss"])
    loss.backward()
    check_gradients(case.tensors("grad/"), model)
    fast.loss(case.tensor("in/x_start"), obs)
    assert not model.calls


# The live reference


@pytest.fixture(scope="module")
def reference() -> Callable[[str], Any]:
    """Its modules by name."""
    if "DPPO_REFERENCE" not in os.environ:
        pytest.skip("needs a checkout of irom-princeton/dppo: set DPPO_REFERENCE to it")
    return lambda name: load(Path(os.environ["DPPO_REFERENCE"]), name)


def live_network(reference: Callable[[str], Any], kind: str) -> nn.Module:
    vit = reference("model.common.vit")
    mlps, unets = reference("model.diffusion.mlp_diffusion"), reference("model.diffusion.unet")
    convolutions = {"diffusion_step_embed_dim": 8, "dim": 8, "dim_mults": (1, 2)}
    size = vit.VitEncoderConfig(embed_dim=8, num_heads=2)
    encoder = vit.VitEncoder([3, SIZE, SIZE], size, 3, SIZE, SIZE)
    make: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: mlps.DiffusionMLP(
            DA, TH, DO, mlp_dims=[16, 16, 16], activation_type="ReLU", residual_style=True
        ),
        "mlp_norm": lambda: mlps.DiffusionMLP(DA, TH, DO, cond_mlp_dims=[8, 8], mlp_dims=[16, 12], use_layernorm=True),
        "unet": lambda: unets.Unet1D(DA, DO, **convolutions, n_groups=4, cond_predict_scale=True),
        "unet_cond": lambda: unets.Unet1D(DA, DO, **convolutions, cond_mlp_dims=[8, 8], activation_type="ReLU"),
        "vision_mlp": lambda: mlps.VisionDiffusionMLP(encoder, DA, TH, DO, spatial_emb=8, num_img=2, mlp_dims=[16]),
        "vision_mlp_plain": lambda: mlps.VisionDiffusionMLP(encoder, DA, TH, DO, mlp_dims=[16]),
        "vision_unet": lambda: unets.VisionUnet1D(encoder, DA, 1, DO, **convolutions, spatial_emb=8),
    }
    return make[kind]()


def live(reference: Callable[[str], Any], kind: str, ddim: bool, ft_steps: int, **more: Any) -> Any:
    """Their PPODiffusion with a fine-tuned network that differs from the base; S is 10, or 5 with DDIM."""
    torch.manual_seed(0)
    if ddim:
        more = {"use_ddim": True, "ddim_steps": 5, "eta": reference("model.diffusion.eta").EtaFixed(1.0), **more}
    model = reference("model.diffusion.diffusion_ppo").PPODiffusion(
        actor=live_network(reference, kind),
        critic=reference("model.common.critic").CriticObs(DO, [8, 8]),
        ft_denoising_steps=ft_steps,
        gamma_denoising=0.9,
        clip_ploss_coef=0.1,
        horizon_steps=TH,
        obs_dim=DO,
        action_dim=DA,
        device="cpu",
        denoising_steps=10,
        **more,
    )
    perturb(model.actor_ft, 0.05)
    return model


def observe(kind: str) -> Obs:
    obs = {"state": torch.randn(B, 1, DO, generator=seeded(1))}
    if kind.startswith("vision"):
        channels = 6 if kind == "vision_mlp" else 3
        obs["rgb"] = torch.randint(0, 256, (B, 1, channels, SIZE, SIZE), generator=seeded(2)).byte()
    return obs


def draws(steps: int) -> Tensor:
    """What the reference draws for a chain after ``manual_seed(3)``."""
    torch.manual_seed(3)
    return torch.stack([torch.randn(B, TH, DA) for _ in range(steps + 1)])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Those of the parameters, which are cleared."""
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def compare(model: Any, fast: Any, obs: Obs) -> None:
    """Chains, log-probs, losses and gradients of both sides, from the same noise."""
    steps = model.ddim_steps if model.use_ddim else model.denoising_steps
    noise = draws(steps)
    for deterministic, base in product((False, True), repeat=2):
        torch.manual_seed(3)
        theirs = model(obs, deterministic, use_base_policy=base)
        torch.manual_seed(3)
        for ours in (fast(obs, deterministic, use_base_policy=base), fast(obs, deterministic, True, base, noise=noise)):
            EXACTLY.check(ours.trajectories, theirs.trajectories)
            EXACTLY.check(ours.chains, theirs.chains)
    results = [side.get_logprobs(obs, theirs.chains, get_ent=True, use_base_policy=base) for side in (model, fast)]
    for ours, expected in zip(results[1], results[0], strict=True):
        EXACTLY.check(ours, expected)

    F, generator = model.ft_denoising_steps, seeded(4)
    k = torch.randint(0, F, (B,), generator=generator)
    pairs = theirs.chains[range(B), k], theirs.chains[range(B), k + 1], k
    numbers = [torch.randn(B, generator=generator) for _ in range(3)]
    single = model.get_logprobs_subsample(obs, *pairs).detach()
    EXACTLY.check(fast.get_logprobs_subsample(obs, *pairs), single)
    old = single + 0.05 * torch.randn(single.shape, generator=generator)
    outcomes = []
    for side in (model, fast):
        torch.manual_seed(3)
        parts = side.loss(obs, *pairs, *numbers, old, use_bc_loss=True, reward_horizon=3)
        (parts[0] + parts[2] + 0.1 * parts[6]).backward()
        outcomes.append((torch.stack([torch.as_tensor(part) for part in parts]), gradients(model)))
    EXACTLY.check(outcomes[1][0], outcomes[0][0], "losses")
    assert outcomes[1][1].keys() == outcomes[0][1].keys()
    for name, gradient in outcomes[0][1].items():
        EXACTLY.check(outcomes[1][1][name], gradient, name)


KINDS = ("mlp", "mlp_norm", "unet", "unet_cond", "vision_mlp", "vision_mlp_plain", "vision_unet")
CHAINS = ((False, 4), (False, 10), (True, 2), (True, 5))
"""DDIM or not, F."""


@pytest.mark.parametrize(("kind", "chain"), list(product(KINDS, CHAINS)))
def test_the_reference_s_numbers(reference: Callable[[str], Any], kind: str, chain: tuple[bool, int]) -> None:
    model, obs = live(reference, kind, *chain), observe(kind)
    fast = accelerate(model, strict=True)
    compare(model, fast, obs)
    optimizer = AdamW([*fast.actor_ft.parameters(), *fast.critic.parameters()], lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    points = fast(obs).chains
    (fast.get_logprobs(obs, points).mean() + fast.critic(obs).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert {name.partition(".")[0] for name, value in model.state_dict().items() if not value.equal(before[name])} == {
        "actor_ft", "critic"
    }  # fmt: skip
    compare(model, fast, obs)


@pytest.mark.parametrize("ddim", [False, True])
def test_the_reference_s_clips_and_etas(reference: Callable[[str], Any], ddim: bool) -> None:
    clips = {"denoised_clip_value": 0.8, "randn_clip_value": 1.5, "final_action_clip_value": 0.9, "eps_clip_value": 0.7}
    etas = reference("model.diffusion.eta")
    learned = [etas.EtaAction(DA), etas.EtaState(DO, [8]), etas.EtaStateAction(DO, [8], DA)] if ddim else [None]
    for eta in learned:
        more = {"eta": eta, "learn_eta": True} if ddim else {"predict_epsilon": False}
        model = live(reference, "mlp", ddim, 3, **clips, clip_vloss_coef=0.1, norm_adv=False, **more)
        compare(model, accelerate(model, strict=True), observe("mlp"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_s_pre_training(reference: Callable[[str], Any], kind: str) -> None:
    model = reference("model.diffusion.diffusion").DiffusionModel(
        live_network(reference, kind), TH, DO, DA, device="cpu", denoising_steps=10
    )
    fast, action, found = accelerate(model, strict=True), torch.randn(B, TH, DA, generator=seeded(5)), []
    for side in (model, fast):
        torch.manual_seed(3)
        loss = side.loss(action, observe(kind))
        loss.backward()
        found.append({"loss": loss, **gradients(model)})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        EXACTLY.check(found[1][name], value, name)


@pytest.mark.parametrize(("kind", "ddim", "ft_steps"), list(product(("mlp", "unet"), (False, True), (0, 2))))
def test_the_reference_s_evaluation(
    reference: Callable[[str], Any], kind: str, ddim: bool, ft_steps: int, tmp_path: Path
) -> None:
    torch.save({"model": live(reference, kind, ddim, 2).state_dict()}, tmp_path / "state.pt")
    model = reference("model.diffusion.diffusion_eval").DiffusionEval(
        tmp_path / "state.pt",
        ft_steps,
        network=live_network(reference, kind),
        horizon_steps=TH,
        obs_dim=DO,
        action_dim=DA,
        device="cpu",
        denoising_steps=10,
        use_ddim=ddim,
        ddim_steps=5,
    )
    found = []
    for side in (model, accelerate(model, strict=True)):
        torch.manual_seed(3)
        found.append(side(observe(kind), deterministic=True).trajectories)
    EXACTLY.check(found[1], found[0])


# What holds for any model


CFG = {"horizon_steps": TH, "action_dim": DA, "denoising_steps": 8, "ft_denoising_steps": 3, "gamma_denoising": 0.9}
CFG |= {"min_sampling_denoising_std": 0.1, "min_logprob_denoising_std": 0.1, "clip_ploss_coef": 0.1, "learn_eta": False}


def small(cls: type[DiffusionModel] = PPODiffusion, **cfg: Any) -> Any:
    torch.manual_seed(0)
    model = cls(DiffusionMLP(DA, TH, DO, mlp_dims=(8, 8, 8)), {**CFG, **cfg}, nn.Sequential(nn.Linear(DO, 1)))
    perturb(model.actor_ft, 0.1)
    return model


def parameters(module: nn.Module) -> Iterator[Tensor]:
    return (p.detach().clone() for p in module.parameters())


def test_one_state() -> None:
    model = small()
    fast = accelerate(model)
    assert isinstance(fast, PPODiffusion)
    assert list(fast.parameters()) == list(model.parameters())
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert fast.train() is fast
    fast.eval()
    assert not model.training
    fast.note = "seen"
    assert model.note == "seen"
    obs, noise = observe("mlp"), draws(8)
    before = fast(obs, noise=noise).trajectories
    changes: list[Callable[[], object]] = [
        lambda: perturb(model.actor_ft, 0.1),
        lambda: perturb(fast.actor, 0.1),
        lambda: model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()}, assign=True),
        lambda: setattr(model, "min_sampling_denoising_std", 0.3),
        lambda: setattr(fast, "min_sampling_denoising_std", lambda: 0.5),
        model.step,
        fast.step,
    ]
    for change in changes:
        change()
        after = fast(obs, noise=noise)
        assert not after.trajectories.equal(before)
        fresh = accelerate(model)(obs, noise=noise)
        assert after.chains.equal(fresh.chains)
        before = after.trajectories
    assert after.chains.shape[1] == model.ft_denoising_steps + 1 == 2


@pytest.mark.parametrize("F", [3, 8])
def test_a_sample_without_its_chain(F: int) -> None:
    """The reference's crashes where all 8 steps are fine-tuned."""
    fast, obs, noise = accelerate(small(ft_denoising_steps=F), strict=True), observe("mlp"), draws(8)
    sample = fast(obs, return_chain=False, noise=noise)
    assert sample.chains is None
    assert sample.trajectories.equal(fast(obs, noise=noise).trajectories)


def test_a_copy_is_on_its_own() -> None:
    fast = accelerate(small())
    obs, noise = observe("mlp"), draws(8)
    before, other = fast(obs, noise=noise).trajectories, copy.deepcopy(fast)
    perturb(other.actor_ft, 0.5)
    assert not other(obs, noise=noise).trajectories.equal(before)
    assert fast(obs, noise=noise).trajectories.equal(before)


def test_the_random_state_is_the_caller_s() -> None:
    model = small()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    accelerate(model)
    assert torch.rand(1).equal(expected)


def test_steered_noise() -> None:
    """DSRL's models start from the observation's ``noise_action``."""
    model = small(DiffusionEval, controllable_noise=True)
    fast, obs, noise = accelerate(model, strict=True), observe("mlp"), draws(8)
    torch.manual_seed(3)
    torch.randn(B, TH, DA)
    steered = fast(cond={"state": obs["state"][:, 0], "noise_action": noise[0]}, deterministic=True)
    assert steered.trajectories.equal(fast({**obs, "noise_action": -noise[0]}, noise=noise).trajectories)


def test_only_evaluation_is_steered() -> None:
    obs = {**observe("mlp"), "noise_action": torch.ones(B, TH, DA)}
    with pytest.raises(UserError, match="the observation holds noise_action"):
        accelerate(small(controllable_noise=True), strict=True)(obs)


class Augmented(DiffusionMLP):
    augment = True


class Dropping(DiffusionMLP):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = nn.Dropout(0.5)


def with_network(cls: type[DiffusionMLP]) -> Any:
    return PPODiffusion(cls(DA, TH, DO, mlp_dims=(8,)), CFG)


@pytest.mark.parametrize(
    ("make", "extra", "reason"),
    [
        (small, {"goal": torch.ones(B, 2)}, "the observation holds goal"),
        (lambda: with_network(Augmented), {}, "shifts images at random"),
        (lambda: with_network(Dropping), {}, "dropout is active"),
        (lambda: small(ft_denoising_steps=0), {}, "ft_denoising_steps=0"),
    ],
)
def test_what_is_unknown_falls_back(
    make: Callable[[], Any], extra: Obs, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, obs = make(), {**observe("mlp"), **extra}
    fast = accelerate(model)
    with caplog.at_level(logging.WARNING):
        fast(obs)
        fast(obs)
    assert model.calls == {"forward": 2}
    (message,) = caplog.messages
    assert reason in message
    with pytest.raises(UserError, match=reason):
        fast(obs, noise=draws(8))
    with pytest.raises(UserError, match=reason):
        accelerate(model, strict=True)(obs)


def test_dropout_in_evaluation_is_none() -> None:
    model = with_network(Dropping).eval()
    accelerate(model, strict=True)(observe("mlp"))
    assert not model.calls


class Fork(PPODiffusion):
    """Another loss, and one more argument."""

    def loss(self, obs: Obs, *rest: Any, **more: Any) -> Any:
        return self(obs).trajectories

    def get_logprobs_subsample(self, cond: Obs, chains: Tensor) -> Any:  # type: ignore[override]
        return "its own"


def test_a_fork_keeps_its_own_methods() -> None:
    fork = small(Fork)
    fast, obs = accelerate(fork), observe("mlp")
    assert fast.loss(obs).shape == (B, TH, DA)
    assert fast.get_logprobs_subsample(obs, fast(obs).chains) == "its own"
    assert fast.get_logprobs(obs, fast(obs).chains).shape == (3 * B, TH, DA)
    assert not fork.calls


class ShortSampling(PPODiffusion):
    """A class of the reference's name whose method takes fewer arguments."""

    def forward(self, cond: Obs) -> Any:  # type: ignore[override]
        return "its own"


class LongSampling(DiffusionModel):
    """One whose method takes more."""

    def forward(self, cond: Obs, deterministic: bool = True, num_steps: int | None = None) -> Any:
        return "its own"


ShortSampling.forward.__qualname__ = "VPGDiffusion.forward"
LongSampling.forward.__qualname__ = "DiffusionModel.forward"


def test_a_method_that_lacks_arguments_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    assert accelerate(small(ShortSampling))(observe("mlp")) == "its own"
    (message,) = caplog.messages
    assert message.startswith("VPGDiffusion.forward: its arguments are not cond, deterministic, return_chain")
    with pytest.raises(UserError, match="its arguments are not"):
        accelerate(small(ShortSampling), strict=True)


def test_an_argument_that_a_fork_added_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    model, obs = LongSampling(DiffusionMLP(DA, TH, DO), {**CFG, "ft_denoising_steps": 0}), observe("mlp")
    fast = accelerate(model)
    assert fast(obs, deterministic=True).trajectories.shape == (B, TH, DA)
    assert not caplog.messages
    assert fast(obs, num_steps=2) == fast(obs, True, 2) == "its own"
    assert caplog.messages == ["DiffusionModel.forward: num_steps is given; the original method runs instead"]
    with pytest.raises(UserError, match="num_steps is given"):
        accelerate(model, strict=True)(obs, num_steps=2)


@pytest.mark.parametrize("residual", [False, True])
def test_an_activation_that_no_op_knows(residual: bool) -> None:
    """ReinFlow's networks may have one."""
    network = DiffusionMLP(DA, TH, DO, mlp_dims=(8, 8, 8), activation_type="SiLU", residual_style=residual)
    assert accelerate(PPODiffusion(network, CFG), strict=True)(observe("mlp")).trajectories.shape == (B, TH, DA)


def with_activation(activation: nn.Module) -> Any:
    network = DiffusionMLP(DA, TH, DO, mlp_dims=(8,))
    network.mlp_mean.get_submodule("moduleList.0").act_1 = activation
    return PPODiffusion(network, CFG)


class OtherSteps(PPODiffusion):
    def p_mean_var(self, *args: Any, **kwargs: Any) -> Any:
        mean, *rest = super().p_mean_var(*args, **kwargs)
        return 1.01 * mean, *rest


class Transformer(nn.Module): ...


class Wider(DiffusionMLP):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear is unknown: it is none of DiffusionModel, PPODiffusion, VPGDiffusion"),
        (lambda: DiffusionModel(Transformer(), CFG), "the network Transformer is unknown; it may be DiffusionMLP"),
        (lambda: with_activation(nn.Hardswish()), "the activation Hardswish is unknown; it may be ReLU"),
        (lambda: small(OtherSteps), "the denoising steps of OtherSteps differ .* by 0.0099"),
        (lambda: with_network(Wider), r"Wider's extra.bias is torch.float32 \[2\], expected no such parameter"),
        (lambda: small().double(), r"is torch.float64 \[8\], expected torch.float32 \[8\]"),
    ],
)
def test_an_unknown_model_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        accelerate(make())


@pytest.mark.parametrize(
    ("obs", "noise", "message"),
    [
        ({"state": torch.ones(B, 1, DO + 1)}, None, "'state' is of another task: 6 numbers, the network takes 5 numb"),
        ({"image": torch.ones(B, 1, DO)}, None, "the observation has no 'state', only image"),
        (observe("mlp"), torch.ones(8, B, TH, DA), r"noise has shape \[8, 6, 4, 3\], expected .* \[9, 6, 4, 3\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(obs: Obs, noise: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        accelerate(small())(obs, noise=noise)


def test_the_readme_s_example() -> None:
    page = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "accelerate" in block)
    assert sum(map(bool, example.splitlines())) == 3
    names = {"model": small(), "state": torch.randn(B, 1, DO)}
    exec(example, names)
    assert names["action"].shape == (B, TH, DA)


def test_importing_it_is_light() -> None:
    code = """
import sys, time
import torch
start = time.process_time()
from dppo_fast import accelerate
assert callable(accelerate)
assert time.process_time() - start < 1, "PyTorch itself takes another second"
assert not {"envpool", "gymnasium", "mujoco", "matplotlib", "hydra", "omegaconf"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
