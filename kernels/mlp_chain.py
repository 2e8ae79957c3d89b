"""The denoising chain of an MLP policy: all S steps of all B samples at once.

With x [B, A] the noisy chunk (A = Th Da), the network's first layer split into the columns of x and the rest, which
does not depend on it (`MLPStep`), and the step's formulas in `dppo_fast.kernels.denoise_step`:

    h     = Wx x + time_k + obs               [B, H]
    plain:      h <- W act(h) + b             for every further layer
    residual:   h <- h + W2 act(W1 act(h) + b1) + b2    for every block, then W h + b
    x, lp = denoise_step(h, x, noise_{k+1}, table_k, std_k)

From step ``first`` on, the F = S - first scored steps, the chain records x before and after each step and the log-prob
of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dppo_fast.kernels._dispatch import Backend, check_tensor, resolve
from dppo_fast.kernels.denoise_step import Coefficients, chunk_log_prob, denoise_step, gaussian_log_density
from dppo_fast.kernels.mlp_step import Precision, mlp_chain_triton
from dppo_fast.runtime.native import native

PRECISIONS = get_args(Precision)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "ReLU": F.relu,
    "ELU": F.elu,
    "GELU": F.gelu,
    "Tanh": torch.tanh,
    "Mish": F.mish,
    "Softplus": F.softplus,
}


@dataclass(frozen=True, eq=False)
class MLPStep:
    """What a denoising MLP computes at every step: everything from x on, given the rest of its first layer's sum.

    ``first`` [H, A]: the first layer's columns for x, possibly a view. ``layers``: weight [n_out, n_in] and bias
    [n_out] of each further layer; with ``residual`` two per block, then the last. No norms, and no activation after
    the last layer. The weights are data: the C++ extension keeps its copy of them from the first time that it runs.

    Raises ValueError for an unknown activation or layers that do not fit together.
    """

    first: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]
    activation: str
    residual: bool

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"MLPStep: activation={self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if not self.layers or (self.residual and len(self.layers) % 2 == 0):
            wanted = "an odd number" if self.residual else "at least one"
            raise ValueError(f"MLPStep: {len(self.layers)} layers after the first, expected {wanted}")
        hidden, actions = self.first.shape
        widths = [hidden, *(weight.shape[0] for weight, _ in self.layers)]
        if self.residual:
            widths = [hidden] * len(self.layers) + widths[-1:]
        widths[-1] = actions
        device = self.first.device
        for i, ((weight, bias), (n_in, n_out)) in enumerate(zip(self.layers, pairwise(widths), strict=True)):
            check_tensor("MLPStep", f"layers[{i}] weight", weight, (n_out, n_in), (self.first.dtype,), device)
            check_tensor("MLPStep", f"layers[{i}] bias", bias, (n_out,), (self.first.dtype,), device)

    @cached_property
    def packed(self) -> Any:
        """The weights as the extension reads them."""
        module = native()
        assert module is not None
        layers = [(_matrix(self.first), None), *((_matrix(weight), _rows(bias)) for weight, bias in self.layers)]
        return module.PackedMLP(layers, self.activation, self.residual)

    def __call__(self, x: Tensor, added: Tensor) -> Tensor:
        """x [B, A] and the rest of the first layer's sum [B, H] -> the network's output [B, A]."""
        act = ACTIVATIONS[self.activation]
        h = x @ self.first.t() + added
        if not self.residual:
            for layer in self.layers:
                h = F.linear(act(h), *layer)
            return h
        for one, two in zip(self.layers[:-1:2], self.layers[1::2], strict=True):
            h = h + F.linear(act(F.linear(act(h), *one)), *two)
        return F.linear(h, *self.layers[-1])


@dataclass(frozen=True, eq=False)
class MLPSegment:
    """A stretch of n steps that one network denoises: its first layer's sums over the time [n, H] and over the
    observation, bias included, [B, H]. ``precision`` is that of its products with Triton.

    Raises ValueError for an unknown precision.
    """

    network: MLPStep
    time: Tensor
    obs: Tensor
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"MLPSegment: precision={self.precision!r}, expected one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class ChainOptions:
    """Symmetric bounds, None for none: on a step's predictions (``x0_clip``, ``eps_clip``), its draw (``noise_clip``)
    and the last x (``action_clip``). The steps from ``first`` on are scored, with a std of at least ``min_std``, over
    the first ``scored`` elements of the chunk; None scores no step.
    """

    x0_clip: float | None = None
    eps_clip: float | None = None
    noise_clip: float | None = None
    action_clip: float | None = None
    first: int | None = None
    scored: int = 1
    min_std: float = 0.0


Chain: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]
"""The last x [B, A]; if steps are scored, also the points [B, F + 1, A] around them and their log-probs [B, F]."""


def mlp_chain_reference(
    segments: Sequence[MLPSegment], noise: Tensor, table: Tensor, std: Tensor, options: ChainOptions
) -> Chain:
    """`mlp_chain` in plain PyTorch: the specification."""
    x, draws = noise[0], noise[1:]
    if options.noise_clip is not None:
        draws = draws.clamp(-options.noise_clip, options.noise_clip)
    first = len(std) if options.first is None else options.first
    points, log_probs = [x], []
    steps = ((segment, time) for segment in segments for time in segment.time)
    for k, (segment, time) in enumerate(steps):
        row = Coefficients(*table[k])
        out_clip = options.action_clip if k == len(std) - 1 else None
        eps = segment.network(x, time + segment.obs)
        x, mean = denoise_step(eps, x, draws[k], row, std[k], options.x0_clip, options.eps_clip, out_clip)
        points.append(x)
        if k >= first:
            density = gaussian_log_density(x, mean, row.std.clamp(min=options.min_std))
            log_probs.append(chunk_log_prob(density[:, : options.scored, None], options.scored))
    if options.first is None:
        return x, None, None
    return x, torch.stack(points[first:], 1), torch.stack(log_probs, 1)


def _matrix(weight: Tensor) -> Any:
    return (weight if weight.stride(1) == 1 else weight.contiguous()).detach().numpy()


def _rows(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _mlp_chain_native(
    segments: Sequence[MLPSegment], noise: Tensor, table: Tensor, std: Tensor, options: ChainOptions
) -> Chain:
    module = native()
    assert module is not None
    first = std.shape[0] if options.first is None else options.first
    action, points, log_prob = module.mlp_chain(
        [(part.network.packed, _rows(part.time), _rows(part.obs)) for part in segments],
        *map(_rows, (noise, table, std)),
        *(math.inf if clip is None else clip for clip in (options.x0_clip, options.noise_clip, options.action_clip)),
        options.eps_clip,
        first,
        options.scored,
        options.min_std,
        torch.get_num_threads(),
    )
    if options.first is None:
        return torch.from_numpy(action), None, None
    return torch.from_numpy(action), torch.from_numpy(points), torch.from_numpy(log_prob)


@torch.no_grad()
def mlp_chain(
    segments: Sequence[MLPSegment],
    noise: Tensor,
    table: Tensor,
    std: Tensor,
    options: ChainOptions,
    backend: Backend | None = None,
) -> Chain:
    """Denoise ``noise[0]``, using draw ``noise[k + 1]`` at step k.

    ``segments``: the chain's stretches in the order of sampling; their steps add up to S, and empty ones may be left
    out. ``noise`` [S + 1, B, A], standard normal. ``table`` [S, 7]: a row of `Coefficients` per step. ``std`` [S]: the
    sampling std. All are of one dtype and on one device. The fast backends are for float32, C++ on the CPU; there, a
    sample's result does not depend on the samples it comes with, to the last bit.

    Returns the last x [B, A] and, if steps are scored, the points [B, F + 1, A] before and after each of them and their
    log-probs [B, F].

    Raises TypeError for another dtype, ValueError for another shape, device or ``options.first``, and what ``resolve``
    raises.
    """
    if noise.ndim != 3:
        raise ValueError(f"mlp_chain: noise has shape {tuple(noise.shape)}, expected [S + 1, B, A]")
    S, B, A = noise.shape[0] - 1, *noise.shape[1:]
    dtypes, device = (noise.dtype,), noise.device
    check_tensor("mlp_chain", "noise", noise, noise.shape, (torch.float32, torch.float64), device)
    check_tensor("mlp_chain", "table", table, (S, 7), dtypes, device)
    check_tensor("mlp_chain", "std", std, (S,), dtypes, device)
    for i, part in enumerate(segments):
        H, n = part.network.first.shape[0], part.time.shape[0]
        check_tensor("mlp_chain", f"segments[{i}].network.first", part.network.first, (H, A), dtypes, device)
        check_tensor("mlp_chain", f"segments[{i}].time", part.time, (n, H), dtypes, device)
        check_tensor("mlp_chain", f"segments[{i}].obs", part.obs, (B, H), dtypes, device)
    total = sum(part.time.shape[0] for part in segments)
    if S < 1 or total != S:
        raise ValueError(f"mlp_chain: the segments have {total} steps, noise is for {S}")
    if options.first is not None and not (0 <= options.first < S and 1 <= options.scored <= A):
        raise ValueError(
            f"mlp_chain: first={options.first} must lie in [0, {S}) and scored={options.scored} in [1, {A}]"
        )
    backends: list[Backend] = ["reference"]
    if noise.dtype == torch.float32:
        backends += ["triton", "native"] if device.type == "cpu" else ["triton"]
    chosen = resolve("mlp_chain", device, backends, backend)
    run = {"reference": mlp_chain_reference, "triton": mlp_chain_triton, "native": _mlp_chain_native}[chosen]
    return run(segments, noise, table, std, options)
