"""Networks that see images: a vision transformer over patches, its compression, and the random shifts for training.

Parameter names are the reference's, so that its checkpoints load with strict=True.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dppo_fast.networks.critic import CriticObs
from dppo_fast.networks.gmm import GMMMLP
from dppo_fast.networks.mlp import DiffusionMLP, GaussianMLP
from dppo_fast.networks.unet1d import Unet1D
from dppo_fast.types import Obs, ObsShapes, UserError, require_ranges


def shift_images(images: Tensor, shift: Tensor) -> Tensor:
    """Images [B, ..., H, W] moved by whole pixels; what is uncovered repeats the border.

    Args:
        shift: [B, 2], (dx, dy) of where each pixel comes from: ``out[y, x] = images[y + dy, x + dx]``.
    """
    for dim, offset in ((-1, shift[:, 0]), (-2, shift[:, 1])):
        size = images.shape[dim]
        source = (torch.arange(size, device=images.device) + offset[:, None]).clamp(0, size - 1)  # [B, size]
        shape = [1] * images.dim()
        shape[0], shape[dim] = source.shape
        images = images.gather(dim, source.view(shape).expand_as(images))
    return images


@dataclass(frozen=True)
class RandomShift:
    """Augmentation by random shifts of up to ``pad`` pixels (Yarats et al. 2021, "Image augmentation is all you need").

    Every call draws anew: one shift per sample and key of the observation, the same for all its steps and channels.
    """

    pad: int = 4

    def __call__(self, obs: Obs, generator: torch.Generator | None = None) -> Obs:
        """``obs`` with all that is not ``state`` shifted; dtypes stay."""
        augmented = dict(obs)
        for name, images in obs.items():
            if name != "state":
                draw = torch.randint(
                    -self.pad, self.pad + 1, (len(images), 2), generator=generator, device=images.device
                )
                augmented[name] = shift_images(images, draw)
        return augmented


@dataclass(frozen=True)
class VitConfig:
    """The encoder's size. ``embed_style``: patches by one convolution (embed1), or by two whose receptive fields
    overlap (embed2), with GroupNorm between them if ``embed_norm``.
    """

    patch_size: int = 8
    depth: int = 1
    embed_dim: int = 128
    num_heads: int = 4
    embed_style: str = "embed2"
    embed_norm: bool = False

    def require_valid(self) -> None:
        """Raise UserError for a value out of range."""
        require_ranges(self, "backbone", dict.fromkeys(("patch_size", "depth", "embed_dim", "num_heads"), "[1, inf)"))
        if self.embed_style not in ("embed1", "embed2"):
            raise UserError(f"backbone.embed_style={self.embed_style} is unknown; choose embed1 or embed2")
        if self.embed_style == "embed2" and self.patch_size % 2:
            raise UserError(f"backbone.patch_size={self.patch_size} must be even for backbone.embed_style=embed2")
        if self.embed_dim % self.num_heads:
            raise UserError(f"backbone.num_heads={self.num_heads} must divide backbone.embed_dim={self.embed_dim}")


class MultiHeadAttention(nn.Module):
    """Self-attention [B, P, D] -> [B, P, D] (Vaswani et al. 2017)."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = (
            self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )  # [3, B, heads, P, D/heads]
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        return out


class TransformerLayer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)) with GELU and four times the width."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(embed_dim)
        self.mha = MultiHeadAttention(embed_dim, num_heads)
        self.layer_norm2 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.linear2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mha(self.layer_norm1(x))
        out: Tensor = x + self.linear2(F.gelu(self.linear1(self.layer_norm2(x))))
        return out


