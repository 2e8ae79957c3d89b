"""Every network and policy from demonstrations to fine-tuning, with and without images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dppo_fast.algorithms.dppo import DPPO, DPPOConfig
from dppo_fast.algorithms.ppo import Batch
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.build import build_trainer, parse
from dppo_fast.data.trajectories import Trajectories
from dppo_fast.log import RunLog
from dppo_fast.networks.vision import Vision, VisionDiffusionMLP, ViTCritic, VitEncoder, shift_images
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.trainer import Trainer
from dppo_fast.types import Obs, UserError
from tests.runs import rows

SIZE = 16


class Spot(gymnasium.Env[Any, Any]):
    """A bright spot in a picture [H, W, C], which the actions move; the reward is higher nearer to the middle."""

    observation_space = Dict({"state": Box(-1, 1, (2,), np.float32), "rgb": Box(0, 255, (SIZE, SIZE, 3), np.uint8)})
    action_space = Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.place, self.t = self.np_random.uniform(-1, 1, 2), 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.place = (self.place + 0.3 * action).clip(-1, 1)
        self.t += 1
        return self._obs(), float(1 - np.abs(self.place).max()), self.t == 6, False, {}

    def _obs(self) -> Any:
        picture = np.zeros((SIZE, SIZE, 3), np.uint8)
        x, y = ((self.place + 1) / 2 * (SIZE - 1)).astype(int)
        picture[y, x] = 255
        return {"state": self.place.astype(np.float32), "rgb": picture}


gymnasium.register("Spot-v0", Spot)

VISION = {
    "spatial_emb": 4,
    "backbone": {"patch_size": 4, "embed_dim": 4, "num_heads": 2},
    "img_cond_steps": 2,
}
MLP = {"mlp_dims": [8, 8, 8]}
UNET = {"dim": 4, "dim_mults": [1, 2], "n_groups": 2, "diffusion_step_embed_dim": 4}
TRANSFORMER = {"transformer_embed_dim": 8, "transformer_num_heads": 2, "transformer_num_layers": 1, "fixed_std": 0.2}
DIFFUSION = {"denoising_steps": 4}

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusion_mlp": ("diffusion", MLP),
    "unet1d": ("diffusion", UNET),
    "diffusion_vision_mlp": ("diffusion", MLP | VISION),
    "diffusion_vision_unet": ("diffusion", UNET | VISION),
    "gaussian_mlp": ("gaussian", MLP | {"fixed_std": 0.2}),
    "gaussian_transformer": ("gaussian", TRANSFORMER),
    "gaussian_vision_mlp": ("gaussian", MLP | VISION | {"fixed_std": 0.2}),
    "gmm_mlp": ("gmm", MLP | {"fixed_std": 0.2}),
    "gmm_transformer": ("gmm", TRANSFORMER),
    "gmm_vision_mlp": ("gmm", MLP | VISION | {"fixed_std": 0.2}),
}
"""Name -> its policy and arguments."""


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.npz"
    rng = np.random.default_rng(0)
    states, actions = (rng.uniform(-1, 1, (30, 2)).astype(np.float32) for _ in range(2))
    images = rng.integers(0, 256, (30, 3, SIZE, SIZE), np.uint8)
    Trajectories(states, actions, np.array([16, 14]), images=images).save(path, compressed=False)
    return path


def configuration(network: str, run: Path) -> dict[str, Any]:
    """What pre-training and fine-tuning share."""
    policy, arguments = NETWORKS[network]
    return {
        "logdir": str(run),
        "device": "cpu",
        "num_threads": 1,
        "task": {"horizon_steps": 4, "act_steps": 2, "cond_steps": 1, "img_cond_steps": 2},
        "env": {"id": f"{__name__}:Spot-v0", "num_envs": 3, "max_episode_steps": 6},
        "policy": {
            "name": policy,
            "network": {"name": network, **copy.deepcopy(arguments)},
            "options": dict(DIFFUSION) if policy == "diffusion" else {},
        },
        "train": {"n_train_itr": 2, "n_steps": 4, "val_freq": 2, "eval_episodes": 2},
    }


def sees_images(network: str) -> bool:
    return "vision" in network


def pretraining(network: str, data: Path, run: Path) -> dict[str, Any]:
    algorithm = {"name": "bc", "batch_size": 8, "augment": sees_images(network)}
    return configuration(network, run) | {"algorithm": algorithm, "data": {"path": str(data)}}


def fine_tuning(network: str, run: Path, checkpoint: Path | None = None, **algorithm: Any) -> dict[str, Any]:
    config = configuration(network, run)
    vision = sees_images(network)
    diffusion = config["policy"]["name"] == "diffusion"
    if checkpoint is not None:
        config["policy"]["checkpoint"] = str(checkpoint)
    if diffusion:
        config["policy"]["options"]["ft_denoising_steps"] = 2
    defaults = {"batch_size": 8, "update_epochs": 2, "augment": vision}
    return config | {
        "algorithm": {"name": "dppo" if diffusion else "ppo", **defaults, **algorithm},
        "critic": {"name": "vit", **MLP, **copy.deepcopy(VISION)} if vision else {"name": "mlp", **MLP},
    }


def run_whole(config: dict[str, Any]) -> list[dict[str, float]]:
    run = Path(config["logdir"])
    with RunLog(run, config["train"]["n_train_itr"], live=False, tensorboard=False) as log:
        build_trainer(parse(OmegaConf.create(config)), run, config).train(log)
    return rows(run)


def trainer(config: dict[str, Any]) -> Trainer:
    built = build_trainer(parse(OmegaConf.create(config)), Path(config["logdir"]), config)
    assert built.collector is not None
    built.collector.reset()
    return built


@pytest.mark.parametrize("network", NETWORKS)
def test_from_demonstrations_to_fine_tuning(
    network: str, demonstrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloning = run_whole(pretraining(network, demonstrations, tmp_path / "pre"))
    assert all(np.isfinite(row["loss/bc"]) for row in cloning[1:])
    assert "memory: weights" in capsys.readouterr().out
    tuned = run_whole(fine_tuning(network, tmp_path / "fine", tmp_path / "pre"))
    assert tuned[0]["eval/return"] == pytest.approx(cloning[-1]["eval/return"], abs=1e-4)
    for row in tuned[1:]:
        assert row["ppo/first_clip_fraction"] == 0
        assert row["ppo/ratio_max"] >= row["ppo/ratio"]
    assert "memory: rollout" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run_and_another_shift_another(tmp_path: Path) -> None:
    same = [run_whole(fine_tuning("gaussian_vision_mlp", tmp_path / name)) for name in "ab"]
    assert same[0] == same[1]
    unshifted = run_whole(fine_tuning("gaussian_vision_mlp", tmp_path / "c", augment=False))
    assert unshifted[1]["train/return"] == same[0][1]["train/return"]
    assert unshifted[1]["loss/value"] != same[0][1]["loss/value"]


def collected(config: dict[str, Any]) -> Trainer:
    built = trainer(config)
    assert built.collector is not None
    built.collector.collect(built.algorithm.buffer)
    return built


def test_images_are_bytes_in_the_buffer(tmp_path: Path) -> None:
    """Of the channels first, the newest last."""
    obs = collected(fine_tuning("diffusion_vision_mlp", tmp_path)).algorithm.buffer.obs
    images, places = obs["rgb"], obs["state"][:, :, 0]
    assert images.dtype == torch.uint8
    assert images.shape == (4, 3, 2, 3, SIZE, SIZE)
    assert images[0, :, 0].equal(images[0, :, 1])
    assert (images[1:, :, 0] != images[1:, :, 1]).any()
    pixel = ((places.double() + 1) / 2 * (SIZE - 1)).int()
    assert images[:, :, -1, 2].flatten(2).int().argmax(-1).equal((pixel[..., 1] * SIZE + pixel[..., 0]).long())


def test_every_epoch_shifts_anew_and_its_ratios_start_at_one(tmp_path: Path) -> None:
    learner: Any = collected(fine_tuning("diffusion_vision_mlp", tmp_path, update_epochs=3)).algorithm
    plain = learner._prepare()
    views = learner._views(plain)
    assert len(views) == 3
    decision = torch.arange(len(plain.value))
    for view in views:
        expected = shift_images(plain.obs["rgb"], view.shift)
        assert view.observations(decision)["rgb"].equal(expected)
        assert (view.record["log_prob"] - plain.record["log_prob"]).abs().max() > 1e-4
        row, k = decision.repeat_interleave(2), decision.repeat(2) % 2
        _, metrics = learner.loss(view, row, k, view.advantage[row])
        assert float(metrics["ppo/ratio_max"]) == pytest.approx(1, abs=1e-5)
    assert not views[0].shift.equal(views[1].shift)
    assert int(torch.stack([view.shift for view in views]).abs().max()) <= 4


def test_pretraining_shifts_the_images_of_every_minibatch(demonstrations: Path, tmp_path: Path) -> None:
    config = pretraining("gaussian_vision_mlp", demonstrations, tmp_path)
    learner: Any = build_trainer(parse(OmegaConf.create(config)), tmp_path).algorithm
    seen: list[Obs] = []
    cloning_loss = learner.policy.cloning_loss
    learner.policy.cloning_loss = lambda obs, action: seen.append(obs) or cloning_loss(obs, action)
    obs, action = learner.dataset.batch(torch.arange(8))
    for _ in range(2):
        learner.minibatch(obs, action, 0)
    assert all(x["state"].equal(obs["state"]) and x["rgb"].dtype == torch.uint8 for x in seen)
    assert not seen[0]["rgb"].equal(seen[1]["rgb"])


def count_encoded(network: Vision) -> list[int]:
    """The images of each call of the encoder from now on."""
    counts: list[int] = []
    encoder = network.get_submodule("backbone")
    assert isinstance(encoder, VitEncoder)
    encoder.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    return counts


def test_images_are_encoded_once_per_decision_and_network(tmp_path: Path) -> None:
    """Sampling: once per chain and network. The update: once per pair by the actor, per decision by the critic."""
    built = trainer(fine_tuning("diffusion_vision_mlp", tmp_path, batch_size=24, update_epochs=1, augment=False))
    learner: Any = built.algorithm
    assert built.collector is not None
    base, tuned, values = (
        count_encoded(network) for network in (learner.policy.actor, learner.policy.actor_ft, learner.critic)
    )
    built.collector.collect(learner.buffer)
    assert base == tuned == [3] * 4
    tuned.clear()
    learner._prepare()
    values.clear()
    learner.minibatch(learner._prepare(), torch.arange(24) // 2, torch.arange(24) % 2, (), torch.zeros(()))
    assert tuned == [24]
    assert values[-1] == 12


CAN = {"cond_dim": 9, "image_shapes": {"rgb": (1, 3, 96, 96)}, "residual_style": True}
"""The sizes of the reference's configuration of the task Can, from images."""


