"""Networks that see images: against the reference's, and what they promise beyond."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dppo_fast.networks.vision import (
    RandomShift,
    SpatialEmb,
    Vision,
    VisionDiffusionMLP,
    VisionGaussianMLP,
    VisionUnet1D,
    VitConfig,
    ViTCritic,
    VitEncoder,
    shift_images,
)
from dppo_fast.policies.diffusion import DiffusionConfig, DiffusionPolicy
from dppo_fast.types import Obs, UserError
from tests.golden_files import Case, golden_cases
from tests.golden_models import (
    Shapes,
    base_weights,
    below,
    check_gradients,
    is_vision,
    observations,
    options,
    shapes_of,
    vision_case,
    vision_network,
)
from tests.networks.test_golden_networks import backward, formula_weights, real_size, real_size_cases
from tests.networks.test_unet1d import OUT
from tests.small import seeded
from tests.tolerances import EXACT, GRADIENT

B, TH, DA, DO = 3, 4, 2, 5
TO, H, W = 2, 16, 24
SMALL = VitConfig(embed_dim=8, num_heads=2)
OPTIONS: dict[type[nn.Module], dict[str, Any]] = {
    VisionDiffusionMLP: {"action_dim": DA, "horizon_steps": TH, "time_dim": 8, "mlp_dims": (16,)},
    VisionUnet1D: {"action_dim": DA, "horizon_steps": TH, "dim": 8, "dim_mults": (1, 2)},
    VisionGaussianMLP: {"action_dim": DA, "horizon_steps": TH, "mlp_dims": (16, 16)},
    ViTCritic: {"mlp_dims": (16, 16)},
}
NETWORKS = pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)


def small(cls: type[nn.Module], cameras: Mapping[str, int] = {"rgb": 3}, **arguments: Any) -> Any:
    """A network for cameras of so many channels."""
    torch.manual_seed(0)
    shapes = {name: (TO, C, H, W) for name, C in cameras.items()}
    defaults = {"cond_dim": TO * DO, "image_shapes": shapes, "backbone": SMALL, "spatial_emb": 6, **OPTIONS[cls]}
    return cls(**{**defaults, **arguments})


def see(cameras: Mapping[str, int] = {"rgb": 3}) -> Obs:
    generator = seeded(0)
    images = {
        name: torch.randint(256, (B, TO, C, H, W), dtype=torch.uint8, generator=generator)
        for name, C in cameras.items()
    }
    return {"state": torch.randn(B, TO, DO, generator=generator), **images}


def run(network: nn.Module, obs: Obs) -> Tensor:
    """All outputs for the observation, [B, n]."""
    denoises = hasattr(network, "denoise")
    chunk = torch.randn(B, TH, DA, generator=seeded(1)), torch.arange(B)
    outputs = network(*chunk, obs) if denoises else network(obs)
    return torch.cat([out.reshape(B, -1) for out in (outputs if isinstance(outputs, tuple) else (outputs,))], dim=1)


def gradients(case: Case) -> dict[str, Tensor]:
    """Without those of biases that GroupNorm takes away again, which are rounding errors."""
    found = case.tensors("grad/")
    normed = {name.replace("embed.1.bias", "embed.0.bias") for name in found if name.endswith("embed.1.bias")}
    return {name: value for name, value in found.items() if name not in normed}


@pytest.mark.parametrize("case", golden_cases("02_vision", lambda case: "in/x" in case and "in/rgb" in case))
def test_denoising_networks(case: Case) -> None:
    network = vision_case(case)
    network.load_state_dict(case.tensors("w/"))
    x = case.tensor("in/x").requires_grad_()
    out = network(x, case.tensor("in/t"), observations(case))
    OUT.check(out, case["out"])
    backward(case, cot=out)
    check_gradients(gradients(case), network)
    GRADIENT.check(x.grad, case["gin"], "x")


@pytest.mark.parametrize("case", golden_cases("02_vision", lambda case: case.cls == "ViTCritic"))
def test_critics(case: Case) -> None:
    critic = vision_case(case)
    critic.load_state_dict(case.tensors("w/"))
    out = critic(observations(case))[:, None]
    OUT.check(out, case["out"])
    backward(case, cot=out)
    check_gradients(gradients(case), critic)


@pytest.mark.parametrize("case", golden_cases("02_vision", lambda case: case.cls == "Gaussian_VisionMLP"))
def test_gaussian_networks(case: Case) -> None:
    network = vision_case(case)
    network.load_state_dict(case.tensors("w/"))
    mean, std = network(observations(case))
    OUT.check(mean, case["out0"], "mean")
    OUT.check(std, case["out1"], "std")
    backward(case, cot0=mean, cot1=std)
    check_gradients(gradients(case), network)


@pytest.mark.parametrize("case", golden_cases("02_vision", lambda case: case.cls == "VitEncoder"))
def test_encoder(case: Case) -> None:
    backbone = case.cfg["backbone"]
    images = case.tensor("in/x")
    encoder = VitEncoder(images.shape[1:], options(VitConfig, backbone["cfg"]))
    encoder.load_state_dict(case.tensors("w/"))
    out = encoder(images)
    OUT.check(out, case["out"])
    backward(case, cot=out)
    check_gradients(gradients(case), encoder)


@pytest.mark.parametrize("case", golden_cases("02_vision", lambda case: case.cls == "SpatialEmb"))
def test_spatial_embedding(case: Case) -> None:
    arguments = case.cfg["kwargs"]
    compression = SpatialEmb(**arguments)
    compression.load_state_dict(case.tensors("w/"))
    patches = case.tensor("in/x").requires_grad_()
    out = compression(patches, case.tensor("in/prop")[:, : arguments["prop_dim"]])
    OUT.check(out, case["out"])
    backward(case, cot=out)
    check_gradients(gradients(case), compression)
    GRADIENT.check(patches.grad, case["gin"], "patches")


@pytest.mark.parametrize("case", golden_cases("02_vision", lambda case: "shift" in case))
def test_shifted_images(case: Case) -> None:
    out = shift_images(case.tensor("in"), case.tensor("shift").flatten(1) - 4)
    EXACT.check(out, case.tensor("out").round())  # theirs interpolates at whole pixels


@pytest.mark.parametrize("case", real_size_cases(is_vision))
def test_real_size(case: Case) -> None:
    shapes = real_size(case)
    style: dict[str, Any] = {"activation_type": "Mish"}
    if "time_mlp.1.weight" in shapes:
        style |= {"n_groups": 8, "groupnorm_eps": 1e-5}
    network = vision_network(shapes, *case["in/x"].shape[1:], **style)
    network.load_state_dict(formula_weights(shapes))
    with torch.no_grad():
        out = network(case.tensor("in/x"), case.tensor("in/t"), observations(case))
    OUT.check(out, case["out"])
    assert sum(p.numel() for p in network.parameters()) == case["n_params"]


def shapes_in(case: Case) -> Shapes:
    names, shapes = case["names"], case["shapes"]
    return {str(name): tuple(json.loads(str(shape))) for name, shape in zip(names, shapes, strict=True)}


@pytest.mark.parametrize(
    "case", golden_cases("13_state_dict_names", lambda case: is_vision(base_weights(shapes_in(case))), array="names")
)
def test_parameters_of_the_references_configurations(case: Case) -> None:
    shapes = shapes_in(case)
    parts = [base_weights(shapes), *(below(shapes, part) for part in ("actor_ft.", "critic."))]
    for part in filter(None, parts):
        horizon_steps = 4
        outputs = part["mlp_mean.layers.2.weight"][0] if "mlp_mean.layers.2.weight" in part else 0
        network = vision_network(part, horizon_steps, outputs // horizon_steps)
        assert shapes_of(network.state_dict()) == part


@NETWORKS
@pytest.mark.parametrize(
    ("cameras", "arguments"),
    [
        ({"rgb": 3}, {}),
        ({"rgb": 3}, {"spatial_emb": 0, "visual_feature_dim": 7, "img_cond_steps": TO}),
        ({"front": 3, "wrist": 3, "side": 3}, {"spatial_emb": 0, "visual_feature_dim": 7}),
        ({"depth": 1}, {"backbone": VitConfig(embed_dim=8, num_heads=1, depth=2, patch_size=4, embed_style="embed1")}),
        ({"rgb": 6}, {"num_img": 1}),
    ],
    ids=str,
)
def test_every_parameter_takes_part(
    cls: type[nn.Module], cameras: Mapping[str, int], arguments: dict[str, Any]
) -> None:
    network = small(cls, cameras, **arguments)
    out = run(network, see(cameras))
    out.square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


@pytest.mark.parametrize("spatial_emb", [0, 6])
@pytest.mark.parametrize("cls", [VisionDiffusionMLP, VisionUnet1D], ids=lambda cls: cls.__name__)
def test_the_images_embedding_sees_the_encoded_state(cls: type[nn.Module], spatial_emb: int) -> None:
    network = small(cls, {"rgb": 6}, cond_mlp_dims=(12, 7), spatial_emb=spatial_emb)
    assert run(network, see({"rgb": 6})).shape == (B, TH * DA)
    assert network.compress1 is not network.compress2
    if spatial_emb:
        assert network.compress1.input_proj[0].in_features == 2 + 7  # patches of 16 x 24 pixels, and cond_mlp's output


@NETWORKS
def test_only_the_last_images_are_seen(cls: type[nn.Module]) -> None:
    network, obs = small(cls), see()
    out = run(network, obs)
    for step, changes in ((0, False), (1, True)):
        other = obs["rgb"].clone()
        other[:, step] = 255 - other[:, step]
        assert torch.equal(run(network, {**obs, "rgb": other}), out) != changes


@NETWORKS
@pytest.mark.parametrize("cameras", [{"rgb": 3}, {"front": 3, "wrist": 3}], ids=str)
def test_the_images_history_may_be_shorter_than_the_states(cls: type[nn.Module], cameras: Mapping[str, int]) -> None:
    """Of one camera, or of each of two."""
    network, obs = small(cls, cameras), see(cameras)
    for camera in cameras:
        assert torch.equal(run(network, {**obs, camera: obs[camera][:, -1:]}), run(network, obs))


@NETWORKS
@pytest.mark.parametrize("img_cond_steps", [1, TO])
def test_cameras_may_share_a_key(cls: type[nn.Module], img_cond_steps: int) -> None:
    cameras = {"front": 3, "wrist": 3}
    apart = small(cls, cameras, img_cond_steps=img_cond_steps)
    together = small(cls, {"rgb": 6}, img_cond_steps=img_cond_steps)
    obs = see(cameras)
    joined = {"state": obs["state"], "rgb": torch.cat([obs["front"], obs["wrist"]], dim=2)}
    assert torch.equal(run(apart, obs), run(together, joined))
    swapped = {"state": obs["state"], "front": obs["wrist"], "wrist": obs["front"]}
    assert not torch.equal(run(apart, swapped), run(apart, obs))


@pytest.mark.parametrize("cls", [VisionDiffusionMLP, VisionUnet1D], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("ft_steps", [3, 4])
def test_images_are_encoded_once_per_chain(cls: type[nn.Module], ft_steps: int) -> None:
    policy = DiffusionPolicy(small(cls), DiffusionConfig(denoising_steps=4, ft_denoising_steps=ft_steps), TH, DA)
    seen: list[int] = []
    for network in (policy.actor, policy.actor_ft):
        network.backbone.register_forward_hook(lambda module, images, out: seen.append(len(out)))
    policy.act(see())
    assert seen == [B] * (2 if ft_steps < 4 else 1)


def padded(images: Tensor, dx: int, dy: int, pad: int) -> Tensor:
    """Images [n, H, W] cut out of themselves with their borders repeated."""
    larger = F.pad(images[None].float(), (pad,) * 4, "replicate")[0]
    return larger[:, pad + dy : pad + dy + images.shape[1], pad + dx : pad + dx + images.shape[2]]


def test_shifts_of_images_that_are_not_square() -> None:
    images = see()["rgb"]
    shift = torch.tensor([[3, -1], [0, 0], [-7, 20]])
    out = shift_images(images, shift)
    assert out.dtype == torch.uint8
    for ours, image, (dx, dy) in zip(out, images, shift.tolist(), strict=True):
        EXACT.check(ours.flatten(0, 1), padded(image.flatten(0, 1), dx, dy, pad=20))


def test_random_shifts() -> None:
    """One shift per sample and key, uniform over all; repeatable; the state and the given images stay."""
    position = torch.stack(torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")).to(torch.uint8)
    images = position.expand(4000, 2, 2, 9, 9)
    obs = {"state": torch.zeros(4000, 1, DO), "left": images, "right": images}
    augmented = RandomShift(pad=2)(obs, seeded(0))
    assert augmented["state"] is obs["state"]
    assert torch.equal(obs["left"][0, 0], position)
    (left, right), again = (augmented[name] for name in ("left", "right")), RandomShift(pad=2)(obs, seeded(0))
    assert torch.equal(left, again["left"])
    assert torch.equal(left[:, 0], left[:, 1])
    assert not torch.equal(left, right)
    shifts = left[:, 0, :, 4, 4].long() - 4
    counts = torch.bincount((shifts + 2) @ torch.tensor([5, 1]), minlength=25)
    assert counts.min() > 100  # 160 expected
    assert counts.max() < 220


@NETWORKS
@pytest.mark.parametrize(
    ("cameras", "arguments", "message"),
    [
        ({}, {}, "the observation has no images"),
        ({"rgb": 3}, {"img_cond_steps": 3}, "img_cond_steps=3 must lie between 1 and the 2 steps"),
        ({"rgb": 3}, {"img_cond_steps": 0}, "img_cond_steps=0 must lie"),
        ({"rgb": 6}, {"num_img": 4}, "num_img=4 must divide the 6 channels"),
        ({"rgb": 3}, {"num_img": 0}, "num_img=0 must divide"),
        ({"rgb": 4}, {}, "the images have 4 channels, not a multiple of 3; set num_img"),
        ({"rgb": 3}, {"spatial_emb": 1}, "spatial_emb=1 must be 0 or at least 2"),
        ({"rgb": 3}, {"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"rgb": 3}, {"image_shapes": {"a": (1, 3, 16, 16), "b": (1, 3, 16, 24)}}, "must be of one size"),
        ({"rgb": 3}, {"image_shapes": {"a": (1, 3, 16, 20)}}, "16 x 20 pixels: .* multiples of .*patch_size=8 and at"),
        ({"rgb": 3}, {"image_shapes": {"a": (1, 3, 16, 8)}}, "16 x 8 pixels: both sides .* at least 16"),
    ],
    ids=str,
)
def test_bad_arguments(cls: type[Vision], cameras: Mapping[str, int], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(cls, cameras, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "backbone.num_heads=3 must divide backbone.embed_dim=128"),
        ({"embed_style": "embed3"}, "backbone.embed_style=embed3 is unknown; choose embed1 or embed2"),
        ({"patch_size": 5}, "backbone.patch_size=5 must be even"),
        ({"depth": 0}, "backbone.depth=0 must lie in"),
    ],
)
def test_bad_encoders(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VitEncoder((3, H, W), VitConfig(**arguments))
