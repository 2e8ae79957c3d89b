"""No network is evaluated in vain, and the host never waits for a GPU inside a chain or an update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dppo_fast.networks.eta import Eta, EtaFixed, EtaStateAction
from dppo_fast.networks.mlp import DiffusionMLP, GaussianMLP
from dppo_fast.types import Obs
from tests.small import algorithm, diffusion_policy, gaussian_policy, observations, rollout

S = 4
DDIM = {"denoising_steps": 20, "ddim_steps": S}


class CountingMLP(DiffusionMLP):
    """Counts its calls and the rows it denoised, step by step; a copy counts for itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: Counter[str] = Counter()

    def encode_obs(self, obs: Obs) -> Tensor:
        self.calls["encode_obs"] += 1
        return super().encode_obs(obs)

    def time_table(self, t: Tensor) -> Tensor:
        self.calls["time_rows"] += len(t)
        return super().time_table(t)

    def denoise(self, x: Tensor, time: Tensor, obs: Tensor) -> Tensor:
        self.calls["denoise"] += 1
        self.calls["rows"] += len(x)
        return super().denoise(x, time, obs)

    def step(self, t: Tensor) -> None:
        return None


class CountingGaussian(GaussianMLP):
    rows = 0

    def forward(self, obs: Obs) -> tuple[Tensor, Tensor]:
        self.rows += len(obs["state"])
        return super().forward(obs)


@pytest.mark.parametrize("F", range(S + 1))
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("options", [{}, DDIM])
def test_a_chain_evaluates_each_network_on_its_own_steps_only(
    F: int, deterministic: bool, options: dict[str, int]
) -> None:
    policy = diffusion_policy(network=CountingMLP, ft_denoising_steps=F, **options)
    policy.act(observations(3), deterministic)

    def expected(steps: int) -> dict[str, int]:
        return {"denoise": steps, "rows": 3 * steps, "time_rows": steps, "encode_obs": 1} if steps else {}

    assert policy.actor.calls == expected(S - F)
    if F:
        assert policy.actor_ft.calls == expected(F)


def test_a_chain_of_the_base_policy_is_one_segment() -> None:
    policy = diffusion_policy(network=CountingMLP)
    policy.sample(observations(3), policy.draw_noise(3, S + 1), base_policy=True)
    assert policy.actor.calls == {"denoise": S, "rows": 3 * S, "time_rows": S, "encode_obs": 1}
    assert not policy.actor_ft.calls


@pytest.mark.parametrize("microbatch_size", [None, 5])
def test_an_update_evaluates_the_actor_once_per_row(microbatch_size: int | None) -> None:
    policy = diffusion_policy(network=CountingMLP)
    buffer = rollout(policy, steps=8)
    pairs, epochs = 8 * 4 * policy.decisions, 3
    policy.actor.calls.clear()
    policy.actor_ft.calls.clear()
    algorithm(policy, buffer, update_epochs=epochs, batch_size=16, microbatch_size=microbatch_size).update(0)
    calls = policy.actor_ft.calls
    assert calls["rows"] == pairs * epochs
    assert calls["encode_obs"] == calls["denoise"]
    assert calls["time_rows"] == policy.decisions * calls["denoise"]
    assert not policy.actor.calls


def test_an_update_evaluates_the_gaussian_once_per_row() -> None:
    policy = gaussian_policy(network=CountingGaussian)
    buffer = rollout(policy, steps=8)
    assert (policy.actor_ft.rows, policy.actor.rows) == (8 * 4, 0)
    algorithm(policy, buffer, update_epochs=3, batch_size=16).update(0)
    assert (policy.actor_ft.rows, policy.actor.rows) == (8 * 4 * (1 + 3), 0)


aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.item,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave.Tensor,
}
"""Operations whose result, or its size, the host has to read."""

UPLOADS = {aten.lift_fresh, aten._pin_memory}
"""Tensors made of Python numbers, which a GPU gets by a copy that the host waits for."""

INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

READS = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__}


class NoWaitingOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not {func, func.overloadpacket} & (WAITS | UPLOADS), f"the host waits in {func}"
        if func.overloadpacket in INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"the host waits in {func} for the size of a mask"
        return func(*args, **(kwargs or {}))


