"""Collecting experience, and what its episodes were worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dppo_fast.buffer import RolloutBuffer
from dppo_fast.types import Actor, Obs, Record, Step, VecEnv


class EpisodeStatistics:
    """Returns of the episodes that end inside a rollout; unfinished ones are carried over to the next.

    An episode's best reward is its largest chunk reward per env step, or, with ``sparse_reward``, its return; it
    succeeds when that reaches ``success_threshold``. ``whole_only`` counts as the reference does: only episodes that
    also began inside the rollout, and not those of a single chunk.
    """

    def __init__(
        self,
        num_envs: int,
        act_steps: int,
        success_threshold: float,
        sparse_reward: bool = False,
        whole_only: bool = False,
    ) -> None:
        self.act_steps = act_steps
        self.success_threshold = success_threshold
        self.sparse_reward = sparse_reward
        self.whole_only = whole_only
        self.returns = np.zeros(num_envs)
        self.best = np.full(num_envs, -np.inf)
        self.chunks = np.zeros(num_envs, dtype=np.int64)

    def update(self, reward: NDArray[np.floating[Any]], first: NDArray[np.bool_]) -> dict[str, float]:
        """Account for ``reward`` [T, N]; ``first`` [T + 1, N] marks decisions that begin an episode."""
        returns, best, chunks = [], [], []
        for t, row in enumerate(reward):
            began = first[t]
            self.returns[began], self.best[began], self.chunks[began] = 0.0, -np.inf, 0
            if self.whole_only and t == 0:
                self.chunks[~began] = np.iinfo(np.int64).min
            self.returns += row
            self.best = np.maximum(self.best, row)
            self.chunks += 1
            ended = first[t + 1] & (self.chunks > (1 if self.whole_only else 0))
            returns.append(self.returns[ended])
            best.append(self.best[ended])
            chunks.append(self.chunks[ended])
        total = np.concatenate(returns)
        n = len(total)
        if n == 0:
            return {"episodes": 0.0}
        score = total if self.sparse_reward else np.concatenate(best) / self.act_steps
        return {
            "episodes": float(n),
            "return": float(total.mean()),
            "return_std": float(total.std()),
            "best_reward": float(score.mean()),
            "success_rate": float((score >= self.success_threshold).mean()),
            "episode_chunks": float(np.concatenate(chunks).mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"returns": self.returns, "best": self.best, "chunks": self.chunks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.returns, self.best, self.chunks = (
            torch.as_tensor(state[key]).numpy().copy() for key in ("returns", "best", "chunks")
        )


class GroupedEnv(VecEnv, Protocol):
    """A `VecEnv` that executes chunks in slices of its envs, its ``groups``, while something else goes on."""

    groups: Sequence[slice]

    def start(self, action: torch.Tensor, group: int) -> None:
        """Begin to execute ``action`` [n, act_steps, Da] in a group."""
        ...

    def finish(self, group: int) -> Step:
        """What came of it, once it is done."""
        ...


class Collector:
    """Drives an env with an actor and fills a buffer. Where the env has several groups, one steps while the actor
    decides for the next, with the same results.
    """

    def __init__(self, env: VecEnv, actor: Actor, statistics: EpisodeStatistics) -> None:
        self.env = env
        self.actor = actor
        self.statistics = statistics
        self.first: torch.Tensor | None = None
        self.obs: Obs = {}

    def reset(self, seed: int | None = None) -> None:
        self.obs = self.env.reset(seed)
        device = self.obs["state"].device
        self.first = torch.ones(self.env.num_envs, dtype=torch.bool, device=device)

    def collect(self, buffer: RolloutBuffer, deterministic: bool = False) -> dict[str, float]:
        """Fill ``buffer`` and return the statistics of the episodes that ended."""
        assert self.first is not None, "reset() or load_state_dict() comes first"
        buffer.clear()
        groups = getattr(self.env, "groups", ())
        (self._collect_overlapped if len(groups) > 1 else self._collect)(buffer, deterministic)
        first = torch.cat((buffer.first, self.first[None])).cpu().numpy()
        return self.statistics.update(buffer.reward.cpu().double().numpy(), first)

    def _collect(self, buffer: RolloutBuffer, deterministic: bool) -> None:
        assert self.first is not None
        for _ in range(buffer.num_steps):
            act = self.actor.act(self.obs, deterministic)
            buffer.add(self.obs, act.record, self.first)
            step = self.env.step(act.action[:, : self.env.act_steps])
            buffer.complete(step)
            self.obs = step.obs
            self.first = step.terminated | step.truncated

    def _collect_overlapped(self, buffer: RolloutBuffer, deterministic: bool) -> None:
        assert self.first is not None
        env, noise = cast(GroupedEnv, self.env), self.actor.noise
        obs = [{name: value[rows] for name, value in self.obs.items()} for rows in env.groups]
        for t in range(buffer.num_steps + 1):
            records: list[Record] = []
            steps: list[Step] = []
            decision = noise.step
            for group, rows in enumerate(env.groups):
                if t > 0:
                    steps.append(env.finish(group))
                    obs[group] = steps[group].obs
                if t < buffer.num_steps:
                    noise.step, noise.first_env = decision, rows.start
                    act = self.actor.act(obs[group], deterministic)
                    env.start(act.action[:, : env.act_steps], group)
                    # a CUDA graph writes the next group's record over this one
                    records.append({name: value.clone() for name, value in act.record.items()})
            if t > 0:
                step = _join_steps(steps)
                buffer.complete(step)
                self.obs, self.first = step.obs, step.terminated | step.truncated
            if t < buffer.num_steps:
                buffer.add(self.obs, _join(records), self.first)
        noise.first_env = 0

    def state_dict(self) -> dict[str, Any]:
        return {"env": self.env.state_dict(), "first": self.first, "statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.obs = self.env.load_state_dict(state["env"])
        first = state["first"].to(self.obs["state"].device)
        self.first = torch.ones_like(first) if getattr(self.env, "restarted", False) else first
        self.statistics.load_state_dict(state["statistics"])


def _join(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _join_steps(steps: Sequence[Step]) -> Step:
    """One step of all envs, of those of their groups."""

    def join(of: Callable[[Step], torch.Tensor]) -> torch.Tensor:
        return torch.cat([of(step) for step in steps])

    ended = any(step.final_obs is not None for step in steps)
    broken = any(step.valid is not None for step in steps)
    return Step(
        obs=_join([step.obs for step in steps]),
        final_obs=_join([step.final_obs or step.obs for step in steps]) if ended else None,
        reward=join(lambda step: step.reward),
        terminated=join(lambda step: step.terminated),
        truncated=join(lambda step: step.truncated),
        valid=join(lambda s: torch.ones_like(s.truncated) if s.valid is None else s.valid) if broken else None,
    )
