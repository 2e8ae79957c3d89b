"""What is measured: the ops and the two paths that a training iteration consists of, at the sizes of real runs.

Adding an op is one entry in ``OPS``: how to call it, arguments at a `Shape`, how many operations it does, and the tests
without which no number of it counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.inputs import Arguments, Shape
from dppo_fast.algorithms.dppo import DPPO
from dppo_fast.kernels._dispatch import Backend, resolve
from dppo_fast.kernels.chain_log_prob import chain_log_prob
from dppo_fast.kernels.denoise_step import sampling_step
from dppo_fast.kernels.gae import gae
from dppo_fast.kernels.mlp_chain import mlp_chain
from dppo_fast.kernels.norm_act_film import norm_act_film
from dppo_fast.kernels.philox import keyed_normal
from dppo_fast.kernels.ppo_loss import chain_ppo_loss, ppo_loss, value_loss
from dppo_fast.kernels.reward_scaling import discounted_sum
from dppo_fast.policies.diffusion import DiffusionPolicy
from dppo_fast.types import Obs, Record

COMPILED = "compile"
BACKENDS = ("reference", COMPILED, "native", "triton")
"""An op's own backends, and its reference through torch.compile."""


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list) or is_dataclass(value):
        fields = vars(value) if is_dataclass(value) else value
        for item in fields.values() if isinstance(fields, Mapping) else fields:
            yield from tensors(item)


def every_byte_once(arguments: Arguments, result: Any) -> int:
    """The least traffic of an op that reads all of its arguments and writes all of its results."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors((arguments, result)))


def plain(backend: str) -> Backend:
    """The op's own backend behind one of `BACKENDS`."""
    return "reference" if backend == COMPILED else cast(Backend, backend)


@dataclass(frozen=True)
class Op:
    """One thing to measure.

    ``run(**arguments(shape, device), backend=...)`` is timed, together with the gradient of its first result with
    respect to the arguments named in ``wrt``. ``traffic`` gives bytes, ``flops`` operations, both the least that the
    task needs, whatever the implementation does. ``tests`` are pytest nodes, separated by spaces. ``compiled`` says
    whether the reference through torch.compile is a baseline.
    """

    run: Callable[..., Any]
    arguments: Callable[[Shape, torch.device], Arguments]
    flops: Callable[[Shape], int]
    tests: str
    own_backends: tuple[Backend, ...]
    wrt: tuple[str, ...] = ()
    traffic: Callable[[Arguments, Any], int] = every_byte_once
    compiled: bool = True

    @property
    def backends(self) -> tuple[str, ...]:
        """Those of `BACKENDS` that it has."""
        return tuple(name for name in BACKENDS if name in self.own_backends or (name == COMPILED and self.compiled))

    def obstacle(self, backend: str, device: torch.device) -> str | None:
        """Why ``backend`` cannot run on ``device``."""
        if backend == "native" and device.type != "cpu":
            return "the C++ backend is for the CPU"
        try:
            resolve(self.run.__name__, device, self.own_backends, plain(backend))
        except RuntimeError as error:
            return str(error)
        return None

    def call(self, arguments: Arguments, backend: str) -> Callable[[], Any]:
        """What is timed."""
        run = partial(torch.compile(self.run) if backend == COMPILED else self.run, backend=plain(backend))
        if not self.wrt:
            return partial(run, **arguments)
        leaves = {name: arguments[name].detach().requires_grad_() for name in self.wrt}
        forward = partial(run, **(arguments | leaves))

        def forward_and_backward() -> tuple[Any, tuple[Tensor, ...]]:
            result = forward()
            first = next(tensors(result))
            return result, torch.autograd.grad(first, tuple(leaves.values()), torch.ones_like(first))

        return forward_and_backward


def products(dims: list[int]) -> int:
    """Operations of one row's way through linear layers of these widths."""
    return sum(2 * a * b for a, b in pairwise(dims))


def training_products(dims: list[int]) -> int:
    """The same forward and backward; nobody asks for the gradient of the input."""
    return 3 * products(dims) - products(dims[:2])


def decision(policy: DiffusionPolicy, obs: Obs, backend: Backend) -> Record:
    """A whole chain with its behaviour log-probs; with Triton in a CUDA graph, as in a run."""
    policy.sampler.enabled = backend == "triton"
    with forced(backend):
        act = policy.act(obs)
    return {"action": act.action, **act.record}


def decision_flops(shape: Shape) -> int:
    step, encoder = map(products, shape.network_dims)
    return shape.N * (shape.S * step + 2 * encoder)


def decision_traffic(arguments: Arguments, result: Any) -> int:
    """Both networks are read once; what passes between the steps need not leave the chip."""
    return every_byte_once({"obs": arguments["obs"], "weights": list(arguments["policy"].parameters())}, result)


