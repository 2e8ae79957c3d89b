"""Multi-layer perceptrons: plain and residual trunks, the denoising network and the Gaussian policy network.

Parameter names are the reference's, so that its checkpoints load with strict=True.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dppo_fast.kernels._memo import Memo
from dppo_fast.kernels.mlp_chain import ACTIVATIONS as OP_ACTIVATIONS
from dppo_fast.kernels.mlp_chain import MLPStep
from dppo_fast.networks.embed import SinusoidalPosEmb, activation
from dppo_fast.networks.gaussian import GaussianNetwork
from dppo_fast.types import Obs, UserError


class MLP(nn.Module):
    """Linear, [LayerNorm], [dropout], activation, ...; on the last layer no dropout, nor norm unless ``norm_last``.

    ``dims`` lists all widths, input and output included.
    """

    def __init__(
        self,
        dims: Sequence[int],
        activation_type: str = "Tanh",
        out_activation_type: str = "Identity",
        use_layernorm: bool = False,
        norm_last: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.moduleList = nn.ModuleList()
        for i, (n_in, n_out) in enumerate(pairwise(dims)):
            last = i == len(dims) - 2
            layer = nn.Sequential()
            layer.add_module("linear_1", nn.Linear(n_in, n_out))
            if use_layernorm and (norm_last or not last):
                layer.add_module("norm_1", nn.LayerNorm(n_out))
            if dropout and not last:
                layer.add_module("dropout_1", nn.Dropout(dropout))
            layer.add_module("act_1", activation(out_activation_type if last else activation_type))
            self.moduleList.append(layer)

    @property
    def first(self) -> nn.Linear:
        """The layer that sees the input; ``forward(x) == rest(first(x))``."""
        layers: Any = self.moduleList
        linear: nn.Linear = next(iter(layers)).linear_1
        return linear

    @property
    def linears(self) -> list[nn.Linear]:
        """All linear layers in the order in which they are applied."""
        layers: Any = self.moduleList
        return [layer.linear_1 for layer in layers]

    def rest(self, h: Tensor) -> Tensor:
        for module in list(self.moduleList[0].children())[1:]:
            h = module(h)
        for layer in self.moduleList[1:]:
            h = layer(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


class ResidualBlock(nn.Module):
    """x + l2(act(norm2(l1(act(norm1(x)))))) (pre-activation, He et al. 2016)."""

    def __init__(self, width: int, activation_type: str, use_layernorm: bool) -> None:
        super().__init__()
        self.l1 = nn.Linear(width, width)
        self.l2 = nn.Linear(width, width)
        self.act = activation(activation_type)
        if use_layernorm:
            self.norm1 = nn.LayerNorm(width, eps=1e-6)
            self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.use_layernorm = use_layernorm

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm1(x) if self.use_layernorm else x)
        h = self.l1(h)
        h = self.act(self.norm2(h) if self.use_layernorm else h)
        out: Tensor = x + self.l2(h)
        return out


class ResidualMLP(nn.Module):
    """Linear in, one residual block per two hidden layers, Linear out. The width is ``dims[1]``."""

    def __init__(
        self,
        dims: Sequence[int],
        activation_type: str = "Mish",
        out_activation_type: str = "Identity",
        use_layernorm: bool = False,
    ) -> None:
        super().__init__()
        width, hidden = dims[1], len(dims) - 3
        if hidden % 2:
            raise UserError(f"mlp_dims with residual_style=true needs an odd number of entries, got {list(dims[1:-1])}")
        blocks = [ResidualBlock(width, activation_type, use_layernorm) for _ in range(hidden // 2)]
        self.layers = nn.ModuleList(
            [nn.Linear(dims[0], width), *blocks, nn.Linear(width, dims[-1]), activation(out_activation_type)]
        )

    @property
    def first(self) -> nn.Linear:
        """The layer that sees the input; ``forward(x) == rest(first(x))``."""
        layers: Any = self.layers
        linear: nn.Linear = next(iter(layers))
        return linear

    @property
    def linears(self) -> list[nn.Linear]:
        """All linear layers in the order in which they are applied."""
        layers: Any = self.layers
        first, *blocks, last, _ = layers
        return [first, *(linear for block in blocks for linear in (block.l1, block.l2)), last]

    def rest(self, h: Tensor) -> Tensor:
        for layer in self.layers[1:]:
            h = layer(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


def trunk(
    dims: Sequence[int],
    activation_type: str,
    out_activation_type: str = "Identity",
    use_layernorm: bool = False,
    residual_style: bool = False,
    norm_last: bool = False,
    dropout: float = 0.0,
) -> MLP | ResidualMLP:
    """The plain or the residual MLP over ``dims``; the latter has no norm on its output, and no dropout."""
    if not residual_style:
        return MLP(dims, activation_type, out_activation_type, use_layernorm, norm_last, dropout)
    if dropout:
        raise UserError(f"dropout={dropout} needs residual_style=false")
    return ResidualMLP(dims, activation_type, out_activation_type, use_layernorm)


class DiffusionMLP(nn.Module):
    """Denoising network: (x_t, t, obs) -> eps or x0, by an MLP over [x_t, time embedding, observation].

    Its first layer is split by columns, W [x; tau; c] + b = Wx x + Wt tau + (Wc c + b): the observation part is
    computed once per chain (``encode_obs``), the time part once per denoising step for the whole batch
    (``time_table``), and only ``denoise`` runs at every step. ``visual_dim`` is what a subclass's ``features`` adds.
    """

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        time_dim: int = 16,
        mlp_dims: Sequence[int] = (256, 256),
        cond_mlp_dims: Sequence[int] | None = None,
        activation_type: str = "Mish",
        out_activation_type: str = "Identity",
        use_layernorm: bool = False,
        residual_style: bool = False,
        *,
        visual_dim: int = 0,
    ) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(
            SinusoidalPosEmb(time_dim), nn.Linear(time_dim, time_dim * 2), nn.Mish(), nn.Linear(time_dim * 2, time_dim)
        )
        self.cond_mlp = MLP([cond_dim, *cond_mlp_dims], activation_type) if cond_mlp_dims else None
        state_dim = cond_mlp_dims[-1] if cond_mlp_dims else cond_dim
        self.action_shape = (horizon_steps, action_dim)
        self.sizes = (horizon_steps * action_dim, time_dim, visual_dim + state_dim)
        dims = [sum(self.sizes), *mlp_dims, horizon_steps * action_dim]
        self.mlp_mean = trunk(dims, activation_type, out_activation_type, use_layernorm, residual_style)
        self.activation_type = activation_type
        self.parts: Memo[tuple[MLPStep, Tensor]] = Memo()
        known = activation_type in OP_ACTIVATIONS and out_activation_type == "Identity"
        self.fusible = known and not use_layernorm

    def features(self, obs: Obs) -> Tensor:
        """What the network sees of the observation: the flattened state, through ``cond_mlp`` where there is one."""
        state = obs["state"].flatten(1)
        return state if self.cond_mlp is None else self.cond_mlp(state)

    def encode_obs(self, obs: Obs) -> Tensor:
        """The observation's share of the first layer, bias included: [B, H]."""
        first = self.mlp_mean.first
        return F.linear(self.features(obs), self._columns(first, 2), first.bias)

    def time_table(self, t: Tensor) -> Tensor:
        """The time's share of the first layer for timesteps ``t`` [n]: [n, H]."""
        return F.linear(self.time_embedding(t), self._columns(self.mlp_mean.first, 1))

    def denoise(self, x: Tensor, time: Tensor, obs: Tensor) -> Tensor:
        """x [B, Th, Da], a row or rows of ``time_table`` [H] or [B, H], ``encode_obs`` [B, H] -> [B, Th, Da]."""
        h = torch.addmm(obs + time, x.flatten(1), self._columns(self.mlp_mean.first, 0).t())
        return self.mlp_mean.rest(h).view(-1, *self.action_shape)

    def step(self, t: Tensor) -> tuple[MLPStep, Tensor] | None:
        """What ``denoise`` computes and ``time_table(t)``, for the op that runs a whole chain; None where ``denoise``
        has more than that op knows.
        """
        if not self.fusible:
            return None
        layers: Any = self.time_embedding
        (first, *others), (embedding, one, _, two) = self.mlp_mean.linears, layers
        pairs = tuple((linear.weight, linear.bias) for linear in others)
        sources = (first.weight, *chain(*pairs), one.weight, one.bias, two.weight, two.bias, embedding.frequency, t)

        def part() -> tuple[MLPStep, Tensor]:
            residual = isinstance(self.mlp_mean, ResidualMLP)
            return MLPStep(self._columns(first, 0), pairs, self.activation_type, residual), self.time_table(t)

        return self.parts(sources, part)

    def forward(self, x: Tensor, t: Tensor, obs: Obs) -> Tensor:
        """x [B, Th, Da], t [B] -> [B, Th, Da]."""
        return self.denoise(x, self.time_table(t), self.encode_obs(obs))

    def _columns(self, first: nn.Linear, part: int) -> Tensor:
        return first.weight.narrow(1, sum(self.sizes[:part]), self.sizes[part])


