"""Evaluation in environments of its own, with seeds of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dppo_fast.types import Actor, NoiseStream, VecEnv


class Evaluator:
    """Runs one episode in each env that ``make_env`` builds, always from the same seed.

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
    ) -> None:
        self.make_env = make_env
        self.seed = seed
        self.success_threshold = success_threshold
        self.sparse_reward = sparse_reward
        self.deterministic = deterministic

    def evaluate(self, actor: Actor) -> dict[str, float]:
        """Statistics over all envs' first episodes, lengths in env steps."""
        training_noise = actor.noise
        env = self.make_env()
        try:
            obs = env.reset(self.seed)
            actor.noise = NoiseStream(self.seed)
            returns, best = np.zeros(env.num_envs), np.full(env.num_envs, -np.inf)
            chunks, running = np.zeros(env.num_envs), np.ones(env.num_envs, dtype=np.bool_)
            while running.any():
                step = env.step(actor.act(obs, self.deterministic).action[:, : env.act_steps])
                obs = step.obs
                reward = step.reward.cpu().double().numpy()
                returns += reward * running
                best = np.maximum(best, np.where(running, reward, -np.inf))
                chunks += running
                running &= ~(step.terminated | step.truncated).cpu().numpy()
        finally:
            actor.noise = training_noise
            env.close()
        score = returns if self.sparse_reward else best / env.act_steps
        return {
            "return": float(returns.mean()),
            "return_std": float(returns.std()),
            "return_p10": float(np.quantile(returns, 0.1)),
            "return_p90": float(np.quantile(returns, 0.9)),
            "success_rate": float((score >= self.success_threshold).mean()),
            "best_reward": float(score.mean()),
            "episode_length": float(chunks.mean() * env.act_steps),
            "episodes": float(env.num_envs),
        }
