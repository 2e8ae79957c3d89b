"""Proximal policy optimisation over action chunks (Schulman et al. 2017); DPPO is built on it.

A policy's decision has one or several scored parts (`Policy.decisions`): a Gaussian chunk is one, a denoising chain
is F. Minibatches draw (decision, part) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from dppo_fast.advantage import estimate_advantages, normalize_advantage
from dppo_fast.algorithms.base import OnlineAlgorithm
from dppo_fast.algorithms.parts import Parts
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.kernels.ppo_loss import PolicyLoss, ppo_loss, value_loss
from dppo_fast.kernels.reward_scaling import RewardScaler
from dppo_fast.networks.vision import RandomShift, shift_images
from dppo_fast.optim import LRConfig, Trainable
from dppo_fast.policies.base import Policy
from dppo_fast.policies.gaussian import DensityPolicy
from dppo_fast.runtime.graph import GraphedFunction
from dppo_fast.runtime.memory import activation_bytes
from dppo_fast.runtime.precision import RECIPES, matmul_precision, update_precision
from dppo_fast.types import Metrics, Obs, ObsShapes, Record, UserError, require_ranges

CPU_MICROBATCH = 2048
"""Rows per forward and backward pass on a CPU: the activations of a 512-wide network then stay in its last cache."""

IMAGE_MICROBATCH = 512
"""Rows per forward and backward pass where the policy sees images, whose activations fill a GPU's memory."""

PEAKS = {"ppo/ratio_max"}
"""Metrics of which the largest value counts; of the others it is the mean."""


@dataclass(frozen=True)
class PPOConfig:
    """Hyperparameters; keys as in the reference.

    ``batch_size`` counts (decision, part) pairs. ``microbatch_size`` splits a minibatch into pieces whose gradients are
    summed, which changes memory and speed but not the result; None lets the device decide. ``augment`` shifts the
    images of every decision at random, anew in every epoch.

    ``grad_accumulate`` is the reference's way: a step for that many minibatches, each normalised by itself, whose
    gradients are added up and not divided, and what is left over at an epoch's end counts in the next.
    """

    gamma: float = 0.99
    gae_lambda: float = 0.95
    batch_size: int = 50000
    update_epochs: int = 5
    microbatch_size: int | None = None
    grad_accumulate: int = 1
    augment: bool = False
    actor_lr: float = 1e-4
    actor_lr_scheduler: LRConfig = field(default_factory=LRConfig)
    actor_weight_decay: float = 0.0
    critic_lr: float = 1e-3
    critic_lr_scheduler: LRConfig = field(default_factory=lambda: LRConfig(min_lr=1e-3))
    critic_weight_decay: float = 0.0
    max_grad_norm: float | None = None
    n_critic_warmup_itr: int = 0
    clip_ploss_coef: float = 0.01
    clip_vloss_coef: float | None = None
    norm_adv: bool = True
    clip_advantage_lower_quantile: float = 0.0
    clip_advantage_upper_quantile: float = 1.0
    vf_coef: float = 0.5
    ent_coef: float = 0.0
    target_kl: float | None = None
    reward_scale_running: bool = True
    reward_scale_const: float = 1.0
    use_bc_loss: bool = False
    bc_loss_coeff: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "gamma": "(0, 1]",
            "gae_lambda": "[0, 1]",
            "batch_size": "[2, inf)" if self.norm_adv else "[1, inf)",
            "update_epochs": "[1, inf)",
            "microbatch_size": "[1, inf)",
            "grad_accumulate": "[1, inf)",
            "actor_lr": "(0, inf)",
            "actor_weight_decay": "[0, inf)",
            "critic_lr": "(0, inf)",
            "critic_weight_decay": "[0, inf)",
            "max_grad_norm": "(0, inf)",
            "n_critic_warmup_itr": "[0, inf)",
            "clip_ploss_coef": "(0, inf)",
            "clip_vloss_coef": "(0, inf)",
            "clip_advantage_lower_quantile": f"[0, {self.clip_advantage_upper_quantile}]",
            "clip_advantage_upper_quantile": "[0, 1]",
            "vf_coef": "[0, inf)",
            "ent_coef": "(-inf, inf)",
            "target_kl": "(0, inf)",
            "reward_scale_const": "(0, inf)",
            "bc_loss_coeff": "[0, inf)",
        }
        require_ranges(self, "algorithm", ranges)
        self.actor_lr_scheduler.require_valid("algorithm.actor_lr_scheduler")
        self.critic_lr_scheduler.require_valid("algorithm.critic_lr_scheduler")


