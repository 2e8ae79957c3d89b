"""Standard normals that depend on what they are for and not on how they are batched.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key of two and a counter of
four 32-bit words to four random words. For environment env at its step, draw d and dimension 4 b + i of the draw:

    key     = seed mod 2^32, seed / 2^32
    counter = b, d, step mod 2^32, env mod 2^32
    u_i     = (floor(word_i / 2^9) + 1/2) 2^-23                       exact in float32, never 0 or 1
    z_0, z_1 = sqrt(-2 log u_0) (cos 2 pi u_1, sin 2 pi u_1)          Box and Muller 1958; z_2, z_3 from u_2, u_3
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dppo_fast.kernels._dispatch import Backend, check_tensor, resolve
from dppo_fast.kernels._triton import INTERPRETED, jit, row_tile, tl
from dppo_fast.runtime.native import native

WORD = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85


def philox_words(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of four, as int64 in [0, 2^32), all of one (broadcast) shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_a, low_a = _multiply(ROUND_A, c0)
        high_b, low_b = _multiply(ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + KEY_A) & WORD, (k1 + KEY_B) & WORD
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a b; the 64-bit product itself would overflow int64."""
    low, high = b * (a & 0xFFFF), b * (a >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & WORD


def keyed_normal_reference(seed: int, env: Tensor, step: Tensor, draws: int, size: int, first_draw: int = 0) -> Tensor:
    """`keyed_normal` in plain PyTorch, from draw ``first_draw`` on: the specification."""
    blocks = torch.arange(-(-size // 4), device=env.device)
    draw = torch.arange(first_draw, first_draw + draws, device=env.device)[:, None, None]
    counter = (blocks, draw, (step & WORD)[:, None], (env & WORD)[:, None])  # [draws, B, blocks] together
    words = philox_words(counter, (seed & WORD, seed >> 32))
    u0, u1, u2, u3 = (((word >> 9).double() + 0.5) * 2.0**-23 for word in words)
    pairs = [(torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v) for u, v in ((u0, u1), (u2, u3))]
    z = torch.stack([part for r, angle in pairs for part in (r * angle.cos(), r * angle.sin())], -1)
    return z.flatten(2)[..., :size].float()


if INTERPRETED or tl is None:

    @jit
    def _cos_sin(angle):  # type: ignore[no-untyped-def]
        return tl.cos(angle), tl.sin(angle)
else:

    @jit
    def _cos_sin(angle):  # type: ignore[no-untyped-def]
        """Within 2^-20 for angles in [-pi, pi], without the slow path for large ones and the local memory it needs."""
        cos = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        sin = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], tl.float32, is_pure=True, pack=1)
        return cos, sin


@jit
def _uniform(word):  # type: ignore[no-untyped-def]
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-7  # 2^-23


@jit
def _box_muller(word, other):  # type: ignore[no-untyped-def]
    radius = tl.sqrt(-2.0 * tl.log(_uniform(word)))
    cos, sin = _cos_sin(6.283185307179586 * (_uniform(other) - 0.5))  # half a turn less: both change sign
    return -radius * cos, -radius * sin


@jit
def normal_rows(seed, env, step, draw, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Draw ``draw`` of ``BLOCK`` dimensions for rows of int64 ``env`` and ``step`` [ROWS]: [ROWS, BLOCK]."""
    zero = tl.zeros([env.shape[0], BLOCK // 4], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        zero + tl.arange(0, BLOCK // 4)[None, :],
        zero + draw,
        zero + step.to(tl.int32)[:, None],
        zero + env.to(tl.int32)[:, None],
    )
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@jit(do_not_specialize=["seed"])
def _keyed_normal_kernel(  # type: ignore[no-untyped-def]
    seed, env, step, out, B, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    draw = tl.program_id(1)
    dim = tl.arange(0, BLOCK)
    inside = row < B
    z = normal_rows(
        seed, tl.load(env + row, mask=inside, other=0), tl.load(step + row, mask=inside, other=0), draw, BLOCK
    )
    offset = (draw.to(tl.int64) * B + row[:, None]) * SIZE + dim[None, :]
    tl.store(out + offset, z, mask=inside[:, None] & (dim < SIZE)[None, :])


def _keyed_normal_triton(seed: int, env: Tensor, step: Tensor, draws: int, size: int) -> Tensor:
    out = torch.empty(draws, len(env), size, device=env.device)
    tile = row_tile(size)
    grid = (-(-len(env) // tile.ROWS), draws)
    _keyed_normal_kernel[grid](seed, env.contiguous(), step.contiguous(), out, len(env), SIZE=size, **tile._asdict())
    return out


def _keyed_normal_native(seed: int, env: Tensor, step: Tensor, draws: int, size: int) -> Tensor:
    module = native()
    assert module is not None
    arrays = (x.cpu().contiguous().numpy() for x in (env, step))
    return torch.from_numpy(module.keyed_normal(seed, *arrays, draws, size)).to(env.device)


def keyed_normal(seed: int, env: Tensor, step: Tensor, draws: int, size: int, backend: Backend | None = None) -> Tensor:
    """Standard normals [draws, B, size], float32: element [d, b, i] depends on (seed, env[b], step[b], d, i) alone.

    ``env`` and ``step`` [B] are int64 on one device: an environment's number and its step, told apart modulo 2^32;
    0 <= seed < 2^64. The backends agree within 6e-6, in the last bits of logarithm, sine and cosine.

    Raises TypeError for another dtype, ValueError for another shape, device or seed, and what ``resolve`` raises.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"keyed_normal: seed={seed} must lie in [0, 2^64)")
    if env.ndim != 1:
        raise ValueError(f"keyed_normal: env has shape {tuple(env.shape)}, expected [B]")
    for name, tensor in {"env": env, "step": step}.items():
        check_tensor("keyed_normal", name, tensor, env.shape, (torch.int64,), env.device)
    chosen = resolve("keyed_normal", env.device, ("reference", "triton", "native"), backend)
    run = {"reference": keyed_normal_reference, "triton": _keyed_normal_triton, "native": _keyed_normal_native}[chosen]
    return run(seed, env, step, draws, size)