class Vit(nn.Module):
    """Vision transformer with learned positions (Dosovitskiy et al. 2021): [B, C, H, W] -> [B, P, embed_dim].

    Raises UserError for values of ``config`` out of range, and for an image whose sides are not multiples of the patch
    size, or with a side of one patch for ``embed2``.
    """

    def __init__(self, image_shape: tuple[int, int, int], config: VitConfig) -> None:
        super().__init__()
        config.require_valid()
        (C, H, W), size, D = image_shape, config.patch_size, config.embed_dim
        overlapping = config.embed_style == "embed2"
        if H % size or W % size or min(H, W) < size * (1 + overlapping):
            raise UserError(
                f"images of {H} x {W} pixels: both sides must be multiples of backbone.patch_size={size}"
                + f" and at least {2 * size}" * overlapping
            )
        if overlapping:
            norm = nn.GroupNorm(D, D) if config.embed_norm else nn.Identity()
            stem = nn.Sequential(nn.Conv2d(C, D, size, size // 2), norm, nn.ReLU(), nn.Conv2d(D, D, 3, 2))
            self.patch_embed = nn.Sequential(OrderedDict(embed=stem))
        else:
            self.patch_embed = nn.Sequential(OrderedDict(conv=nn.Conv2d(C, D, size, size)))
        self.num_patches = (H // size - overlapping) * (W // size - overlapping)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, D))
        self.net = nn.Sequential(*[TransformerLayer(D, config.num_heads) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(D)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        out: Tensor = self.norm(self.net(patches + self.pos_embed))
        return out


class VitEncoder(nn.Module):
    """Images [B, C, H, W] in 0..255, uint8 or float -> features of their patches [B, P, embed_dim]."""

    def __init__(self, image_shape: tuple[int, int, int], config: VitConfig) -> None:
        super().__init__()
        self.vit = Vit(image_shape, config)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.vit(images / 255 - 0.5)
        return out


class SpatialEmb(nn.Module):
    """Patch features [B, P, D] and the state [B, prop_dim] -> [B, proj_dim] (Hu et al. 2024, "Imitation bootstrapped
    reinforcement learning").

    Each of the D channels is a map over the patches. One linear layer over [map, state], LayerNorm and ReLU reduce it
    to proj_dim numbers, and these are summed over the channels with learned weights.
    """

    def __init__(self, num_patch: int, patch_dim: int, prop_dim: int, proj_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_proj = nn.Sequential(nn.Linear(num_patch + prop_dim, proj_dim), nn.LayerNorm(proj_dim), nn.ReLU())
        self.weight = nn.Parameter(torch.randn(1, patch_dim, proj_dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, patches: Tensor, state: Tensor) -> Tensor:
        maps = patches.transpose(1, 2)
        hidden = self.input_proj(torch.cat((maps, state[:, None].expand(-1, maps.shape[1], -1)), dim=-1))
        out: Tensor = self.dropout((self.weight * hidden).sum(1))
        return out


class LinearEmb(nn.Sequential):
    """Patch features [B, P, D] -> [B, out_dim], whatever the state: linear over all of them, LayerNorm, ReLU."""

    def __init__(self, num_patch: int, patch_dim: int, out_dim: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(num_patch * patch_dim, out_dim), nn.LayerNorm(out_dim), nn.Dropout(dropout), nn.ReLU()
        )

    def forward(self, patches: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        out = patches.flatten(1)
        for layer in self:
            out = layer(out)
        return out


class Vision(nn.Module):
    """What makes a network see images, put before its class: ``features`` become [visual features, state features].

    Observations hold images [B, To, C, H, W] uint8 under any keys. Their channels are joined in the order of
    ``image_shapes``, the last ``img_cond_steps`` steps are taken, and the channels are divided evenly among ``num_img``
    images. So one key ``rgb`` with the channels of two cameras and two keys of one camera each are the same to the
    network. All images go through one encoder; each has its own compression, which may look at the state.

    Args:
        image_shapes: key -> (To, C, H, W).
        num_img: images per step; by default one per 3 channels.
        spatial_emb: width of each image's `SpatialEmb`; with 0 a `LinearEmb` of ``visual_feature_dim`` takes its place.
        network: the arguments of the class that follows.

    Raises UserError where images and arguments do not fit together.
    """

    def __init__(
        self,
        cond_dim: int,
        image_shapes: ObsShapes,
        backbone: VitConfig = VitConfig(),
        img_cond_steps: int = 1,
        num_img: int | None = None,
        spatial_emb: int = 128,
        visual_feature_dim: int = 128,
        dropout: float = 0.0,
        **network: Any,
    ) -> None:
        if spatial_emb < 0 or spatial_emb == 1:
            raise UserError(f"spatial_emb={spatial_emb} must be 0 or at least 2")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout={dropout} must lie in [0, 1)")
        channels, num_img, size = _joined(image_shapes, img_cond_steps, num_img)
        compressed_dim = spatial_emb or visual_feature_dim
        super().__init__(cond_dim=cond_dim, visual_dim=num_img * compressed_dim, **network)
        self.cameras = tuple(image_shapes)
        self.img_cond_steps = img_cond_steps
        self.num_img = num_img
        self.backbone = VitEncoder((img_cond_steps * channels, *size), backbone)
        patches = self.backbone.vit.num_patches, backbone.embed_dim
        state_dim = (network.get("cond_mlp_dims") or [cond_dim])[-1]
        self.compressions = [f"compress{i + 1}" for i in range(num_img)] if num_img > 1 else ["compress"]
        for name in self.compressions:
            self.add_module(
                name,
                SpatialEmb(*patches, state_dim, compressed_dim, dropout)
                if spatial_emb
                else LinearEmb(*patches, compressed_dim, dropout),
            )

    def features(self, obs: Obs) -> Tensor:
        """What the network sees of the observation: the images' features, then the state's."""
        state: Tensor = super().features(obs)  # type: ignore[misc]
        joined = torch.cat([obs[camera][:, -self.img_cond_steps :] for camera in self.cameras], dim=2)
        B, steps, _, H, W = joined.shape
        images = joined.view(B, steps, self.num_img, -1, H, W).transpose(1, 2).flatten(2, 3)  # [B, num_img, C, H, W]
        patches = self.backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # [B, num_img, P, D]
        visual = [self.get_submodule(name)(patches[:, i], state) for i, name in enumerate(self.compressions)]
        return torch.cat((*visual, state), dim=-1)


def _joined(image_shapes: ObsShapes, steps: int, num_img: int | None) -> tuple[int, int, tuple[int, int]]:
    """Channels per image, number of images, and their (H, W)."""
    if not image_shapes:
        raise UserError("the observation has no images; choose a network without vision")
    shortest = min(To for To, _, _, _ in image_shapes.values())
    if not 1 <= steps <= shortest:
        raise UserError(f"img_cond_steps={steps} must lie between 1 and the {shortest} steps of the observed images")
    sizes = {(H, W) for _, _, H, W in image_shapes.values()}
    if len(sizes) > 1:
        raise UserError(f"all cameras share one encoder, so their images must be of one size: {dict(image_shapes)}")
    total = sum(C for _, C, _, _ in image_shapes.values())
    if num_img is None:
        if total != 1 and total % 3:
            raise UserError(f"the images have {total} channels, not a multiple of 3; set num_img to their number")
        num_img = max(1, total // 3)
    if num_img < 1 or total % num_img:
        raise UserError(f"num_img={num_img} must divide the {total} channels of the observed images")
    return total // num_img, num_img, sizes.pop()


class VisionDiffusionMLP(Vision, DiffusionMLP):
    """`DiffusionMLP` with images."""


class VisionUnet1D(Vision, Unet1D):
    """`Unet1D` with images."""


class VisionGaussianMLP(Vision, GaussianMLP):
    """`GaussianMLP` with images; a learned std has an MLP of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, shared_trunk=False)


class VisionGMMMLP(Vision, GMMMLP):
    """`GMMMLP` with images."""


class ViTCritic(Vision, CriticObs):
    """`CriticObs` with images."""
