"""The specification against the sampler in float64, the C++ chain against the specification."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dppo_fast.diffusion.sampler import Clips, Scoring, Segment, sample_chain
from dppo_fast.diffusion.schedule import NoiseSchedule
from dppo_fast.kernels.mlp_chain import ACTIVATIONS, Chain, ChainOptions, MLPSegment, MLPStep, mlp_chain
from dppo_fast.networks.mlp import DiffusionMLP
from dppo_fast.runtime.native import native
from tests.small import seeded

S, HORIZON, ACTION_DIM = 5, 4, 3
A = HORIZON * ACTION_DIM
OPTIONS = ChainOptions(x0_clip=1.0, noise_clip=3.0, first=2, scored=6, min_std=0.1)

extension: Any = native()
needs_native = pytest.mark.skipif(extension is None, reason="the C++ extension is not built")


@pytest.fixture(params=() if extension is None else extension.simd_levels)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has the C++ chain run with each instruction set that this processor knows."""
    monkeypatch.setattr(extension, "PackedMLP", partial(extension.PackedMLP, simd=request.param))
    return str(request.param)


class Stepwise(DiffusionMLP):
    """Has the sampler take step after step."""

    def step(self, t: Tensor) -> None:
        return None


def random_chain(
    batch: int = 3,
    hidden: tuple[int, ...] = (20, 20, 20),
    residual: bool = True,
    activation: str = "Mish",
    steps: tuple[int, ...] = (2, 3),
    actions: int = A,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `mlp_chain`, in float64, with a network per segment."""
    generator = seeded(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def segment(n: int) -> MLPSegment:
        pairs = pairwise((*hidden, actions))
        layers = tuple((randn(n_out, n_in) / n_in**0.5, randn(n_out)) for n_in, n_out in pairs)
        first = randn(hidden[0], actions + 7)[:, 2 : 2 + actions] / actions**0.5  # a view
        return MLPSegment(MLPStep(first, layers, activation, residual), randn(n, hidden[0]), randn(batch, hidden[0]))

    table = NoiseSchedule(sum(steps)).table.double()
    return {
        "segments": [segment(n) for n in steps],
        "noise": randn(sum(steps) + 1, batch, actions),
        "table": table,
        "std": table[:, 4].clamp(min=0.1),
        "options": OPTIONS,
    }


def single(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same in float32."""

    def cast(segment: MLPSegment) -> MLPSegment:
        network = segment.network
        layers = tuple((weight.float(), bias.float()) for weight, bias in network.layers)
        first = torch.cat((network.first, network.first), 1).float()[:, : network.first.shape[1]]  # a view again
        step = MLPStep(first, layers, network.activation, network.residual)
        return MLPSegment(step, segment.time.float(), segment.obs.float())

    tensors = {key: arguments[key].float() for key in ("noise", "table", "std")}
    return arguments | tensors | {"segments": [cast(segment) for segment in arguments["segments"]]}


def rows(arguments: dict[str, Any], chosen: slice) -> dict[str, Any]:
    """The chains of some of the samples."""
    segments = [replace(segment, obs=segment.obs[chosen]) for segment in arguments["segments"]]
    return arguments | {"segments": segments, "noise": arguments["noise"][:, chosen]}


def assert_same(actual: Chain, expected: Chain) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert other is not None
            assert one.equal(other)


def assert_close(actual: Chain, expected: Chain, tolerance: float = 2e-5) -> None:
    """Within ``tolerance`` of the largest number."""
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.shape == other.shape
            assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


DDPM, DDIM = NoiseSchedule(S), NoiseSchedule(100, S)


@pytest.mark.parametrize(
    ("schedule", "deterministic", "clips", "first"),
    [
        (DDPM, False, Clips(), 2),
        (DDIM, False, Clips(), 2),
        (NoiseSchedule(S, predict_epsilon=False), False, Clips(), 2),
        (NoiseSchedule(100, S, eta=0.3), False, Clips(x0=None, randn=None), 2),
        (DDPM, True, Clips(), None),
        (DDIM, True, Clips(), None),
        (DDIM, False, Clips(x0=0.8, eps=0.4, randn=0.9, action=0.6), 2),
        (DDPM, False, Clips(), None),
        (DDPM, False, Clips(), 0),
        (DDPM, False, Clips(), S - 1),
    ],
)
@pytest.mark.parametrize(
    "network",
    [
        {"mlp_dims": (9, 9, 9), "residual_style": True, "activation_type": "Mish"},
        {"mlp_dims": (9, 7), "activation_type": "ReLU", "cond_mlp_dims": (8, 5)},
    ],
    ids=["residual", "plain"],
)
def test_the_specification_is_the_sampler(
    network: dict[str, Any], schedule: NoiseSchedule, deterministic: bool, clips: Clips, first: int | None
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base, tuned = (Stepwise(ACTION_DIM, HORIZON, cond_dim=6, **network).double() for _ in range(2))
    schedule = schedule.double()
    obs = {"state": torch.randn(3, 2, 3, generator=seeded(1), dtype=torch.float64)}
    noise = torch.randn(S + 1, 3, HORIZON, ACTION_DIM, generator=seeded(2), dtype=torch.float64)
    std = schedule.deterministic_std() if deterministic else schedule.table[:, 4].clamp(min=0.1)
    switch = S if first is None else first
    parts = [(base, range(switch)), (tuned, range(switch, S))]
    scoring = None if first is None else Scoring(first, min_std=0.1, reward_horizon=2)
    with torch.no_grad():
        expected = sample_chain(
            [Segment(*part) for part in parts], schedule, obs, noise, std, clips, deterministic, scoring=scoring
        )
        segments = [
            MLPSegment(*step, net.encode_obs(obs))
            for net, steps in parts
            if (step := DiffusionMLP.step(net, schedule.timesteps[list(steps)])) is not None
        ]
    table = schedule.deterministic_table if deterministic else schedule.table
    options = ChainOptions(clips.x0, clips.eps, clips.randn, clips.action, first, 2 * ACTION_DIM, 0.1)
    action, points, log_prob = mlp_chain(segments, noise.flatten(2), table, std, options, backend="reference")

    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    close(action, expected.action.flatten(1))
    assert (points is None) == (log_prob is None) == (expected.points is None)
    if points is not None and expected.points is not None:
        close(points, expected.points.flatten(2))
        close(log_prob, expected.log_prob)


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        ChainOptions(),
        ChainOptions(x0_clip=0.5, eps_clip=0.4, noise_clip=0.9, action_clip=0.3, first=0, scored=A, min_std=0.2),
        ChainOptions(x0_clip=1.0, first=4),
    ],
)
@pytest.mark.parametrize("residual", [True, False])
def test_options(level: str, residual: bool, options: ChainOptions) -> None:
    arguments = random_chain(residual=residual) | {"options": options}
    expected = mlp_chain(**arguments, backend="reference")
    assert_close(mlp_chain(**single(arguments), backend="native"), expected)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 40, 63, 130])
