"""Against `mlp_chain_reference` in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from dppo_fast.kernels import mlp_step
from dppo_fast.kernels.denoise_step import NoiseKey
from dppo_fast.kernels.mlp_chain import ACTIVATIONS, Chain, ChainOptions, MLPSegment, MLPStep, mlp_chain_reference
from dppo_fast.kernels.mlp_step import LINEAR_TILES, LinearTile, Precision, linear_tile, mlp_chain_triton, tail_tile
from dppo_fast.kernels.philox import keyed_normal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = ChainOptions(x0_clip=2.0, noise_clip=1.5, action_clip=3.0, first=1, scored=4, min_std=0.1)
PLAIN_EPS = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
"""A schedule's row that makes the network's output the mean."""


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned)


def network(
    randn: Callable[..., Tensor], actions: int, widths: list[int], activation: str = "Mish", residual: bool = True
) -> MLPStep:
    """The hidden layers' widths; with ``residual`` all the same, an odd number of them."""
    sizes = [*widths, actions]
    layers = [(randn(n_out, n_in) / n_in**0.5, randn(n_out) / 4) for n_in, n_out in pairwise(sizes)]
    first = (randn(widths[0], actions + 5) / 2)[:, :actions]
    return MLPStep(first, tuple(layers), activation, residual)


class Example:
    """The arguments of a chain: two networks, of one step and of ``steps - 1``."""

    def __init__(self, batch: int, actions: int, *networks: tuple[Any, ...], steps: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE)

        self.noise = randn(steps + 1, batch, actions)
        self.table = 0.2 + randn(steps, 7).abs() / 2
        self.std = randn(steps).abs() / 4
        self.segments = []
        for n, arguments in zip((1, steps - 1), networks, strict=True):
            net = network(randn, actions, *arguments)
            hidden = len(net.first)
            self.segments.append(MLPSegment(net, randn(n, hidden), randn(batch, hidden)))

    def run(
        self, options: ChainOptions = BOUNDS, *precisions: Precision, noise: NoiseKey | None = None
    ) -> tuple[Tensor, ...]:
        """The last x, and if steps are scored the points and log-probs."""
        pairs = zip(self.segments, precisions or ["fp32"] * len(self.segments), strict=True)
        segments = [replace(segment, precision=precision) for segment, precision in pairs]
        arguments = segments, self.noise if noise is None else noise, self.table, self.std
        return present(mlp_chain_triton(*arguments, options))

    def exact(self, options: ChainOptions = BOUNDS) -> tuple[Tensor, ...]:
        segments = [double(segment) for segment in self.segments]
        return present(
            mlp_chain_reference(segments, self.noise.double(), self.table.double(), self.std.double(), options)
        )


def present(chain: Chain) -> tuple[Tensor, ...]:
    return tuple(result for result in chain if result is not None)


def double(segment: MLPSegment) -> MLPSegment:
    net = segment.network
    layers = tuple((weight.double(), bias.double()) for weight, bias in net.layers)
    return MLPSegment(
        replace(net, first=net.first.double(), layers=layers), segment.time.double(), segment.obs.double()
    )


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 3e-6) -> None:
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("batch", "actions", "base", "fine_tuned"),
    [
        (1, 12, ([40] * 3,), ([40] * 3,)),
        (3, 5, ([33] * 5, "ReLU"), ([48], "Mish")),
        (17, 20, ([32], "Tanh"), ([35] * 3, "GELU")),
        (3, 5, ([33, 20, 48], "Mish", False), ([32] * 3,)),
        (17, 1, ([32], "ReLU", False), ([32, 40], "ELU", False)),
    ],
)
def test_is_the_chain(batch: int, actions: int, base: tuple[Any, ...], fine_tuned: tuple[Any, ...]) -> None:
    example = Example(batch, actions, base, fine_tuned)
    options = replace(BOUNDS, scored=min(4, actions))
    assert_close(example.run(options), example.exact(options))


@pytest.mark.parametrize(
    "options",
    [
        ChainOptions(),
        ChainOptions(x0_clip=0.5, eps_clip=0.4),
        ChainOptions(first=0, scored=1, min_std=0.6),
        ChainOptions(action_clip=0.2, first=1, scored=3, min_std=0.01),
    ],
)
def test_options(options: ChainOptions) -> None:
    example = Example(3, 5, ([20],), ([20],), steps=2)
    assert_close(example.run(options), example.exact(options))


