"""Side by side with the authors' code, irom-princeton/dppo: the same weights, the same tasks, one process, in turn.

    python -m benchmarks.vs_reference --reference <checkout> num_threads=1
    python -m benchmarks.vs_reference --reference <checkout> --iteration --steps 50 --out vs.csv num_threads=2

The reference's own model classes are imported from the checkout; they need torch, einops and hydra. First both sides
have to agree, in float32, on a chain from the same noise, its log-probs, and the loss and gradient of a minibatch. Then
are timed:

- ``sampling``: a chain for ``size`` observations. Ours comes with its log-probs, the reference's without.
- ``decision``: the same, and the reference recomputes the log-probs: for many decisions at once, after the rollout, as
  its agent does (--log-prob-batch); each decision bears its share.
- ``update``: a minibatch of ``size`` pairs, a quarter of the rollout's: gather, loss, backward, both optimizers. With
  ``precision`` as configured, and, where that rounds gradients, as ``update fp32`` without.
- ``iteration`` (--iteration): ``size`` decisions of every env, and all epochs over them in four minibatches each. The
  reference does it step by step as its agent does, in gymnasium's AsyncVectorEnv with a process per env, around the
  checkout's own wrappers; ours is an iteration of the Trainer.

The reference is timed as shipped and with "+fix", which vectorises the Python loop over samples in its loss. Both
ratios are given, always; where that loop does not run, they are one.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks.iteration import UNTIMED, Finished, run_iterations
from benchmarks.reference import LOG_PROB_BATCH, Reference, ReferenceEnvs, Rollout
from benchmarks.report import environment, write_csv
from benchmarks.timing import interleaved, wall_clock
from dppo_fast.advantage import normalize_advantage
from dppo_fast.algorithms.dppo import DPPO
from dppo_fast.algorithms.ppo import Batch
from dppo_fast.build import RunConfig, build_trainer, env_config, parse, pick_device
from dppo_fast.cli import hydra_main
from dppo_fast.config import plain
from dppo_fast.envs import REFERENCE_IDS
from dppo_fast.kernels.denoise_step import chunk_log_prob
from dppo_fast.runtime.precision import RECIPES, Recipe
from dppo_fast.trainer import Trainer
from dppo_fast.types import Obs, UserError

Row: TypeAlias = dict[str, Any]

CONFIG = "gym/finetune/hopper-v2/ft_ppo_diffusion_mlp"
MINIBATCHES = 4
TOLERANCE = 1e-4
"""Largest difference between the sides, relative to the largest number: sums in float32, in another order."""


def compared(task: str, size: int, seconds: Mapping[str, float]) -> Row:
    """A row from seconds by side: ``reference``, ``ours`` and, where it differs, ``fix``."""
    reference, ours = seconds["reference"], seconds["ours"]
    fix = seconds.get("fix", reference)
    return {
        "task": task,
        "size": size,
        "reference_ms": 1e3 * reference,
        "reference_fix_ms": 1e3 * fix,
        "ours_ms": 1e3 * ours,
        "ratio": reference / ours,
        "ratio_fix": fix / ours,
    }


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, relative to the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class Sides:
    """Both implementations with the same weights, and random observations for them."""

    def __init__(self, reference: Reference, algorithm: DPPO, obs_shape: Sequence[int]) -> None:
        self.reference = reference
        self.algorithm = algorithm
        self.policy = algorithm.policy
        self.recipe = algorithm.recipe
        self.device = algorithm.device
        self.obs_shape = tuple(obs_shape)

    def observations(self, batch: int) -> Obs:
        return {"state": torch.randn(batch, *self.obs_shape, device=self.device)}

    def pairs(self, size: int) -> tuple[Rollout, Batch, Tensor]:
        """Decisions as either side keeps them, with the same chains, and ``size`` random ones of their pairs, which
        are MINIBATCHES times as many; pair i is the fine-tuned step i % F of decision i // F.
        """
        F = self.policy.ft_steps
        M = math.ceil(MINIBATCHES * size / F)
        obs = self.observations(M)
        act = self.policy.act(obs)
        chain, log_prob = (act.record[name].clone() for name in ("chain", "log_prob"))
        advantage, returns, value = torch.randn(3, M, device=self.device)
        rollout = Rollout(obs["state"], chain, self.reference.log_prob(obs, chain), returns, value, advantage)
        batch = Batch(obs, {"chain": chain, "log_prob": log_prob}, advantage, returns, value)
        return rollout, batch, torch.randperm(M * F, device=self.device)[:size]

    def disagreement(self, size: int = 256) -> dict[str, float]:
        """How far apart the sides are (`difference`), by what is compared."""
        return {**self._sampling_disagreement(size), **self._learning_disagreement(size)}

    def _sampling_disagreement(self, size: int) -> dict[str, float]:
        """One chain each, from the same noise."""
        obs = self.observations(size)
        noise = self.policy.randn(
            self.policy.schedule.steps + 1, size, self.policy.horizon_steps, self.policy.action_dim
        )
        ours = self.policy.sample(obs, noise, score=True)
        assert ours.points is not None
        assert ours.log_prob is not None
        draws = iter(noise.clone())
        with (
            patch.object(torch, "randn", lambda *_, **__: next(draws)),
            patch.object(torch, "randn_like", lambda *_, **__: next(draws)),
        ):
            _, chain = self.reference.sample(obs)
        elements = self.reference.log_prob(obs, chain).flatten(0, 1)
        log_prob = chunk_log_prob(elements, self.policy.reward_horizon).view(size, -1)
        return {"chain": difference(ours.points, chain), "log-probs": difference(ours.log_prob, log_prob)}

    def _learning_disagreement(self, size: int) -> dict[str, float]:
        """One minibatch each, with weights that have left those which sampled, so that ratios are not 1."""
        rollout, batch, pair = self.pairs(size)
        row, k = pair // self.policy.ft_steps, pair % self.policy.ft_steps
        actor, critic, model = self.policy.trained(), self.algorithm.critic, self.reference.model
        before = copy.deepcopy(actor.state_dict())
        move(actor)
        self.reference.take_weights(self.algorithm)
        shipped, fix = (self.reference.loss(rollout, row, k, fix) for fix in (False, True))
        advantage = normalize_advantage(batch.advantage[row], self.algorithm.config.norm_adv, 0.0, 1.0)
        loss, _ = self.algorithm.loss(batch, row, k, advantage)
        result = {
            "loss": difference(loss, shipped),
            "loss with fix": difference(loss, fix),
            "actor's gradient": difference(flat_gradient(loss, actor), flat_gradient(shipped, model.actor_ft)),
            "critic's gradient": difference(flat_gradient(loss, critic), flat_gradient(shipped, model.critic)),
        }
        actor.load_state_dict(before)
        self.reference.take_weights(self.algorithm)
        return result

    def sampling(self, batch: int) -> dict[str, Callable[[], Any]]:
        obs = self.observations(batch)
        return {"reference": lambda: self.reference.sample(obs), "ours": lambda: self.policy.act(obs)}

    def recompute(self, decisions: int) -> Callable[[], Tensor]:
        """The reference's second look at the log-probs of ``decisions``."""
        obs = self.observations(decisions)
        _, chain = self.reference.sample(obs)
        return lambda: self.reference.log_prob(obs, chain)

    def update(self, size: int) -> dict[str, Callable[[], Any]]:
        rollout, batch, pair = self.pairs(size)
        algorithm, F, stop = self.algorithm, self.policy.ft_steps, torch.zeros((), device=self.device)
        algorithm.batch = batch

        def ours(recipe: Recipe) -> None:
            algorithm.recipe = recipe
            ordered = pair.sort().values  # as in PPO.update
            algorithm.learn({"row": ordered // F, "k": ordered % F, "stop": stop}, algorithm.due(0, 0))

        sides: dict[str, Callable[[], Any]] = {
            "reference": lambda: self.reference.minibatch(rollout, pair // F, pair % F, fix=False),
            "fix": lambda: self.reference.minibatch(rollout, pair // F, pair % F, fix=True),
            "ours": partial(ours, self.recipe),
        }
        rounded = self.recipe.backward != self.recipe.trained
        return {**sides, "fp32": partial(ours, RECIPES["fp32"])} if rounded else sides


def move(module: nn.Module, scale: float = 1e-3) -> None:
    """Add noise to the weights, about as much as a few optimizer steps would."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def flat_gradient(loss: Tensor, module: nn.Module) -> Tensor:
    parameters = [parameter for _, parameter in sorted(module.named_parameters())]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters, retain_graph=True)])


def time_iterations(trainer: Trainer, reference: Reference, envs: ReferenceEnvs, repeats: int) -> dict[str, float]:
    """Medians of whole iterations, taken in turn after one of each that warms up."""
    config = reference.config
    steps = trainer.config.n_steps
    samples: dict[str, list[float]] = {"reference": [], "fix": [], "ours": []}

    def on_row(row: dict[str, float]) -> None:
        if row["iteration"] == 0:
            return
        samples["ours"].append(row["seconds"])
        for name in ("reference", "fix"):
            call = partial(reference.iteration, envs, steps, config.update_epochs, config.batch_size, fix=name == "fix")
            samples[name].append(wall_clock(call, reference.device))
        if len(samples["ours"]) > repeats:
            raise Finished

    run_iterations(trainer, on_row)
    return {name: median(values[1:]) for name, values in samples.items()}


def network_arguments(node: Mapping[str, Any] | None, cond_dim: int) -> Row:
    """What a network of the configuration is made with; the reference's networks call it by the same names."""
    return {**{name: value for name, value in (node or {}).items() if name != "name"}, "cond_dim": cond_dim}


def rows(config: RunConfig, options: argparse.Namespace) -> Iterator[Row]:
    """One per task and size, once both sides agree. Raises UserError where they do not."""
    env, task = env_config(config), config.task
    envs = None
    if options.iteration:  # its processes are forked before PyTorch has started threads
        env_id = REFERENCE_IDS.get(env.id, env.id)
        envs = ReferenceEnvs(
            options.reference, env_id, env.num_envs, task.act_steps, env.max_episode_steps, env.normalization
        )
    with TemporaryDirectory() as run:
        trainer = build_trainer(config, Path(run))
        assert isinstance(trainer.algorithm, DPPO)
        assert trainer.collector is not None
        obs_shape = trainer.collector.env.obs_shapes["state"]
        network, critic = (
            network_arguments(node, math.prod(obs_shape)) for node in (config.policy.network, config.critic)
        )
        reference = Reference(options.reference, trainer.algorithm, network, critic)
        sides = Sides(reference, trainer.algorithm, obs_shape)
        for name, value in sides.disagreement().items():
            print(f"agreement: {name} within {value:.1e}")
            if not value <= TOLERANCE:
                raise UserError(f"the sides disagree: {name} by {value:.1e}, more than {TOLERANCE:.0e}")
        device = trainer.algorithm.device
        if options.batch:
            recompute = interleaved({"recompute": sides.recompute(options.log_prob_batch)}, device, 0, least=3)
        for batch in options.batch:
            seconds = interleaved(sides.sampling(batch), device, options.seconds)
            share = recompute["recompute"] * batch / options.log_prob_batch
            yield compared("sampling", batch, seconds)
            yield compared("decision", batch, seconds | {"reference": seconds["reference"] + share})
        if envs is not None:
            yield compared("iteration", options.steps, time_iterations(trainer, reference, envs, options.repeats))
            envs.close()
        for size in options.update:
            seconds = interleaved(sides.update(size), device, options.seconds)
            yield compared("update", size, seconds)
            if "fp32" in seconds:
                yield compared("update fp32", size, seconds | {"ours": seconds["fp32"]})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of irom-princeton/dppo")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 40, 256, 1024], help="sampling and decision")
    parser.add_argument("--log-prob-batch", type=int, default=LOG_PROB_BATCH, help="decisions recomputed at once")
    parser.add_argument("--update", type=int, nargs="*", default=[1000, 10000, 50000], help="pairs in a minibatch")
    parser.add_argument("--iteration", action="store_true", help="also whole iterations")
    parser.add_argument("--steps", type=int, default=500, help="decisions per env in an iteration")
    parser.add_argument("--repeats", type=int, default=3, help="iterations timed")
    parser.add_argument("--seconds", type=float, default=10, help="timed per task and size, all sides together")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("settings", nargs="*", help="key=value, as for dppo_fast.train")
    options = parser.parse_args(arguments)

    def task(node: DictConfig) -> None:
        content = plain(node)
        config = parse(content)
        parts = options.steps * env_config(config).num_envs * int(config.policy.options["ft_denoising_steps"])
        content["train"]["n_steps"] = options.steps
        content["algorithm"]["batch_size"] = parts // MINIBATCHES
        config = parse(content)
        torch.set_num_threads(config.num_threads or torch.get_num_threads())
        write_csv(rows(config, options), environment(pick_device(config.device)), options.out)

    return hydra_main(task, [f"cfg={CONFIG}", *options.settings, *UNTIMED], __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