def test_sizes_of_batches(level: str, batch: int) -> None:
    arguments = random_chain(batch)
    expected = mlp_chain(**arguments, backend="reference")
    assert_close(mlp_chain(**single(arguments), backend="native"), expected)


@pytest.mark.parametrize(
    ("hidden", "residual"),
    [((1,), True), ((67,), False), ((100, 100, 100, 100, 100), True), ((33, 70, 1, 129), False), ((64, 64, 64), True)],
)
@pytest.mark.parametrize("actions", [1, 12, 67])
def test_widths(level: str, hidden: tuple[int, ...], residual: bool, actions: int) -> None:
    arguments = random_chain(7, hidden, residual, actions=actions) | {"options": replace(OPTIONS, scored=1)}
    expected = mlp_chain(**arguments, backend="reference")
    assert_close(mlp_chain(**single(arguments), backend="native"), expected)


@needs_native
@settings(max_examples=25)
@given(
    batch=st.integers(1, 30),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    steps=st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any),
    actions=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_random_networks(
    batch: int, widths: list[int], activation: str, steps: list[int], actions: int, seed: int
) -> None:
    arguments = random_chain(batch, tuple(widths), False, activation, tuple(steps), actions, seed)
    arguments["options"] = ChainOptions(x0_clip=1.0, first=sum(steps) - 1, scored=actions, min_std=0.1)
    expected = mlp_chain(**arguments, backend="reference")
    assert_close(mlp_chain(**single(arguments), backend="native"), expected, 1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_sample_does_not_depend_on_the_others_or_on_the_threads(level: str, threads: int) -> None:
    """To the last bit: a decision must be the same however many environments there are."""
    arguments = single(random_chain(130, hidden=(70, 70, 70)))
    together = mlp_chain(**arguments, backend="native")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for start, stop in [(0, 1), (77, 78), (3, 5), (40, 80), (1, 64)]:
            alone = mlp_chain(**rows(arguments, slice(start, stop)), backend="native")
            assert_same(alone, tuple(x[start:stop] for x in together if x is not None))
        assert_same(mlp_chain(**arguments, backend="native"), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("weight", [1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("residual", [False, True])
def test_a_single_sample_skips_nothing_that_counts(level: str, residual: bool, weight: float) -> None:
    """A weight is not read where a single sample's input is 0, which must not hide that it is infinite."""
    arguments = single(random_chain(40, (70, 70, 70), residual, "ReLU"))
    arguments["segments"][0].network.layers[0][0][3, 5] = weight
    arguments["segments"][0].obs[:20, 5] = -1e6  # ReLU makes it 0 in half of the samples
    together = mlp_chain(**arguments, backend="native")
    for i in range(40):
        for alone, x in zip(mlp_chain(**rows(arguments, slice(i, i + 1)), backend="native"), together, strict=True):
            torch.testing.assert_close(alone, x[i : i + 1], rtol=0, atol=0, equal_nan=True)
    assert bool(together[0].isfinite().all()) == (weight == 1)


def activated(name: str, x: Tensor) -> Tensor:
    """The C++ chain's activation of x [B, n], by a step whose result is the network's output, the activation itself."""
    n = x.shape[1]
    network = MLPStep(torch.zeros(n, n), ((torch.eye(n), torch.zeros(n)),), name, residual=False)
    row = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]])
    segment = MLPSegment(network, torch.zeros(1, n), x)
    return mlp_chain([segment], torch.zeros(2, *x.shape), row, torch.zeros(1), ChainOptions(), backend="native")[0]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(level: str, name: str) -> None:
    tiny = torch.logspace(-30, 0, 3000)
    x = torch.cat((torch.linspace(-110, 110, 20_000), torch.linspace(-4, 4, 20_000), tiny, -tiny)).view(-1, 8)
    expected = ACTIVATIONS[name](x.double())
    # GELU's lower tail comes from an approximation with an absolute error.
    tolerance = {"rtol": 1e-6, "atol": 3e-7 if name == "GELU" else 1e-36}
    torch.testing.assert_close(activated(name, x).double(), expected, **tolerance)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_at_the_ends(level: str, name: str) -> None:
    x = torch.tensor([torch.nan, 3e38, -3e38, 1e-45, 0.0])
    expected = ACTIVATIONS[name](x.double()).float()
    torch.testing.assert_close(activated(name, x.diag()).diagonal(), expected, equal_nan=True)


def test_a_diverged_network_gives_nan_and_not_numbers(level: str) -> None:
    arguments = single(random_chain())
    arguments["segments"][0].obs[1, 4] = torch.nan
    action, points, log_prob = mlp_chain(**arguments, backend="native")
    assert points is not None
    assert log_prob is not None
    for result in (action, points, log_prob):
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()


def test_every_number_is_written(level: str) -> None:
    """Into memory that malloc hands out again, full of NaN."""
    arguments = single(random_chain(40))
    for _ in range(3):
        garbage = [np.full((40, n), np.nan, np.float32) for n in (3, 4 * A, A) for _ in range(5)]
        del garbage
        action, points, log_prob = mlp_chain(**arguments, backend="native")
        assert points is not None
        assert log_prob is not None
        assert points.shape == (40, 4, A)
        assert log_prob.shape == (40, 3)
        assert all(x.isfinite().all() for x in (action, points, log_prob))


def test_strided_arguments(level: str) -> None:
    arguments = single(random_chain())
    expected = mlp_chain(**arguments, backend="native")

    def strided(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()

    def rearranged(segment: MLPSegment) -> MLPSegment:
        layers = tuple((weight.T.contiguous().T, strided(bias)) for weight, bias in segment.network.layers)
        network = replace(segment.network, first=strided(segment.network.first), layers=layers)
        return MLPSegment(network, strided(segment.time), strided(segment.obs))

    arguments |= {key: strided(arguments[key]) for key in ("noise", "table", "std")}
    arguments["segments"] = [rearranged(segment) for segment in arguments["segments"]]
    actual = mlp_chain(**arguments, backend="native")
    assert_same(actual, expected)
    assert not actual[0].requires_grad


@needs_native
def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    pack = extension.PackedMLP
    monkeypatch.setattr(extension, "PackedMLP", lambda *args: (packed.append(1), pack(*args))[1])
    arguments = single(random_chain())
    for _ in range(3):
        mlp_chain(**arguments, backend="native")
    assert len(packed) == len(arguments["segments"])


def test_networks_are_checked() -> None:
    first, bias = torch.zeros(8, 12), torch.zeros(8)
    inner, last = (torch.zeros(8, 8), bias), (torch.zeros(12, 8), torch.zeros(12))
    for layers, activation, residual, error, message in [
        ((last,), "Swish", False, ValueError, "activation='Swish', expected one of Identity, ReLU"),
        ((), "ReLU", False, ValueError, "0 layers after the first, expected at least one"),
        ((inner, last), "ReLU", True, ValueError, "2 layers after the first, expected an odd number"),
        ((inner, inner), "ReLU", False, ValueError, r"layers\[1\] weight has shape \(8, 8\), expected \(12, 8\)"),
        (((torch.zeros(9, 8), torch.zeros(9)), inner, last), "ReLU", True, ValueError, r"layers\[0\] weight"),
        (((last[0], bias),), "ReLU", False, ValueError, r"layers\[0\] bias has shape \(8,\), expected \(12,\)"),
        (((last[0].double(), last[1]),), "ReLU", False, TypeError, r"layers\[0\] weight is torch.float64"),
    ]:
        with pytest.raises(error, match=message):
            MLPStep(first, layers, activation, residual)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise": torch.zeros(6, 36)}, ValueError, r"noise has shape \(6, 36\), expected \[S \+ 1, B, A\]"),
        ({"noise": torch.zeros(6, 3, A).half()}, TypeError, "noise is torch.float16"),
        ({"noise": torch.zeros(6, 3, 5)}, ValueError, r"segments\[0\].network.first has shape \(20, 12\)"),
        ({"noise": torch.zeros(6, 4, A)}, ValueError, r"segments\[0\].obs has shape \(3, 20\), expected \(4, 20\)"),
        ({"noise": torch.zeros(5, 3, A)}, ValueError, r"table has shape \(5, 7\), expected \(4, 7\)"),
        ({"std": torch.zeros(5, 1)}, ValueError, r"std has shape \(5, 1\)"),
        ({"std": torch.zeros(5).double()}, TypeError, "std is torch.float64, expected torch.float32"),
        ({"table": torch.zeros(5, 7, device="meta")}, ValueError, "table is on meta, expected cpu"),
        ({"segments": []}, ValueError, "the segments have 0 steps, noise is for 5"),
        ({"options": replace(OPTIONS, first=5)}, ValueError, r"first=5 must lie in \[0, 5\)"),
        ({"options": replace(OPTIONS, scored=13)}, ValueError, r"scored=13 in \[1, 12\]"),
    ],
)
def test_wrong_arguments_are_named(backend: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mlp_chain(**single(random_chain()) | change, backend=backend)


def test_native_is_for_float32_only() -> None:
    arguments = random_chain()
    assert mlp_chain(**arguments)[0].dtype == torch.float64
    with pytest.raises(ValueError, match="backend='native': mlp_chain has the backends reference"):
        mlp_chain(**arguments, backend="native")


@needs_native
def test_the_extension_checks_what_it_is_given() -> None:
    def zeros(*shape: int) -> Any:
        return np.zeros(shape, np.float32)

    def packed(**change: Any) -> Any:
        arguments = {"layers": [(zeros(8, A), None), (zeros(A, 8), zeros(A))], "activation": "ReLU", "residual": False}
        return extension.PackedMLP(**arguments | change)

    def chain(**change: Any) -> Any:
        arrays = {"noise": zeros(6, 3, A), "table": zeros(5, 7), "std": zeros(5)}
        bounds = {"x0_clip": 1.0, "noise_clip": 1.0, "action_clip": 1.0, "eps_clip": None}
        scoring = {"first": 2, "scored": 3, "min_std": 0.1, "threads": 1}
        return extension.mlp_chain(
            **{"segments": [(packed(), zeros(5, 8), zeros(3, 8))], **arrays, **bounds, **scoring, **change}
        )

    assert [array.shape for array in chain()] == [(3, A), (3, 4, A), (3, 3)]
    wide = zeros(A, 16)
    for call, change, error, message in [
        (packed, {"layers": [(zeros(8, A), None)]}, ValueError, "an MLP of 1 layers"),
        (packed, {"residual": True, "layers": [(zeros(8, A), None)] * 3}, ValueError, "has no residual blocks"),
        (packed, {"layers": [(zeros(8, A), None), (zeros(A, 7), None)]}, ValueError, "layer 1 does not fit"),
        (packed, {"layers": [(zeros(8, A), None), (wide[:, ::2], None)]}, ValueError, "layer 1 weight has strides"),
        (packed, {"layers": [(zeros(8, A).astype(float), None)]}, TypeError, "layer 0 weight has dtype float64"),
        (packed, {"activation": "Swish"}, ValueError, "activation is Swish"),
        (packed, {"simd": "mmx"}, ValueError, "simd is mmx"),
        (chain, {"noise": zeros(6, 3)}, ValueError, "noise has shape"),
        (chain, {"noise": zeros(6, 3, 5)}, ValueError, "a network for chunks of 12, noise is for 5"),
        (chain, {"noise": zeros(6, 3, 2 * A)[..., ::2]}, ValueError, "noise is not C-contiguous"),
        (chain, {"segments": [(packed(), zeros(4, 8), zeros(3, 8))]}, ValueError, "do not have 5 steps together"),
        (chain, {"segments": [(packed(), zeros(5, 7), zeros(3, 8))]}, ValueError, "time has shape"),
        (chain, {"segments": [(packed(), zeros(5, 8), zeros(2, 8))]}, ValueError, "obs has shape"),
        (chain, {"first": 6}, ValueError, "first is 6 of 5 steps"),
        (chain, {"scored": 13}, ValueError, "scored 13 of 12"),
    ]:
        with pytest.raises(error, match=message):
            call(**change)
