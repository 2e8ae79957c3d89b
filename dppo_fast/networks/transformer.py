"""Transformers that put out a Gaussian, or a mixture of them, over the action chunk.

Parameter names are the reference's, so that its checkpoints load with strict=True.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dppo_fast.networks.gaussian import GaussianNetwork
from dppo_fast.types import Obs, UserError


class Transformer(nn.Module):
    """Observation tokens [B, T_cond, cond_dim] -> an output [B, horizon, output_dim] for every step of the chunk, and
    the embeddings [B, horizon, n_emb] that it is a linear function of.

    A pre-norm decoder (Vaswani et al. 2017; Chi et al. 2023, arXiv 2303.04137, section IV-A) whose queries are learned
    positions and whose memory is the tokens, encoded by an MLP each or by ``n_cond_layers`` layers of self-attention.
    With ``causal_attn`` step t sees the steps up to t and the tokens up to t + 1. Dropout is ``p_drop_emb`` on
    embeddings and ``p_drop_attn`` in the layers.
    """

    mask: Tensor | None
    memory_mask: Tensor | None

    def __init__(
        self,
        output_dim: int,
        horizon: int,
        cond_dim: int,
        T_cond: int = 1,
        n_layer: int = 12,
        n_head: int = 12,
        n_emb: int = 768,
        p_drop_emb: float = 0.0,
        p_drop_attn: float = 0.0,
        causal_attn: bool = False,
        n_cond_layers: int = 0,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if n_emb % n_head:
            raise UserError(f"transformer_embed_dim={n_emb} must be a multiple of transformer_num_heads={n_head}")
        if activation not in ("gelu", "relu"):
            raise UserError(f"transformer_activation={activation} is unknown; choose gelu or relu")
        style: dict[str, Any] = {
            "dropout": p_drop_attn,
            "activation": activation,
            "batch_first": True,
            "norm_first": True,
        }
        self.cond_obs_emb = nn.Linear(cond_dim, n_emb)
        self.cond_pos_emb = nn.Parameter(torch.empty(1, T_cond, n_emb))
        self.encoder: nn.Module
        if n_cond_layers:
            layer = nn.TransformerEncoderLayer(n_emb, n_head, 4 * n_emb, **style)
            self.encoder = nn.TransformerEncoder(layer, n_cond_layers, enable_nested_tensor=False)
        else:
            self.encoder = nn.Sequential(nn.Linear(n_emb, 4 * n_emb), nn.Mish(), nn.Linear(4 * n_emb, n_emb))
        self.pos_emb = nn.Parameter(torch.empty(1, horizon, n_emb))
        self.drop = nn.Dropout(p_drop_emb)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(n_emb, n_head, 4 * n_emb, **style), n_layer)
        step = torch.arange(horizon)[:, None]
        hidden = {"mask": step < torch.arange(horizon), "memory_mask": step < torch.arange(T_cond) - 1}
        for name, where in hidden.items():
            additive = torch.zeros(where.shape).masked_fill(where, -torch.inf) if causal_attn else None
            self.register_buffer(name, additive)
        self.ln_f = nn.LayerNorm(n_emb)
        self.head = nn.Linear(n_emb, output_dim)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encoder(self.drop(self.cond_obs_emb(tokens) + self.cond_pos_emb))
        queries = self.drop(self.pos_emb.expand(len(tokens), -1, -1))
        embeddings = self.ln_f(self.decoder(queries, memory, tgt_mask=self.mask, memory_mask=self.memory_mask))
        return self.head(embeddings), embeddings


class DensityTransformer(GaussianNetwork):
    """A Transformer over one token, the observation's features, that gives the means, squashed to [-1, 1], and stds of
    ``num_modes`` Gaussians.
    """

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        transformer_embed_dim: int = 256,
        transformer_num_heads: int = 8,
        transformer_num_layers: int = 6,
        transformer_activation: str = "gelu",
        p_drop_emb: float = 0.0,
        p_drop_attn: float = 0.0,
        fixed_std: float | None = None,
        learn_fixed_std: bool = False,
        std_min: float = 0.01,
        std_max: float = 1.0,
        *,
        num_modes: int = 1,
    ) -> None:
        super().__init__(action_dim, horizon_steps, fixed_std, learn_fixed_std, std_min, std_max, num_modes)
        self.transformer = Transformer(
            (2 if fixed_std is None else 1) * num_modes * action_dim,
            horizon_steps,
            cond_dim,
            n_layer=transformer_num_layers,
            n_head=transformer_num_heads,
            n_emb=transformer_embed_dim,
            p_drop_emb=p_drop_emb,
            p_drop_attn=p_drop_attn,
            activation=transformer_activation,
        )

    def modes(self, obs: Obs) -> tuple[Tensor, Tensor, Tensor]:
        """Means and stds [B, M, Th * Da], and the Transformer's embeddings [B, Th, n_emb]."""
        out, embeddings = self.transformer(self.features(obs)[:, None])  # [B, Th, (1 or 2) * M * Da]
        out = out.view(*out.shape[:2], -1, self.num_modes, self.action_dim)
        mean, *logvar = out.permute(2, 0, 3, 1, 4).flatten(3).unbind()
        mean = mean.tanh()
        return mean, self.std(mean, *logvar), embeddings


class GaussianTransformer(DensityTransformer):
    """obs -> (mean, std) of a diagonal Gaussian over the action chunk, each [B, Th * Da]."""

    def forward(self, obs: Obs) -> tuple[Tensor, Tensor]:
        mean, std, _ = self.modes(obs)
        return mean.squeeze(1), std.squeeze(1)


class GMMTransformer(DensityTransformer):
    """obs -> (mean [B, M, Th * Da], std [B, M, Th * Da], logits [B, M]) of a mixture of M = ``num_modes`` Gaussians.

    The logits are a linear function of all steps' embeddings.
    """

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        num_modes: int = 5,
        transformer_embed_dim: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(action_dim, horizon_steps, cond_dim, transformer_embed_dim, **options, num_modes=num_modes)
        self.modes_head = nn.Linear(horizon_steps * transformer_embed_dim, num_modes)

    def forward(self, obs: Obs) -> tuple[Tensor, Tensor, Tensor]:
        mean, std, embeddings = self.modes(obs)
        return mean, std, self.modes_head(embeddings.flatten(1))