class NoReading(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"the host waits in {func}"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Fail where the host would wait for a GPU, found out on the CPU."""
    with NoWaitingOperations(), NoReading():
        yield


class CountingReads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_reads() -> Iterator[Counter[str]]:
    """How often the host reads a tensor, by the method; it may not wait in any other way."""
    with NoWaitingOperations(), CountingReads() as mode:
        yield mode.counts


X = torch.arange(4.0)
CULPRITS: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "bool": lambda: bool(X[0] > 1),
    "float": lambda: float(X[0]),
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "nonzero": lambda: X.nonzero(),
    "mask": lambda: X[X > 1],
    "mask assignment": lambda: X.clone().__setitem__(X > 1, X[:2]),
    "unique": lambda: X.unique(),
    "equal": lambda: X.equal(X),
    "where": lambda: torch.where(X > 1),
    "tensor": lambda: torch.tensor(1.0),
    "list index": lambda: X[[0, 1]],
    "slice by a tensor": lambda: X[: X[1].int()],
    "repeats": lambda: X.repeat_interleave(torch.ones_like(X).int()),
}


@pytest.mark.parametrize("culprit", CULPRITS.values(), ids=CULPRITS.keys())
def test_the_guard_sees(culprit: Callable[[], object]) -> None:
    culprit()
    with no_host_sync(), pytest.raises(AssertionError, match="waits"):
        culprit()


ETAS: dict[str, Callable[[], Eta]] = {
    "fixed": lambda: EtaFixed(0.6),
    "state_action": lambda: EtaStateAction(input_dim=6, action_dim=2, mlp_dims=[8]),
}
CLIPS = {"eps_clip_value": 1.0, "final_action_clip_value": 1.0}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(gaussian_policy, id="gaussian"),
        pytest.param(diffusion_policy, id="ddpm"),
        pytest.param(lambda: diffusion_policy(**DDIM, **CLIPS), id="ddim"),
        *(
            pytest.param(lambda eta=eta: diffusion_policy(eta(), learn_eta=True, **DDIM), id=f"learned eta {name}")
            for name, eta in ETAS.items()
        ),
    ],
)
def test_no_waiting_inside_a_chain(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], deterministic: bool
) -> None:
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")  # the C++ ops are for the CPU
    policy, obs = make(), observations(3)
    with no_host_sync():
        policy.act(obs, deterministic)


OPTIONS = {
    "target_kl": 1e-4,
    "max_grad_norm": 0.5,
    "clip_vloss_coef": 0.2,
    "clip_advantage_lower_quantile": 0.05,
    "clip_advantage_upper_quantile": 0.95,
    "ent_coef": 0.01,
    "use_bc_loss": True,
    "bc_loss_coeff": 0.1,
}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(gaussian_policy, {}, id="gaussian"),
        pytest.param(gaussian_policy, OPTIONS, id="gaussian with everything"),
        pytest.param(diffusion_policy, {}, id="ddpm"),
        pytest.param(diffusion_policy, OPTIONS, id="ddpm with everything"),
        pytest.param(lambda: diffusion_policy(ETAS["fixed"](), **DDIM), OPTIONS, id="ddim with everything"),
        pytest.param(
            lambda: diffusion_policy(ETAS["state_action"](), learn_eta=True, **DDIM), OPTIONS, id="learned eta"
        ),
    ],
)
def test_no_waiting_inside_an_update(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], options: dict[str, Any]
) -> None:
    """The whole of it: advantages, reward scaling, minibatches, optimizer steps and the stop at target_kl."""
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")  # what CUDA tensors get, the C++ ops being for the CPU
    policy = make()
    learner = algorithm(policy, rollout(policy, steps=6), **options)
    assert learner.buffer.truncated.any()
    learner.on_host = False
    with no_host_sync():
        metrics = learner.update(0)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())


@pytest.mark.gpu
@pytest.mark.parametrize("make", [gaussian_policy, diffusion_policy])
@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_no_waiting_on_a_gpu(make: Callable[[], Any], options: dict[str, Any]) -> None:
    policy = make().cuda()
    policy.generator = torch.Generator("cuda")
    buffer = rollout(policy, steps=6, device="cuda")
    learner = algorithm(policy, buffer, **options)
    learner.update(0)  # the first one allocates, and moves the reward scaler to the GPU
    obs = {name: value[0] for name, value in buffer.obs.items()}
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        policy.act(obs)
        learner.update(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