def minibatch(algorithm: DPPO, row: Tensor, k: Tensor, stop: Tensor, backend: Backend) -> Tensor:
    """One step of both optimizers; with Triton in a CUDA graph, as in a run."""
    algorithm.learn.enabled = backend == "triton"
    with forced(backend):
        return algorithm.learn({"row": row, "k": k, "stop": stop}, algorithm.due(0, 0))


def minibatch_flops(shape: Shape) -> int:
    return shape.rows * sum(map(training_products, (*shape.network_dims, shape.critic_dims)))


def minibatch_traffic(arguments: Arguments, result: Any) -> int:
    """Every pair's own data once, in float32 and two indices; parameters and their two moments read and written."""
    batch, trainables = arguments["algorithm"].batch, arguments["algorithm"].trainables
    chunk, state = batch.record["chain"][0, 0], batch.obs["state"][0]
    floats = 2 * chunk.numel() + state.numel() + len(("old log-prob", "advantage", "return", "value"))
    trained = sum(parameter.numel() for trainable in trainables.values() for parameter in trainable.parameters)
    return int(len(arguments["row"]) * (4 * floats + 2 * 8) + trained * 3 * 2 * 4)


@contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Let every op that has ``backend`` run on it."""
    before = os.environ.get("DPPO_FAST_BACKEND", "")
    os.environ["DPPO_FAST_BACKEND"] = backend
    try:
        yield
    finally:
        os.environ["DPPO_FAST_BACKEND"] = before


OPS = {
    "gae": Op(
        gae,
        inputs.gae_arguments,
        flops=lambda s: 8 * s.T * s.N,
        tests="tests/kernels/test_gae.py",
        own_backends=("reference", "native", "triton"),
    ),
    "discounted_sum": Op(
        discounted_sum,
        inputs.discounted_sum_arguments,
        flops=lambda s: 2 * s.T * s.N,
        tests="tests/kernels/test_reward_scaling.py",
        own_backends=("reference", "native"),
    ),
    "keyed_normal": Op(
        keyed_normal,
        inputs.keyed_normal_arguments,
        flops=lambda s: 10 * (s.S + 1) * s.N * s.chunk,
        tests="tests/kernels/test_philox.py",
        own_backends=("reference", "native", "triton"),
    ),
    "sampling_step": Op(
        sampling_step,
        inputs.sampling_step_arguments,
        flops=lambda s: 20 * s.N * s.chunk,
        tests="tests/kernels/test_denoise_step.py",
        own_backends=("reference", "triton"),
    ),
    "chain_log_prob": Op(
        chain_log_prob,
        inputs.chain_log_prob_arguments,
        flops=lambda s: 25 * s.rows * s.chunk,
        tests="tests/kernels/test_chain_log_prob.py",
        own_backends=("reference", "triton"),
        wrt=("eps",),
    ),
    "ppo_loss": Op(
        ppo_loss,
        inputs.ppo_loss_arguments,
        flops=lambda s: 20 * s.rows,
        tests="tests/kernels/test_ppo_loss.py",
        own_backends=("reference", "triton"),
        wrt=("log_prob",),
    ),
    "chain_ppo_loss": Op(
        chain_ppo_loss,
        inputs.chain_ppo_loss_arguments,
        flops=lambda s: s.rows * (25 * s.chunk + 20),
        tests="tests/kernels/test_ppo_loss.py",
        own_backends=("reference", "triton"),
        wrt=("eps",),
    ),
    "value_loss": Op(
        value_loss,
        inputs.value_loss_arguments,
        flops=lambda s: 12 * s.rows,
        tests="tests/kernels/test_ppo_loss.py",
        own_backends=("reference", "triton"),
        wrt=("value",),
    ),
    "norm_act_film": Op(
        norm_act_film,
        inputs.norm_act_film_arguments,
        flops=lambda s: 60 * s.rows * s.channels * s.unet_Th,
        tests="tests/kernels/test_norm_act_film.py",
        own_backends=("reference", "triton"),
        wrt=("x", "weight", "bias", "film"),
    ),
    "mlp_chain": Op(
        mlp_chain,
        inputs.mlp_chain_arguments,
        flops=lambda s: s.N * s.S * products(s.network_dims[0]),
        tests="tests/kernels/test_mlp_chain.py",
        own_backends=("reference", "triton", "native"),
    ),
    "decision": Op(
        decision,
        inputs.decision_arguments,
        flops=decision_flops,
        traffic=decision_traffic,
        tests="tests/diffusion/test_sampler.py tests/policies/test_diffusion.py",
        own_backends=("reference", "native", "triton"),
        compiled=False,
    ),
    "minibatch": Op(
        minibatch,
        inputs.minibatch_arguments,
        flops=minibatch_flops,
        traffic=minibatch_traffic,
        tests="tests/algorithms/test_ppo.py tests/algorithms/test_dppo.py",
        own_backends=("reference", "native", "triton"),
        compiled=False,
    ),
}
"""The ops, then the two paths that are made of them. Operations of elementwise ops are counted by hand, roughly."""
