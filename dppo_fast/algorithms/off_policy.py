"""What all algorithms share that learn from a replay buffer: the loop, its optimizers and its target networks.

A new one is a subclass of `OffPolicy` that
- makes its critics in ``__init__`` with ``add_critic`` and ``add_target``,
- says in ``steps_per_decision`` how often it learns, and in ``actor_steps``, where that differs, how often the actor,
- lists in ``draws`` all the random numbers that one step takes,
- and computes in ``minibatch`` its losses from a batch and these draws, each followed by ``descend``.

So ``minibatch`` is a function of tensors without any randomness of its own; that is what a CUDA graph can hold and what
a test can compare. `dppo_fast.algorithms.sac` is an example.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from dppo_fast.algorithms.base import OnlineAlgorithm
from dppo_fast.algorithms.parts import Parts
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.data.transitions import chunk_transitions
from dppo_fast.optim import LRConfig, Trainable
from dppo_fast.policies.base import Policy
from dppo_fast.replay import ReplayBuffer, Transitions
from dppo_fast.runtime.graph import GraphedFunction
from dppo_fast.runtime.precision import matmul_precision
from dppo_fast.types import Act, Actor, Metrics, NoiseStream, Obs, ObsShapes, require_ranges

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class OffPolicyConfig:
    """Hyperparameters; keys as in the reference.

    ``gamma`` discounts from one decision to the next, however many env steps its chunk has. ``buffer_size`` counts
    transitions. In the first ``n_explore_steps`` decisions of every env actions are uniform and nothing is learned; in
    the first ``n_critic_warmup_itr`` iterations only the critics learn.
    """

    gamma: float = 0.99
    batch_size: int = 256
    buffer_size: int = 1000000
    scale_reward_factor: float = 1.0
    target_ema_rate: float = 0.005
    actor_lr: float = 1e-4
    actor_lr_scheduler: LRConfig = field(default_factory=LRConfig)
    actor_weight_decay: float = 0.0
    critic_lr: float = 1e-3
    critic_lr_scheduler: LRConfig = field(default_factory=lambda: LRConfig(min_lr=1e-3))
    critic_weight_decay: float = 0.0
    max_grad_norm: float | None = None
    n_critic_warmup_itr: int = 0
    n_explore_steps: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "gamma": "(0, 1]",
            "batch_size": "[1, inf)",
            "buffer_size": "[1, inf)",
            "scale_reward_factor": "(0, inf)",
            "target_ema_rate": "(0, 1]",
            "actor_lr": "(0, inf)",
            "actor_weight_decay": "[0, inf)",
            "critic_lr": "(0, inf)",
            "critic_weight_decay": "[0, inf)",
            "max_grad_norm": "(0, inf)",
            "n_critic_warmup_itr": "[0, inf)",
            "n_explore_steps": "[0, inf)",
        }
        require_ranges(self, "algorithm", ranges)
        self.actor_lr_scheduler.require_valid("algorithm.actor_lr_scheduler")
        self.critic_lr_scheduler.require_valid("algorithm.critic_lr_scheduler")


class Explorer:
    """An actor whose first ``steps`` decisions are uniform in [-1, 1]^(Th x Da); ``decide`` makes the others, and all
    deterministic ones. The noise is the policy's.
    """

    def __init__(self, policy: Policy, steps: int, decide: Callable[[Obs, bool], Act]) -> None:
        self.policy = policy
        self.steps = steps
        self.decide = decide

    @property
    def noise(self) -> NoiseStream:
        return self.policy.noise

    @noise.setter
    def noise(self, noise: NoiseStream) -> None:
        self.policy.noise = noise

    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        if deterministic or self.noise.step >= self.steps:
            return self.decide(obs, deterministic)
        normal = self.policy.draw_noise(len(obs["state"]), 1)[0]
        action = torch.erf(normal / math.sqrt(2))
        return Act(action, {"action": action})


@torch.no_grad()
def track(target: nn.Module, source: nn.Module, rate: float | Tensor) -> None:
    """Polyak averaging, target <- target + rate (source - target), of all parameters."""
    old, new = tuple(target.parameters()), tuple(source.parameters())
    change = torch._foreach_sub(new, old)
    torch._foreach_mul_(change, rate)
    torch._foreach_add_(old, change)


def values(critic: Callable[[Obs, Tensor], Tensor], obs: Obs, actions: Tensor) -> Tensor:
    """``critic`` of ``actions`` [n, B, Th, Da], n for every observation: [..., n, B], where one gives [..., B]."""
    result: Tensor = torch.vmap(critic, in_dims=(None, 0))(obs, actions).movedim(0, -2)
    return result


def demonstrations(parts: Parts, gamma: float | None = None) -> Transitions:
    """Those of the configuration, in chunks like the policy's; see `chunk_transitions` for ``gamma``."""
    horizon_steps = parts.policy.horizon_steps
    return chunk_transitions(parts.trajectories(), horizon_steps, parts.act_steps, parts.cond_steps, gamma=gamma)


