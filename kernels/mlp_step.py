"""The denoising chain of an MLP (`dppo_fast.kernels.mlp_chain`) on a GPU, in as few kernels a step as its data allows.

A step of a residual MLP with one block is three of them, and each further block two more; before the first step goes a
head of its own:

    linear   u = act(W1 a + b1)
    linear   h <- h + W2 u + b2
    tail     eps = Wout h + bout;  x, eps -> x', log-prob;  next step's head: h = Wx x' + time + obs, a = act(h)

A step of a plain MLP is a <- act(W a + b) for every layer but the last, and the tail. The activation is taken where a
tensor is written, once per element, so that the next product has its operands straight from memory.

Products are computed in the precision asked for, sums, activations, residual stream h, steps and log-probs in float32:

    fp32      by fused multiply-adds
    tf32      from operands rounded to 11 bits
    bf16x3    from operands split into two bfloat16 each, without the product of the two small ones
    bf16      from operands rounded to bfloat16; activations between layers are stored as that
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dppo_fast.kernels._triton import INTERPRETED, clamp, jit, tl
from dppo_fast.kernels.denoise_step import NoiseKey, element_log_density, transition
from dppo_fast.kernels.philox import normal_rows

if TYPE_CHECKING:
    from dppo_fast.kernels.mlp_chain import Chain, ChainOptions, MLPSegment, MLPStep

Precision: TypeAlias = Literal["fp32", "tf32", "bf16x3", "bf16"]


@jit
def activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """torch.nn.functional's function of that name, within 2e-7 of its scale."""
    if ACTIVATION == "ReLU":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "Mish":  # x tanh(log(1 + e^x)); e^20 is as good as infinite
        e = tl.exp(tl.minimum(x, 20.0))
        n = e * (e + 2.0)
        x = x * (n / (n + 2.0))
    elif ACTIVATION == "SiLU":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "Tanh":
        e = tl.exp(-2.0 * tl.abs(x))
        x = tl.where(x < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)
    elif ACTIVATION == "GELU":
        x = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif ACTIVATION == "ELU":
        x = tl.where(x < 0.0, tl.exp(tl.minimum(x, 0.0)) - 1.0, x)
    elif ACTIVATION == "Softplus":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    return x


