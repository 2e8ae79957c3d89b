"""Demonstrations as transitions, for algorithms that learn from a replay buffer.

Letters besides the package's: M steps of all trajectories together, L steps of one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dppo_fast.data.trajectories import Trajectories
from dppo_fast.replay import Transitions
from dppo_fast.types import UserError


def chunk_transitions(
    trajectories: Trajectories,
    horizon: int,
    act_steps: int,
    obs_steps: int,
    discount: float = 1.0,
    gamma: float | None = None,
) -> Transitions:
    """Every window of ``act_steps`` actions inside one trajectory, as a decision in which they are executed, with the
    actions after them up to ``horizon``. Beyond a trajectory's end its last action is repeated: it is never executed,
    and action-value functions do not see it, but without these windows no decision would reach the end.

    The reward is that of the executed steps, discounted by ``discount`` from step to step. ``terminated`` tells whether
    one of them ended the episode; the windows that end where a trajectory was cut off are left out, because what came
    next is not known. Given ``gamma``, the discount from decision to decision, ``record["reward_to_go"]`` [B] is the
    return up to the first decision that is terminated, or the trajectory's end.

    Raises UserError without rewards and terminals, and where no window is left.
    """
    rewards, terminals = trajectories.rewards, trajectories.terminals
    if rewards is None or terminals is None:
        absent = "rewards" if rewards is None else "terminals"
        raise UserError(f"key {absent!r} is missing; learning values from demonstrations needs rewards and terminals")
    starts, since_start, left, following, chunk_rewards, done, to_go = [], [], [], [], [], [], []
    end = 0
    for length in trajectories.traj_lengths.tolist():
        begin, end = end, end + length
        t = np.arange(max(length - act_steps + 1, 0))
        if not terminals[end - 1]:
            t = t[t + act_steps < length]
        reward = _executed(rewards[begin:end].astype(np.float64), act_steps, discount)
        starts.append(begin + t)
        since_start.append(t)
        left.append(length - 1 - t)
        following.append(np.minimum(t + act_steps, length - 1))
        chunk_rewards.append(reward[t])
        over = _executed(terminals[begin:end].astype(np.float64), act_steps, 1.0) > 0
        done.append(over[t])
        if gamma is not None:
            to_go.append(_to_go(reward, over, act_steps, gamma)[t])
    start, since, then, reward, terminated = map(np.concatenate, (starts, since_start, following, chunk_rewards, done))
    if len(start) == 0:
        raise UserError(f"no trajectory has {act_steps} steps and one more, or {act_steps} and a true end")
    ahead = np.minimum(np.arange(horizon), np.concatenate(left)[:, None])
    ages = np.arange(obs_steps - 1, -1, -1)  # of the observations seen at once, newest last
    first = (start - since)[:, None]
    now, later = (first + np.maximum(at[:, None] - ages, 0) for at in (since, then))
    return Transitions(
        obs={"state": torch.from_numpy(trajectories.states[now])},
        action=torch.from_numpy(trajectories.actions[start[:, None] + ahead]),
        reward=torch.from_numpy(reward).float(),
        next_obs={"state": torch.from_numpy(trajectories.states[later])},
        terminated=torch.from_numpy(terminated).float(),
        record={"reward_to_go": torch.from_numpy(np.concatenate(to_go)).float()} if to_go else {},
    )


def _executed(values: NDArray[np.float64], act_steps: int, discount: float) -> NDArray[np.float64]:
    """[L]: the discounted sum of ``act_steps`` values from each step on, or of those that are left."""
    padded = np.append(values, np.zeros(act_steps - 1))
    total: NDArray[np.float64] = np.convolve(padded, discount ** np.arange(act_steps)[::-1], mode="valid")
    return total


def _to_go(reward: NDArray[np.float64], over: NDArray[np.bool_], act_steps: int, gamma: float) -> NDArray[np.float64]:
    """[L]: the reward of the decision at each step plus, unless it ends the episode, gamma times what follows."""
    result = np.append(reward, np.zeros(act_steps))
    for t in np.flatnonzero(~over)[::-1]:
        result[t] += gamma * result[t + act_steps]
    return result[: len(reward)]
