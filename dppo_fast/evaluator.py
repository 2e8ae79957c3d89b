"""Evaluation in environments of its own, with seeds of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from dppo_fast.types import Actor, NoiseStream, VecEnv


@dataclass(frozen=True)
class Episodes:
    """E whole episodes, ordered by env: ``returns``, ``scores`` that decide on ``success``, ``lengths`` in env steps,
    all [E].
    """

    returns: NDArray[np.float64]
    scores: NDArray[np.float64]
    success: NDArray[np.bool_]
    lengths: NDArray[np.int64]

    def statistics(self) -> dict[str, float]:
        return {
            "return": float(self.returns.mean()),
            "return_std": float(self.returns.std()),
            "return_p10": float(np.quantile(self.returns, 0.1)),
            "return_p90": float(np.quantile(self.returns, 0.9)),
            "success_rate": float(self.success.mean()),
            "best_reward": float(self.scores.mean()),
            "episode_length": float(self.lengths.mean()),
            "episodes": float(len(self.returns)),
        }


class Evaluator:
    """Runs ``episodes`` episodes, by default one in each env that ``make_env`` builds, always from the same seed. Every
    env runs as many as the others, or one less, so that short episodes do not count more often than long ones.

    The actor's noise comes from that seed as well, so evaluations are comparable with each other and leave the
    training's noise alone. Success is an episode's best chunk reward per env step (``sparse_reward``: its
    return) reaching ``success_threshold``.
    """

    def __init__(
        self,
        make_env: Callable[[], VecEnv],
        seed: int,
        success_threshold: float,
        sparse_reward: bool = False,
        deterministic: bool = True,
        episodes: int | None = None,
    ) -> None:
        self.make_env = make_env
        self.seed = seed
        self.success_threshold = success_threshold
        self.sparse_reward = sparse_reward
        self.deterministic = deterministic
        self.episodes = episodes

    def evaluate(self, actor: Actor) -> dict[str, float]:
        """Statistics over the episodes, lengths in env steps."""
        return self.run(actor).statistics()

    def run(self, actor: Actor, progress: Callable[[int], object] = lambda done: None) -> Episodes:
        """The episodes themselves; ``progress`` is told how many are done."""
        training_noise = actor.noise
        env = self.make_env()
        try:
            obs = env.reset(self.seed)
            actor.noise = NoiseStream(self.seed)
            n, total = env.num_envs, self.episodes or env.num_envs
            left = total // n + (np.arange(n) < total % n)  # episodes, those that run included
            returns, best, chunks = np.zeros(n), np.full(n, -np.inf), np.zeros(n, np.int64)
            ended: list[tuple[int, float, float, int]] = []
            while left.any():
                step = env.step(actor.act(obs, self.deterministic).action[:, : env.act_steps])
                obs = step.obs
                reward = step.reward.cpu().double().numpy()
                returns += reward
                best = np.maximum(best, reward)
                chunks += 1
                over = np.flatnonzero((step.terminated | step.truncated).cpu().numpy())
                ended += [(i, returns[i], best[i], chunks[i]) for i in over.tolist() if left[i]]
                returns[over], best[over], chunks[over] = 0.0, -np.inf, 0
                left[over] = np.maximum(left[over] - 1, 0)
                progress(len(ended))
        finally:
            actor.noise = training_noise
            env.close()
        _, returns, best, chunks = (np.array(column) for column in zip(*sorted(ended, key=itemgetter(0)), strict=True))
        scores = returns if self.sparse_reward else best / env.act_steps
        return Episodes(returns, scores, scores >= self.success_threshold, chunks * env.act_steps)