class OffPolicy(OnlineAlgorithm):
    """An actor and critics that learn from ``replays``: ``replay`` has what was collected; ``offline``, which an
    algorithm may add, has demonstrations, and then gives half of every batch.

    ``trainables`` and ``networks`` go by name; the actor is always among the first. What the trainer collects into
    ``buffer`` moves to the replay buffer at the beginning of the update.
    """

    keep: tuple[str, ...] = ()
    """What to store of an actor's record besides the action."""

    def __init__(self, config: OffPolicyConfig, parts: Parts) -> None:
        c = self.config = config
        self.policy = parts.policy
        self.actor: Actor = Explorer(parts.policy, c.n_explore_steps, self.decide)
        self.device = parts.device
        self.generator = parts.generator
        self.recipe = parts.recipe
        self.buffer: RolloutBuffer = RolloutBuffer(parts.n_steps, parts.num_envs, parts.device)
        self.replay: ReplayBuffer = ReplayBuffer(c.buffer_size, parts.device, self.keep)
        self.replays = {"replay": self.replay}
        self.networks: dict[str, nn.Module] = {}
        self.trainables = {
            "actor": Trainable(
                parts.policy.trained().parameters(),
                c.actor_lr,
                c.actor_lr_scheduler,
                c.actor_weight_decay,
                c.max_grad_norm,
            )
        }
        self.learn = GraphedFunction(self._learn, parts.graphs, idle={"stop": 1.0})
        self.metric_names: dict[tuple[str, ...], tuple[str, ...]] = {}

    @classmethod
    def build(cls, options: Any, parts: Parts) -> Self:
        return cls(options, parts)

    def add_critic(self, name: str, network: M) -> M:
        """``network``, trained from now on as ``trainables[name]`` and with every checkpoint."""
        c = self.config
        self.networks[name] = network
        self.trainables[name] = Trainable(
            network.parameters(), c.critic_lr, c.critic_lr_scheduler, c.critic_weight_decay
        )
        return network

    def add_target(self, name: str, network: M) -> M:
        """A frozen copy of ``network``, to be moved by ``follow``; ``name`` is the copy's."""
        target = copy.deepcopy(network).requires_grad_(False)
        self.networks[name] = target
        return target

    def add_offline(self, parts: Parts, gamma: float | None = None) -> None:
        """Learn from the ``demonstrations``, too."""
        transitions = demonstrations(parts, gamma)
        self.replays["offline"] = ReplayBuffer(len(transitions.reward), parts.device)
        self.replays["offline"].add(transitions)

    @property
    @abstractmethod
    def steps_per_decision(self) -> float:
        """Gradient steps per collected transition, which may be a fraction."""

    @abstractmethod
    def draws(self, due: tuple[str, ...]) -> dict[str, Tensor]:
        """The random numbers of one minibatch."""

    @abstractmethod
    def minibatch(
        self, batch: Transitions, draws: Mapping[str, Tensor], due: tuple[str, ...], stop: Tensor
    ) -> dict[str, Tensor]:
        """One step of each of ``due``, in this order, and the metrics, which are 0-d; a ``stop`` of 1 leaves all
        weights alone. ``draws`` also holds the rows that the batch is of, as ``rows/<replay>``.
        """

    def decide(self, obs: Obs, deterministic: bool) -> Act:
        """What ``actor`` does once exploration is over."""
        return self.policy.act(obs, deterministic)

    def steps(self, iteration: int) -> range:
        """The numbers, counted over the whole run, of this iteration's gradient steps."""
        if iteration * self.buffer.num_steps < self.config.n_explore_steps:
            return range(0)
        rate = self.steps_per_decision * self.buffer.num_steps * self.buffer.num_envs
        return range(math.floor(iteration * rate), math.floor((iteration + 1) * rate))

    def plan(self, iteration: int) -> Iterator[tuple[str, ...]]:
        """What is due in each of this iteration's gradient steps."""
        return (self.due(iteration, step) for step in self.steps(iteration))

    def due(self, iteration: int, step: int) -> tuple[str, ...]:
        """Who takes a step in gradient step number ``step``: the critics, and after their warm-up the actor."""
        warm = iteration >= self.config.n_critic_warmup_itr
        return ("critic", *["actor"] * (self.actor_steps(step) if warm else 0))

    def actor_steps(self, step: int) -> int:
        """How many the actor takes in gradient step number ``step``."""
        return 1

    def sources(self, iteration: int) -> dict[str, int]:
        """How many of a batch's rows come from which of ``replays``."""
        total = self.config.batch_size
        return {"replay": total - total // 2, "offline": total // 2} if "offline" in self.replays else {"replay": total}

    def steps_to_collect(self, iteration: int) -> int:
        return self.buffer.num_steps

    def update(self, iteration: int) -> Metrics:
        """Store what was collected, and take this iteration's gradient steps."""
        if self.steps_to_collect(iteration):
            self.store()
        sources, stop = self.sources(iteration), torch.zeros((), device=self.device)
        totals: dict[tuple[str, ...], Tensor] = {}
        count: Counter[tuple[str, ...]] = Counter()
        for due in self.plan(iteration):
            rows = {f"rows/{name}": self.replays[name].draw(n, self.generator) for name, n in sources.items()}
            values = self.learn({**rows, **self.draws(due), "stop": stop}, due)
            totals[due] = totals[due] + values if due in totals else values.clone()
            count[due] += 1
        return {
            **self._means(totals, count),
            "replay/size": len(self.replay),
            "replay/gradient_steps": count.total(),
            **{f"lr/{name}": trainable.schedule.lr for name, trainable in self.trainables.items()},
        }

    def store(self) -> None:
        """Move what was collected to the replay buffer."""
        self.replay.extend(self.buffer)

    def _learn(self, inputs: Mapping[str, Tensor], due: tuple[str, ...]) -> Tensor:
        """One minibatch and its metrics, in the order of ``metric_names``."""
        parts = [
            replay.gather(inputs[f"rows/{name}"]) for name, replay in self.replays.items() if f"rows/{name}" in inputs
        ]
        batch = Transitions.join(parts)
        batch = batch._replace(reward=batch.reward * self.config.scale_reward_factor)
        with matmul_precision(self.recipe.trained):
            metrics = self.minibatch(batch, inputs, due, inputs["stop"])
        self.metric_names[due] = tuple(metrics)
        return torch.stack([value.detach() for value in metrics.values()])

    def _means(self, totals: Mapping[tuple[str, ...], Tensor], count: Mapping[tuple[str, ...], int]) -> Metrics:
        """Every metric's mean over the minibatches that have it."""
        total: dict[str, Tensor] = {}
        seen: Counter[str] = Counter()
        for due, values in totals.items():
            for name, value in zip(self.metric_names[due], values.unbind(), strict=True):
                total[name] = total.get(name, 0) + value
                seen[name] += count[due]
        return {name: value / seen[name] for name, value in total.items()}

    def descend(self, name: str, loss: Tensor, stop: Tensor) -> None:
        """One step of ``trainables[name]`` down ``loss``; nobody else's gradients are computed."""
        trainable = self.trainables[name]
        trainable.zero_grad()
        loss.backward(inputs=trainable.parameters)  # type: ignore[no-untyped-call]
        trainable.step(stop)

    def follow(self, target: nn.Module, source: nn.Module, stop: Tensor) -> None:
        """Move ``target`` towards ``source`` by ``target_ema_rate``."""
        track(target, source, self.config.target_ema_rate * (1 - stop))

    def randn(self, *shape: int) -> Tensor:
        """Standard normal draws."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def step_schedules(self, iteration: int) -> None:
        for trainable in self.trainables.values():
            trainable.schedule.step()

    def memory(self, obs_shapes: ObsShapes) -> dict[str, int]:
        """Bytes of the replay buffers, and of all weights with their gradients and moments."""
        seen = sum(math.prod(shape) * (4 if name == "state" else 1) for name, shape in obs_shapes.items())
        chunk = 4 * self.policy.horizon_steps * self.policy.action_dim
        kept = sum(chunk if name == "action" else 4 for name in self.keep)
        rows = sum(replay.capacity for replay in self.replays.values())
        parameters = [p for module in self.modules().values() for p in module.parameters()]
        return {
            "replay": rows * (2 * seen + chunk + 4 + 4 + kept),
            "weights": sum(p.nbytes * (4 if p.requires_grad else 1) for p in parameters),
        }

    def modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, **self.networks}

    def state_dict(self) -> dict[str, Any]:
        return {name: trainable.state_dict() for name, trainable in self.trainables.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, trainable in self.trainables.items():
            trainable.load_state_dict(state[name])