@jit
def _rounded(x, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 without the bits up to that of HALF, to nearest; of a NaN the sum could make a number."""
    bits = (x.to(tl.int32, bitcast=True) + HALF) & (-2 * HALF)
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


if INTERPRETED or tl is None:

    @jit
    def _bfloat16(x):  # type: ignore[no-untyped-def]
        """In float32, for the interpreter cuts bits off instead of rounding and multiplies bfloat16 as integers."""
        return _rounded(x.to(tl.float32), 0x8000)
else:

    @jit
    def _bfloat16(x):  # type: ignore[no-untyped-def]
        return x.to(tl.bfloat16)


@jit
def _operand(x, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """x as a product reads it. For tf32 too it is rounded here: the tensor cores just cut bits off, which is biased."""
    if PRECISION == "bf16":
        x = _bfloat16(x)
    elif PRECISION == "tf32":
        x = _rounded(x, 0x1000)
    return x


@jit
def _product(a, b, c, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """a b + c."""
    if PRECISION == "bf16x3":
        a_high = _bfloat16(a)
        b_high = _bfloat16(b)
        c = tl.dot(_bfloat16(a - a_high), b_high, c)
        c = tl.dot(a_high, _bfloat16(b - b_high), c)
        c = tl.dot(a_high, b_high, c)
    else:
        a = _operand(a, PRECISION)
        b = _operand(b, PRECISION)
        c = tl.dot(a, b, c, input_precision="tf32" if PRECISION == "tf32" else "ieee")
    return c


@jit
def _rows_times_weight(  # type: ignore[no-untyped-def]
    source,
    weight,
    bias,
    rows,
    columns,
    B,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """source weight^T + bias at ``rows`` and ``columns``; source [B, K] contiguous, weight [N, K]."""
    y = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(source + rows[:, None] * K + k[None, :], (rows < B)[:, None] & (k < K)[None, :], 0.0)
        at = columns[None, :] * ROW_STRIDE + k[:, None] * COLUMN_STRIDE
        w = tl.load(weight + at, (columns < N)[None, :] & (k < K)[:, None], 0.0)
        y = _product(a, w, y, PRECISION)
    return y + tl.load(bias + columns, columns < N, 0.0)[None, :]


@jit
def _store_hidden(  # type: ignore[no-untyped-def]
    h, hidden, active, offset, mask, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr
):
    """h to the residual stream and act(h), the next layer's operand, to ``active``; either may be None."""
    if hidden is not None:
        tl.store(hidden + offset, h, mask)
    if active is not None:
        tl.store(active + offset, _operand(activate(h, ACTIVATION), PRECISION), mask)


@jit
def _linear_kernel(  # type: ignore[no-untyped-def]
    source,
    weight,
    bias,
    hidden,
    active,
    B,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = _rows_times_weight(source, weight, bias, rows, columns, B, ROW_STRIDE, COLUMN_STRIDE, N, K, PRECISION, BLOCK_K)
    offset = rows[:, None] * N + columns[None, :]
    mask = (rows < B)[:, None] & (columns < N)[None, :]
    if hidden is not None:
        h += tl.load(hidden + offset, mask, 0.0)
    _store_hidden(h, hidden, active, offset, mask, ACTIVATION, PRECISION)


@jit
def _head(  # type: ignore[no-untyped-def]
    x,
    weight,
    time,
    obs,
    hidden,
    active,
    rows,
    actions,
    B,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    A: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The first layer on x, in the CHUNKS blocks of hidden units that are this program's."""
    for i in range(CHUNKS):
        columns = (tl.program_id(0) * CHUNKS + i) * BLOCK_H + tl.arange(0, BLOCK_H)
        offset = rows[:, None] * H + columns[None, :]
        mask = (rows < B)[:, None] & (columns < H)[None, :]
        h = tl.load(obs + offset, mask, 0.0) + tl.load(time + columns, columns < H, 0.0)[None, :]
        at = columns[None, :] * ROW_STRIDE + actions[:, None] * COLUMN_STRIDE
        w = tl.load(weight + at, (columns < H)[None, :] & (actions < A)[:, None], 0.0)
        _store_hidden(_product(x, w, h, PRECISION), hidden, active, offset, mask, ACTIVATION, PRECISION)


@jit
def _draw(noise, seed, env, step, draw, rows, B, offset, mask, BLOCK_A: tl.constexpr):  # type: ignore[no-untyped-def]
    """Standard normals: of ``noise`` [B, A], or where that is None draw ``draw`` of the key's."""
    if noise is None:
        inside = rows < B
        z = normal_rows(seed, tl.load(env + rows, inside, 0), tl.load(step + rows, inside, 0), draw, BLOCK_A)
        z = tl.where(mask, z, 0.0)
    else:
        z = tl.load(noise + offset, mask, 0.0)
    return z


@jit(do_not_specialize=["seed", "draw"])
def _head_kernel(  # type: ignore[no-untyped-def]
    noise,
    seed,
    env,
    step,
    draw,
    x,
    weight,
    time,
    obs,
    hidden,
    active,
    B,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    A: tl.constexpr,
    H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    rows = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    actions = tl.arange(0, BLOCK_A)
    offset = rows[:, None] * A + actions[None, :]
    mask = (rows < B)[:, None] & (actions < A)[None, :]
    z = _draw(noise, seed, env, step, draw, rows, B, offset, mask, BLOCK_A)
    if tl.program_id(0) == 0:
        tl.store(x + offset, z, mask)
    _head(
        z,
        weight,
        time,
        obs,
        hidden,
        active,
        rows,
        actions,
        B,
        ROW_STRIDE,
        COLUMN_STRIDE,
        A,
        H,
        ACTIVATION,
        PRECISION,
        BLOCK_H,
        CHUNKS,
    )


@jit(
    do_not_specialize=["seed", "draw", "k"],
    do_not_specialize_on_alignment=["noise", "x", "x_next", "log_prob"],
)
def _tail_kernel(  # type: ignore[no-untyped-def]
    source,
    out_weight,
    out_bias,
    x,
    noise,
    seed,
    env,
    step,
    draw,
    k,
    table,
    std,
    x0_clip,
    eps_clip,
    noise_clip,
    x_clip,
    min_std,
    x_next,
    log_prob,
    weight,
    time,
    obs,
    hidden,
    active,
    B,
    OUT_ROW_STRIDE: tl.constexpr,
    OUT_COLUMN_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    A: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    SCORED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # The programs of a row share out the next head's hidden units. Each of them computes the row's x', which costs
    # little beside waiting for a single one; the first stores it.
    rows = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    actions = tl.arange(0, BLOCK_A)
    offset = rows[:, None] * A + actions[None, :]
    mask = (rows < B)[:, None] & (actions < A)[None, :]
    eps = _rows_times_weight(
        source, out_weight, out_bias, rows, actions, B, OUT_ROW_STRIDE, OUT_COLUMN_STRIDE, A, K, OUT_PRECISION, BLOCK_K
    )
    x_ = tl.load(x + offset, mask, 0.0)
    z = _draw(noise, seed, env, step, draw, rows, B, offset, mask, BLOCK_A)
    row = table + k * 7
    cx, ce, m0, mx = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    row_std, sa, s = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    mean, _, _, _ = transition(eps, x_, cx, ce, sa, s, m0, mx, x0_clip, eps_clip)
    next_ = clamp(mean + tl.load(std + k) * clamp(z, noise_clip), x_clip)
    if tl.program_id(0) == 0:
        tl.store(x_next + offset, next_, mask)
        if log_prob is not None:
            density, _, _ = element_log_density(next_, mean, tl.maximum(row_std, min_std))
            total = tl.sum(tl.where((actions < SCORED)[None, :], density, 0.0), 1)
            tl.store(log_prob + rows, total / SCORED, rows < B)
    if weight is not None:
        _head(
            next_,
            weight,
            time,
            obs,
            hidden,
            active,
            rows,
            actions,
            B,
            ROW_STRIDE,
            COLUMN_STRIDE,
            A,
            H,
            ACTIVATION,
            PRECISION,
            BLOCK_H,
            CHUNKS,
        )


PROGRAMS = 108
"""An A100's multiprocessors; an H100 has 132. Fewer programs leave some idle."""


class LinearTile(NamedTuple):
    """A program of `_linear_kernel` computes BLOCK_B x BLOCK_N sums, from BLOCK_K products at a time."""

    BLOCK_B: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


LINEAR_TILES = (
    LinearTile(128, 128, 32, 8, 3),
    LinearTile(64, 128, 32, 8, 4),
    LinearTile(64, 64, 32, 4, 4),
    LinearTile(32, 64, 32, 4, 4),
    LinearTile(32, 32, 64, 4, 4),
    LinearTile(16, 32, 128, 4, 4),
    LinearTile(16, 16, 128, 4, 4),
)


def linear_tile(batch: int, width: int) -> LinearTile:
    """The largest tile that makes enough programs for ``batch`` rows of ``width``, else the smallest."""
    for tile in LINEAR_TILES:
        if _blocks(batch, tile.BLOCK_B) * _blocks(width, tile.BLOCK_N) >= PROGRAMS:
            break
    return tile


class TailTile(NamedTuple):
    """A program of `_tail_kernel` or `_head_kernel` takes BLOCK_B rows and CHUNKS times BLOCK_H hidden units."""

    BLOCK_B: int
    BLOCK_K: int
    BLOCK_H: int
    CHUNKS: int
    num_warps: int
    num_stages: int


def tail_tile(batch: int, width: int) -> TailTile:
    """Whole rows where that makes enough programs, for eps is then computed once; else as few units as it takes."""
    rows = 32 if _blocks(batch, 32) >= PROGRAMS else 16
    shares = min(_power_of_two(_blocks(PROGRAMS, _blocks(batch, rows))), _blocks(width, 32))
    units = min(max(_power_of_two(_blocks(width, shares)), 32), 64)
    return TailTile(rows, 64, units, _blocks(width, shares * units), num_warps=4, num_stages=4)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class _Step(NamedTuple):
    """What is one step's own: its network, and rows of the time [H] and of the observation [B, H]."""

    network: MLPStep
    time: Tensor
    obs: Tensor
    precision: Precision

    def operand(self, width: int) -> Tensor:
        """For activations [B, width] that a product reads."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return torch.empty(len(self.obs), width, dtype=dtype, device=self.obs.device)


def _head_arguments(step: _Step | None) -> dict[str, Any]:
    """The head of a step, and what it fills: the residual stream [B, H] and the activation of the same [B, H], if they
    are read. None, what follows the last step, has no head.
    """
    if step is None:
        pointers = dict.fromkeys(("weight", "time", "obs", "hidden", "active"))
        return pointers | {"ROW_STRIDE": 0, "COLUMN_STRIDE": 0, "H": 1, "ACTIVATION": "", "PRECISION": ""}
    network, time, obs, precision = step
    weight, residual = network.first, network.residual
    return {
        "weight": weight,
        "time": time,
        "obs": obs,
        "hidden": torch.empty(obs.shape, device=obs.device) if residual else None,
        "active": None if residual and len(network.layers) == 1 else step.operand(len(weight)),
        "ROW_STRIDE": weight.stride(0),
        "COLUMN_STRIDE": weight.stride(1),
        "H": len(weight),
        "ACTIVATION": network.activation,
        "PRECISION": precision,
    }


def _linear(
    source: Tensor, layer: tuple[Tensor, Tensor], step: _Step, hidden: Tensor | None, active: Tensor | None
) -> None:
    """``active`` = act(hidden + source W^T + b), ``hidden`` = what is under the activation, where they are given."""
    weight, bias = layer
    (N, K), B = weight.shape, len(source)
    tile = linear_tile(B, N)
    _linear_kernel[(_blocks(N, tile.BLOCK_N), _blocks(B, tile.BLOCK_B))](
        source,
        weight,
        bias.contiguous(),
        hidden,
        active,
        B,
        ROW_STRIDE=weight.stride(0),
        COLUMN_STRIDE=weight.stride(1),
        N=N,
        K=K,
        ACTIVATION=step.network.activation,
        PRECISION=step.precision,
        **tile._asdict(),
    )


def _between_head_and_tail(step: _Step, hidden: Any, active: Any) -> Any:
    """All layers but the first and the last; returns what the last one reads [B, H]."""
    *layers, _ = step.network.layers
    if not step.network.residual:
        for layer in layers:
            source, active = active, step.operand(len(layer[0]))
            _linear(source, layer, step, None, active)
        return active
    for one, two in zip(layers[::2], layers[1::2], strict=True):
        inner = step.operand(hidden.shape[1])
        _linear(active, one, step, None, inner)
        _linear(inner, two, step, hidden, None if two is layers[-1] else active)
    return hidden


def mlp_chain_triton(
    segments: Sequence[MLPSegment],
    noise: Tensor | NoiseKey,
    table: Tensor,
    std: Tensor,
    options: ChainOptions,
) -> Chain:
    """`mlp_chain` in float32, each segment's products in its own precision. A ``noise`` key stands for draws
    ``draw`` to draw + S.

    One launch and then three a step for a residual MLP with one block. None waits for the host or depends on what the
    tensors hold, so that a CUDA graph can record them. The results are views: the last x is the last of the points.
    """
    steps = [
        _Step(part.network, time, part.obs.contiguous(), part.precision)
        for part in segments
        for time in part.time.contiguous()
    ]
    S, (B, H), A = len(steps), steps[0].obs.shape, steps[0].network.first.shape[1]
    first = S if options.first is None else options.first
    path = torch.empty(S + 1, B, A, device=table.device)
    log_prob = torch.empty(S - first, B, device=table.device)
    block = max(16, _power_of_two(A))
    table, std = table.contiguous(), std.contiguous()
    if isinstance(noise, NoiseKey):
        seed, env, step, draw = noise
        draws = [{"noise": None, "seed": seed, "env": env, "step": step, "draw": draw + i} for i in range(S + 1)]
    else:
        draws = [{"noise": z, "seed": 0, "env": None, "step": None, "draw": 0} for z in noise.contiguous()]

    head = _head_arguments(steps[0])
    tile = tail_tile(B, H)
    _head_kernel[(_blocks(H, tile.BLOCK_H * tile.CHUNKS), _blocks(B, tile.BLOCK_B))](
        x=path[0],
        B=B,
        A=A,
        BLOCK_A=block,
        BLOCK_B=tile.BLOCK_B,
        BLOCK_H=tile.BLOCK_H,
        CHUNKS=tile.CHUNKS,
        num_warps=tile.num_warps,
        **draws[0],
        **head,
    )
    for k, here in enumerate(steps):
        following = steps[k + 1] if k + 1 < S else None
        source = _between_head_and_tail(here, head["hidden"], head["active"])
        weight, bias = here.network.layers[-1]
        head = _head_arguments(following)
        tile = tail_tile(B, head["H"])
        _tail_kernel[(_blocks(head["H"], tile.BLOCK_H * tile.CHUNKS), _blocks(B, tile.BLOCK_B))](
            source,
            weight,
            bias.contiguous(),
            path[k],
            k=k,
            table=table,
            std=std,
            x0_clip=options.x0_clip,
            eps_clip=options.eps_clip,
            noise_clip=options.noise_clip,
            x_clip=options.action_clip if following is None else None,
            min_std=options.min_std,
            x_next=path[k + 1],
            log_prob=log_prob[k - first] if k >= first else None,
            B=B,
            OUT_ROW_STRIDE=weight.stride(0),
            OUT_COLUMN_STRIDE=weight.stride(1),
            A=A,
            K=source.shape[1],
            SCORED=options.scored,
            OUT_PRECISION=here.precision,
            BLOCK_A=block,
            **draws[k + 1],
            **head,
            **tile._asdict(),
        )
    if options.first is None:
        return path[-1], None, None
    return path[-1], path[first:].transpose(0, 1), log_prob.t()