class Batch(NamedTuple):
    """Everything of a rollout that minibatches index, one row per decision [M]; ``shift`` [M, 2] moves its images."""

    obs: Obs
    record: Record
    advantage: Tensor
    returns: Tensor
    value: Tensor
    shift: Tensor | None = None

    def observations(self, decision: Tensor) -> Obs:
        """Those of some decisions [D], shifted."""
        obs = {name: value[decision] for name, value in self.obs.items()}
        return obs if self.shift is None else _shifted(obs, self.shift[decision])


def _shifted(obs: Obs, shift: Tensor) -> Obs:
    return {name: value if name == "state" else shift_images(value, shift) for name, value in obs.items()}


def _refill(static: Batch | None, fresh: Batch) -> Batch:
    """``fresh`` at the addresses of ``static``, where a graph looks for it."""
    if static is None:
        return fresh
    for old, new in zip(_tensors(static), _tensors(fresh), strict=True):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)
    return static


def _tensors(batch: Batch) -> list[Tensor]:
    return [*batch.obs.values(), *batch.record.values(), batch.advantage, batch.returns, batch.value]


class PPO(OnlineAlgorithm):
    """PPO with a state-value critic.

    ``bootstrap_truncated=False`` reproduces the reference's advantages, which know no truncation; ``shift_once`` its
    augmentation, one shift of every image and iteration, which the old values and log-probs see as well.
    """

    trains: ClassVar[type] = DensityPolicy

    def __init__(
        self,
        policy: Policy,
        critic: nn.Module,
        config: PPOConfig,
        buffer: RolloutBuffer,
        bootstrap_truncated: bool = True,
        shift_once: bool = False,
    ) -> None:
        self.actor = self.policy = policy
        self.critic = critic
        self.config = config
        self.buffer: RolloutBuffer = buffer
        self.bootstrap_truncated = bootstrap_truncated
        self.shift_once = shift_once
        self.reward_scaler = RewardScaler(buffer.num_envs) if config.reward_scale_running else None
        self.device = buffer.device
        self.generator: torch.Generator | None = None
        self.permutation: Callable[[int], Tensor] = self._permutation
        self.draw_shift: Callable[[int], Tensor] = self._draw_shift
        self.on_host = self.device.type == "cpu"
        self.clip = torch.tensor(config.clip_ploss_coef, device=self.device)
        self.batch: Batch | None = None
        self.metric_names: tuple[str, ...] = ()
        self.stepped = True
        self.recipe = RECIPES["fp32"]
        self.learn = GraphedFunction(self._learn, idle={"stop": 1.0})
        c = config
        self.trainables: dict[str, Trainable] = {
            "actor": Trainable(
                policy.trained().parameters(), c.actor_lr, c.actor_lr_scheduler, c.actor_weight_decay, c.max_grad_norm
            ),
            "critic": Trainable(critic.parameters(), c.critic_lr, c.critic_lr_scheduler, c.critic_weight_decay),
        }

    @classmethod
    def build(cls, options: PPOConfig, parts: Parts) -> Self:
        c, policy = options, parts.policy
        if policy.decisions < 1:
            raise UserError("policy.options.ft_denoising_steps=0: fine-tuning needs at least 1")
        pairs = parts.n_steps * parts.num_envs * policy.decisions
        if c.batch_size > pairs:
            raise UserError(
                f"algorithm.batch_size={c.batch_size} is larger than the {pairs} pairs of one iteration "
                f"(train.n_steps={parts.n_steps} x env.num_envs={parts.num_envs} x {policy.decisions} scored parts)"
            )
        if c.grad_accumulate > 1 and not parts.reference:
            raise UserError(
                f"algorithm.grad_accumulate={c.grad_accumulate} is for compat=reference; the same with all pairs "
                f"weighing the same is algorithm.batch_size={c.batch_size * c.grad_accumulate} "
                f"algorithm.microbatch_size={c.batch_size}"
            )
        buffer = RolloutBuffer(parts.n_steps, parts.num_envs, parts.device)
        algorithm = cls(policy, parts.value(), c, buffer, not parts.reference, parts.reference)
        algorithm.generator = parts.generator
        algorithm.recipe = parts.recipe
        # a graph would repeat the draws of the cloning term, see one epoch's shifts in all, and take a step every time
        algorithm.learn.enabled = parts.graphs and not (c.use_bc_loss or c.augment or c.grad_accumulate > 1)
        return algorithm

    def steps_to_collect(self, iteration: int) -> int:
        return self.buffer.num_steps

    def update(self, iteration: int) -> Metrics:
        """Several epochs of minibatches over the rollout.

        Once approx_kl exceeds ``target_kl`` no further step is taken. On a GPU the host does not wait to learn of it:
        the remaining minibatches run, and a flag on the device turns their optimizer steps off.
        """
        c = self.config
        batch = self.batch = _refill(self.batch, self._prepare()) if self.learn.enabled else self._prepare()
        rows = self._learnable_rows()
        parts = self.policy.decisions
        pairs = len(rows) * parts
        stop = torch.zeros((), device=self.device)
        first, total, peak, count = None, *torch.zeros(3, device=self.device).unbind()
        for view in self._views(batch):
            self.batch = view
            order = self.permutation(pairs)
            for index, start in enumerate(range(0, max(pairs - c.batch_size, 0) + 1, c.batch_size)):
                pair = order[start : start + c.batch_size].sort().values  # those of one decision next to each other
                inputs = {"row": rows[pair // parts], "k": pair % parts, "stop": stop}
                due = self.due(iteration, index)
                values = self.learn(inputs, due)
                first = values.clone() if first is None else first
                total = total + values * (1 - stop)
                peak = torch.maximum(peak, values * (1 - stop))
                count = count + (1 - stop)
                if c.target_kl is not None and "actor" in due:
                    approx_kl = values[self.metric_names.index("ppo/approx_kl")]
                    stop = torch.maximum(stop, (approx_kl > c.target_kl).float())
                    if self.on_host and stop:
                        break
            if self.on_host and stop:
                break
        self.after_update(iteration)
        assert first is not None
        means, peaks = (dict(zip(self.metric_names, values, strict=True)) for values in (total / count, peak))
        return {
            **means,
            **{name: peaks[name] for name in PEAKS},
            "ppo/first_clip_fraction": first[self.metric_names.index("ppo/clip_fraction")],
            "ppo/minibatches": count,
            "critic/explained_variance": 1 - (batch.returns - batch.value).var() / batch.returns.var(),
            "critic/value": batch.value.mean(),
            **{f"lr/{name}": trainable.schedule.lr for name, trainable in self.trainables.items()},
        }

    def _learn(self, inputs: Mapping[str, Tensor], due: tuple[str, ...]) -> Tensor:
        """A minibatch of ``self.batch`` and its metrics, in the order of ``metric_names``."""
        assert self.batch is not None
        with update_precision(self.recipe):
            metrics = self.minibatch(self.batch, inputs["row"], inputs["k"], due, inputs["stop"])
        self.metric_names = tuple(metrics)
        return torch.stack(list(metrics.values()))

    def minibatch(self, batch: Batch, row: Tensor, k: Tensor, due: tuple[str, ...], stop: Tensor) -> dict[str, Tensor]:
        """One step of the optimizers ``due`` on pairs (``row``, ``k``), each [B]; a ``stop`` of 1 leaves all parameters
        alone.
        """
        c = self.config
        advantage = normalize_advantage(
            batch.advantage[row], c.norm_adv, c.clip_advantage_lower_quantile, c.clip_advantage_upper_quantile
        )
        if self.stepped:
            for trainable in self.trainables.values():
                trainable.zero_grad()
        metrics: dict[str, Tensor] = {}
        size = self._microbatch_size(batch, len(row))
        for rows_, k_, advantage_ in zip(*(torch.split(rows, size) for rows in (row, k, advantage)), strict=True):
            share = len(rows_) / len(row)
            loss, piece = self.loss(batch, rows_, k_, advantage_)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            for name, value in piece.items():
                if name in PEAKS:
                    metrics[name] = torch.maximum(metrics.get(name, value), value)
                else:
                    metrics[name] = metrics.get(name, 0) + value.detach() * share
        for name in due:
            self.trainables[name].step(stop)
        self.stepped = bool(due)
        return metrics

    def _microbatch_size(self, batch: Batch, pairs: int) -> int:
        images = batch.obs.keys() != {"state"}
        automatic = IMAGE_MICROBATCH if images else CPU_MICROBATCH if self.device.type == "cpu" else pairs
        return min(self.config.microbatch_size or automatic, pairs)

    def loss(self, batch: Batch, row: Tensor, k: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss of pairs (``row``, ``k``) and its parts, all means over the pairs."""
        c = self.config
        decision, place = self._decisions(batch, row)
        distinct = batch.observations(decision)
        value = value_loss(self.critic(distinct)[place], batch.returns[row], batch.value[row], c.clip_vloss_coef)
        obs = {name: value[place] for name, value in distinct.items()}
        part = self.policy.select(batch.record, row, k)
        policy = self.policy_loss(obs, part, k, batch.record["log_prob"][row, k], advantage)
        loss = policy.loss + c.vf_coef * value
        metrics = {
            "loss/policy": policy.loss,
            "loss/value": value,
            "ppo/approx_kl": policy.approx_kl,
            "ppo/clip_fraction": policy.clip_fraction,
            "ppo/ratio": policy.ratio,
            "ppo/ratio_max": policy.ratio_max,
        }
        if c.ent_coef:
            entropy = self.policy.entropy(obs)
            loss = loss - c.ent_coef * entropy
            metrics["ppo/entropy"] = entropy
        if c.use_bc_loss:
            bc = self.policy.behaviour_cloning_loss(obs)
            loss = loss + c.bc_loss_coeff * bc
            metrics["loss/bc"] = bc
        return loss, metrics

    def _decisions(self, batch: Batch, row: Tensor) -> tuple[Tensor, Tensor]:
        """Decisions [D] that include those of the sorted ``row`` [B], and where each of ``row`` is among them [B].

        On a GPU their number must not depend on what is drawn: all decisions, or, if these are more, ``row`` itself.
        """
        if self.on_host:
            decision, place = torch.unique_consecutive(row, return_inverse=True)
            return decision, place
        every, place = (torch.arange(n, device=self.device) for n in (len(batch.value), len(row)))
        return (every, row) if len(every) < len(row) else (row, place)

    def policy_loss(self, obs: Obs, part: Record, k: Tensor, old_log_prob: Tensor, advantage: Tensor) -> PolicyLoss:
        """The clipped objective of selected parts ``k`` [B] with normalised advantages."""
        return ppo_loss(self.policy.log_prob(obs, part, k), old_log_prob, advantage, self.clip)

    def due(self, iteration: int, index: int) -> tuple[str, ...]:
        """Who takes a step in minibatch ``index`` of an epoch: the critic, and after its warm-up the actor."""
        if (index + 1) % self.config.grad_accumulate:
            return ()
        return ("actor", "critic") if iteration >= self.config.n_critic_warmup_itr else ("critic",)

    def after_update(self, iteration: int) -> None:
        """A hook at the end of every update."""

    def step_schedules(self, iteration: int) -> None:
        if iteration >= self.config.n_critic_warmup_itr:
            self.trainables["actor"].schedule.step()
        self.trainables["critic"].schedule.step()

    def _prepare(self) -> Batch:
        c, buffer = self.config, self.buffer
        if c.augment and self.shift_once:
            self._shift_rollout()
        reward = buffer.reward if self.reward_scaler is None else self.reward_scaler(buffer.reward, buffer.first)
        estimates = estimate_advantages(
            buffer, self.critic, reward * c.reward_scale_const, c.gamma, c.gae_lambda, self.bootstrap_truncated
        )
        batch = Batch(
            {name: obs.flatten(0, 1) for name, obs in buffer.obs.items()},
            {name: value.flatten(0, 1) for name, value in buffer.record.items()},
            estimates.advantage.flatten(),
            estimates.returns.flatten(),
            estimates.value.flatten(),
        )
        return self._rescored(batch) if c.augment and self.shift_once else batch

    def _shift_rollout(self) -> None:
        """Move every image in the buffer."""
        for name, value in self.buffer.obs.items():
            if name != "state":
                images = value.flatten(0, 2)
                pieces = (torch.split(x, IMAGE_MICROBATCH) for x in (images, self.draw_shift(len(images))))
                for image, shift in zip(*pieces, strict=True):
                    image.copy_(shift_images(image, shift))

    def _views(self, batch: Batch) -> list[Batch]:
        """What each epoch sees of the rollout, prepared before any step changes the policy."""
        if not self.config.augment or self.shift_once:
            return [batch] * self.config.update_epochs
        shifts = [self.draw_shift(len(batch.value)) for _ in range(self.config.update_epochs)]
        return [self._rescored(batch._replace(shift=shift)) for shift in shifts]

    @torch.no_grad()
    def _rescored(self, batch: Batch) -> Batch:
        """``batch`` with the log-probs that the present policy gives where ``batch`` shows it shifted images.

        What was sampled for one image is as likely for the shifted one only as far as the policy has learned to
        ignore shifts; a ratio of log-probs is one of two policies only where both see the same.
        """
        parts = self.policy.decisions
        decisions, log_probs = torch.arange(len(batch.value), device=self.device), []
        for decision in torch.split(decisions, max(1, self._microbatch_size(batch, len(decisions)) // parts)):
            row, k = decision.repeat_interleave(parts), torch.arange(parts, device=self.device).repeat(len(decision))
            obs = {name: value.repeat_interleave(parts, 0) for name, value in batch.observations(decision).items()}
            with matmul_precision(self.recipe.trained):
                log_probs.append(self.policy.log_prob(obs, self.policy.select(batch.record, row, k), k))
        return batch._replace(record={**batch.record, "log_prob": torch.cat(log_probs).view(-1, parts)})

    def _draw_shift(self, n: int) -> Tensor:
        pad = RandomShift.pad
        return torch.randint(-pad, pad + 1, (n, 2), generator=self.generator, device=self.device)

    def _learnable_rows(self) -> Tensor:
        """Decisions [M'] to learn from: all, unless the simulator failed on some."""
        if self.buffer.invalid:
            return self.buffer.valid.flatten().nonzero().squeeze(-1)
        return torch.arange(self.buffer.valid.numel(), device=self.device)

    def _permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device)

    def memory(self, obs_shapes: ObsShapes) -> dict[str, int]:
        """Bytes of the rollout, of all weights with their gradients and moments, and, estimated from one pair, of what
        the backward pass of a microbatch keeps.
        """
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        dtypes = {name: torch.float32 if name == "state" else torch.uint8 for name in obs_shapes}
        obs = {
            name: torch.zeros(1, *shape, dtype=dtypes[name], device=self.device) for name, shape in obs_shapes.items()
        }
        record = self.policy.act(obs).record
        batch = Batch(obs, record, *torch.zeros(3, 1, device=self.device).unbind())
        parameters = [p for module in self.modules().values() for p in module.parameters()]
        part = self.policy.select(record, zero, zero)
        pair = activation_bytes(lambda: (self.policy.log_prob(obs, part, zero), self.critic(obs)), parameters)
        pairs = self._microbatch_size(batch, self.config.batch_size)
        return {
            "rollout": self.buffer.valid.numel() * sum(x.nbytes for x in [*obs.values(), *record.values()]),
            "weights": sum(p.nbytes * (4 if p.requires_grad else 1) for p in parameters),
            f"activations of {pairs} pairs": pairs * pair,
        }

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "critic": self.critic}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {name: trainable.state_dict() for name, trainable in self.trainables.items()}
        if self.reward_scaler is not None:
            state["reward_scaler"] = self.reward_scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, trainable in self.trainables.items():
            trainable.load_state_dict(state[name])
        if self.reward_scaler is not None:
            self.reward_scaler.load_state_dict(state["reward_scaler"])