class GaussianMLP(GaussianNetwork):
    """obs -> (mean, std) of a diagonal Gaussian over the action chunk, each [B, Th * Da].

    With ``fixed_std=None`` the log-variance is the output of a second head on the mean's trunk, squashed to its range
    by tanh, or, without ``shared_trunk``, of an MLP of its own. ``visual_dim`` is what a subclass's ``features`` adds.
    """

    def __init__(
        self,
        action_dim: int,
        horizon_steps: int,
        cond_dim: int,
        mlp_dims: Sequence[int] = (256, 256, 256),
        activation_type: str = "Mish",
        tanh_output: bool = True,
        residual_style: bool = False,
        use_layernorm: bool = False,
        dropout: float = 0.0,
        fixed_std: float | None = None,
        learn_fixed_std: bool = False,
        std_min: float = 0.01,
        std_max: float = 1.0,
        *,
        visual_dim: int = 0,
        shared_trunk: bool = True,
    ) -> None:
        super().__init__(action_dim, horizon_steps, fixed_std, learn_fixed_std, std_min, std_max)
        self.tanh_output = tanh_output
        n_out = action_dim * horizon_steps
        dims = [visual_dim + cond_dim, *mlp_dims]
        self.shared_trunk = shared_trunk and fixed_std is None
        style: dict[str, Any] = {"use_layernorm": use_layernorm, "residual_style": residual_style, "dropout": dropout}
        self.mlp_mean: MLP | ResidualMLP
        if self.shared_trunk:
            self.mlp_base = trunk(dims, activation_type, activation_type, norm_last=True, **style)
            self.mlp_mean = MLP([mlp_dims[-1], n_out])
            self.mlp_logvar = MLP([mlp_dims[-1], n_out])
        else:
            self.mlp_mean = trunk([*dims, n_out], activation_type, **style)
            if fixed_std is None:
                self.mlp_logvar = MLP([dims[0], dims[-1], n_out], activation_type, use_layernorm=use_layernorm)

    def forward(self, obs: Obs) -> tuple[Tensor, Tensor]:
        hidden = self.features(obs)
        if self.shared_trunk:
            hidden = self.mlp_base(hidden)
        mean = self.mlp_mean(hidden)
        if self.tanh_output:
            mean = mean.tanh()
        logvar = None if self.fixed_std is not None else self.mlp_logvar(hidden)
        if logvar is not None and self.shared_trunk:
            logvar = self.logvar_min + 0.5 * (self.logvar_max - self.logvar_min) * (logvar.tanh() + 1)
        return mean, self.std(mean, logvar)