def can_policy() -> DiffusionPolicy:
    network = VisionDiffusionMLP(**CAN, action_dim=7, horizon_steps=4, time_dim=32, mlp_dims=[512] * 3)
    return DiffusionPolicy(network, DiffusionConfig(100, ddim_steps=5, ft_denoising_steps=5), 4, 7)


def test_a_chain_of_the_can_task_costs_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference runs both networks at all 5 steps, and with each the encoder."""
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")  # which is counted
    policy = can_policy()
    obs = {"state": torch.zeros(1, 1, 9), "rgb": torch.zeros(1, 1, 3, 96, 96, dtype=torch.uint8)}
    mega = []
    for run in (lambda: policy.act(obs), lambda: policy.actor(torch.zeros(1, 4, 7), torch.zeros(1), obs)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        mega.append(counter.get_total_flops() / 1e6)
    chain, network = mega
    assert chain == pytest.approx(127, abs=1)
    assert 2 * 5 * network == pytest.approx(1223, abs=10)


def test_the_can_task_fits_in_16_gib() -> None:
    """300 decisions of 50 envs, each with an image; 500 pairs at once."""
    config = DPPOConfig(batch_size=7500, microbatch_size=500, augment=True)
    critic = ViTCritic(**CAN, mlp_dims=[256] * 3)
    learner, shapes = (
        DPPO(can_policy(), critic, config, RolloutBuffer(300, 50)),
        {"state": (1, 9), "rgb": (1, 3, 96, 96)},
    )
    sizes = learner.memory(shapes)
    decision = 3 * 96 * 96 + 4 * 9 + 4 * (6 * 4 * 7 + 5)  # image, state, points of the chain and their log-probs
    assert sizes["rollout"] == 300 * 50 * decision
    assert sizes["activations of 500 pairs"] < 500 * 4e6
    assert sum(sizes.values()) < 2.5e9


@pytest.mark.parametrize("network", ["diffusion_vision_unet", "gmm_vision_mlp"])
def test_microbatches_of_images_sum_to_the_minibatch(network: str, tmp_path: Path) -> None:
    gradients: list[list[Tensor]] = []
    for size in (24, 5):
        learner: Any = collected(fine_tuning(network, tmp_path, microbatch_size=size)).algorithm
        parts = learner.policy.decisions
        view: Batch = learner._views(learner._prepare())[0]
        pair = torch.arange(12 * parts)
        learner.minibatch(view, pair // parts, pair % parts, (), torch.zeros(()))
        parameters = [*learner.policy.trained().parameters(), *learner.critic.parameters()]
        gradients.append([p.grad for p in parameters if p.grad is not None])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6)


def test_the_references_accumulation_is_for_compat_only(tmp_path: Path) -> None:
    config = fine_tuning("diffusion_vision_mlp", tmp_path, grad_accumulate=3)
    with pytest.raises(UserError, match=r"algorithm\.batch_size=24 algorithm\.microbatch_size=8"):
        trainer(config)
    learner: Any = collected(config | {"compat": "reference"}).algorithm
    assert [learner.due(9, index) for index in range(4)] == [(), (), ("actor", "critic"), ()]
    batch, row, k = learner._prepare(), torch.arange(8) // 2, torch.arange(8) % 2
    gradients = []
    for _ in range(2):
        learner.minibatch(batch, row, k, learner.due(9, 0), torch.zeros(()))
        gradients.append([p.grad.clone() for p in learner.critic.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": {"network": {"backbone": {"patch_size": 5}}}}, "patch_size=5"),
        ({"policy": {"network": {"image_shapes": {}}}}, "policy.network.image_shapes follows from the environment"),
        ({"policy": {"network": {"img_cond_steps": 3}}}, "img_cond_steps=3 must lie between 1 and the 2"),
        ({"task": {"img_cond_steps": 0}}, "task.img_cond_steps=0 must lie in"),
        ({"env": {"id": "Hopper-v4"}}, "the observation has no images"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = OmegaConf.merge(fine_tuning("diffusion_vision_mlp", tmp_path), change)
    with pytest.raises(UserError, match=message):
        build_trainer(parse(config), tmp_path)


def test_images_to_learn_from_are_missed(tmp_path: Path) -> None:
    states = np.zeros((9, 2), np.float32)
    Trajectories(states, states, np.array([9])).save(tmp_path / "train.npz")
    config = pretraining("gaussian_vision_mlp", tmp_path / "train.npz", tmp_path)
    with pytest.raises(UserError, match="task: img_cond_steps=2: the data has no images"):
        build_trainer(parse(OmegaConf.create(config)), tmp_path)