@settings(max_examples=4)
@given(
    batch=st.integers(1, 40),
    actions=st.integers(1, 33),
    width=st.integers(1, 70),
    residual=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 2**32),
)
def test_any_sizes(batch: int, actions: int, width: int, residual: bool, activation: str, seed: int) -> None:
    arguments = ([width] * 3, activation, residual)
    example = Example(batch, actions, arguments, arguments, steps=2, seed=seed)
    options = replace(BOUNDS, first=0, scored=actions)
    assert_close(example.run(options), example.exact(options), 2e-5)


def test_without_noise_the_mean_is_taken() -> None:
    example = Example(3, 5, ([20],), ([20],), steps=2)
    options = ChainOptions(x0_clip=1.0)
    (noisy,) = example.run(options)
    example.std.zero_()
    assert_close(example.run(options), example.exact(options))
    assert not example.run(options)[0].equal(noisy)


@pytest.mark.parametrize("tile", LINEAR_TILES)
def test_every_tile(tile: LinearTile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_step, "LINEAR_TILES", (tile,))
    example = Example(19, 6, ([72] * 3,), ([72] * 3,), steps=2)
    assert_close(example.run(), example.exact())


@pytest.mark.parametrize(("programs", "rows", "chunks"), [(1, 32, 5), (5, 16, 3)])
def test_large_batches(programs: int, rows: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the tail takes several blocks of hidden units then, and more rows."""
    monkeypatch.setattr(mlp_step, "PROGRAMS", programs)
    tile = tail_tile(40, 260)
    assert rows == tile.BLOCK_B
    assert chunks == tile.CHUNKS
    example = Example(40, 6, ([260],), ([260],), steps=2)
    assert_close(example.run(), example.exact())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    values = torch.tensor([-1e30, -100, -20.5, -1, -1e-3, 0, 1e-5, 0.5, 3, 19.9, 20.1, 100, 1e30], device=DEVICE)
    size = len(values)
    identity, nothing = torch.eye(size, device=DEVICE), torch.zeros(size, device=DEVICE)
    net = MLPStep(torch.zeros_like(identity), ((identity, nothing),), activation, residual=False)
    segment = MLPSegment(net, nothing[None], values[None])
    table, zero = PLAIN_EPS.to(DEVICE), torch.zeros(1, device=DEVICE)
    action, _, _ = mlp_chain_triton([segment], torch.zeros(2, 1, size), table, zero, ChainOptions())
    expected = ACTIVATIONS[activation](values.double())[None]
    torch.testing.assert_close(action.double(), expected, rtol=1e-6, atol=3e-7)


def rounded(x: Tensor, precision: str) -> Tensor:
    if precision == "bf16":
        return x.bfloat16().double()
    if precision == "tf32":
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp(mantissa.sign() * (mantissa.abs() * 2**11 + 0.5).floor() / 2**11, exponent)
    return x.double()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("tf32", 1e-6), ("bf16x3", 3e-5), ("bf16", 1e-6)])
@pytest.mark.parametrize("residual", [False, True])
def test_precision_of_the_products(residual: bool, precision: Precision, tolerance: float) -> None:
    """Operands are rounded, nothing else. One hidden layer, for the rounding of a second could go either way."""
    generator = torch.Generator().manual_seed(0)
    x, obs, first, weight = (
        torch.randn(s, generator=generator).to(DEVICE) for s in [(9, 7), (9, 40), (40, 7), (7, 40)]
    )
    bias, time = obs[0, :7] / 3, obs[:1] / 3
    net = MLPStep(first, ((weight, bias),), "Identity", residual)
    table, zero = PLAIN_EPS.to(DEVICE), torch.zeros(1, device=DEVICE)
    noise = torch.stack((x, x))
    segments = [MLPSegment(net, time, obs, precision)]
    action, _, _ = mlp_chain_triton(segments, noise, table, zero, ChainOptions())
    hidden = rounded(x, precision) @ rounded(first, precision).t() + obs + time
    expected = rounded(hidden.float(), precision) @ rounded(weight, precision).t() + bias
    error = (action - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("bf16x3", 0, 1e-4), ("tf32", 3e-5, 3e-3), ("bf16", 3e-4, 3e-2)]
)
def test_precision_of_the_chain(precision: Precision, least: float, most: float) -> None:
    example = Example(5, 6, ([40] * 5,), ([40] * 3, "Mish", False), steps=2)
    options = replace(BOUNDS, x0_clip=None)
    ours, exact = example.run(options, precision, precision)[0], example.exact(options)[0]
    assert least <= (ours - exact).norm() / exact.norm() < most


def test_each_segment_has_its_precision() -> None:
    example = Example(5, 6, ([40] * 3,), ([40] * 3,), steps=2)
    options = replace(BOUNDS, first=0)
    _, exact, _ = example.run(options)
    _, base, _ = example.run(options, "bf16", "fp32")
    _, later, _ = example.run(options, "fp32", "bf16")
    assert not base[:, 1].equal(exact[:, 1])
    assert later[:, 1].equal(exact[:, 1])
    assert not later[:, 2].equal(exact[:, 2])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16x3", "bf16"])
def test_nan_stays_nan(activation: str, precision: Precision) -> None:
    example = Example(2, 5, ([20], activation, False), ([20], activation), steps=2)
    bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32, device=DEVICE)
    example.segments[0].obs[1, 3] = bits.view(torch.float32)[0]
    _, points, log_prob = example.run(replace(BOUNDS, first=0), precision, precision)
    assert points[1, 1:].isnan().all()
    assert log_prob[1].isnan().all()
    assert points[0].isfinite().all()
    assert log_prob[0].isfinite().all()


def test_strided_inputs_give_the_same_numbers() -> None:
    def strided(x: Tensor) -> Tensor:
        return torch.stack((x, -x), -1)[..., 0]

    example = Example(3, 6, ([20] * 3,), ([20] * 3, "ReLU", False), steps=2)
    expected = example.run()
    for name in ("noise", "table", "std"):
        setattr(example, name, strided(getattr(example, name)))
    for i, (net, time, obs) in enumerate((part.network, part.time, part.obs) for part in example.segments):
        layers = tuple((weight.t().contiguous().t(), strided(bias)) for weight, bias in net.layers)
        example.segments[i] = MLPSegment(replace(net, layers=layers), strided(time), strided(obs))
    assert all(ours.equal(same) for ours, same in zip(example.run(), expected, strict=True))


def test_noise_from_a_key() -> None:
    example = Example(5, 6, ([20],), ([20],), steps=2)
    env, step = (torch.arange(5, device=DEVICE) * n + 7 for n in (1, 11))
    key = NoiseKey(2**40 + 1, env, step, draw=3)
    example.noise = keyed_normal(key.seed, env, step, 6, 6, backend="reference")[3:]
    assert_close(example.run(noise=key), example.exact(), 2e-5)


class Launches:
    """Stands for a kernel."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.grids.append(grid)


@pytest.mark.parametrize(("blocks", "launches"), [(0, 21), (1, 61), (2, 101)])
def test_launches(blocks: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two a block and the tail, for each of 20 steps, and the first head."""
    kernels = Launches()
    for name in ("_head_kernel", "_linear_kernel", "_tail_kernel"):
        monkeypatch.setattr(mlp_step, name, kernels)
    Example(40, 12, ([512] * (2 * blocks + 1),), ([512] * (2 * blocks + 1),), steps=20).run()
    assert len(kernels.grids) == launches


@pytest.mark.parametrize(
    ("batch", "width", "linear", "tail"),
    [(1, 512, 32, 16), (40, 512, 96, 48), (40, 1024, 192, 96), (1024, 512, 128, 128), (4096, 512, 128, 128)],
)
def test_programs(batch: int, width: int, linear: int, tail: int) -> None:
    """Enough for the chip, where the batch has as many."""

    def blocks(size: int, block: int) -> int:
        return -(-size // block)

    tile = linear_tile(batch, width)
    assert blocks(batch, tile.BLOCK_B) * blocks(width, tile.BLOCK_N) == linear
    rows = tail_tile(batch, width)
    assert blocks(batch, rows.BLOCK_B) * blocks(width, rows.BLOCK_H * rows.CHUNKS) == tail


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="precision='fp16', expected one of fp32, tf32, bf16x3, bf16"):
        Example(2, 3, ([20],), ([20],), steps=2).run(BOUNDS, "fp16", "fp16")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_graph_holds_the_chain() -> None:
    example = Example(40, 12, ([512] * 3,), ([512] * 3,), steps=20)
    example.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = example.run()
    example.noise.copy_(example.noise.flip(1))
    graph.replay()
    assert all(ours.equal(eager) for ours, eager in zip(captured, example.run(), strict=True))
