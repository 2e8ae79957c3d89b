"""The words that every part of the package shares.

Letters, the same in every file: T steps, N envs, B batch, S denoising steps sampled, F fine-tuned denoising steps, K
the training schedule's length, To observation steps, Ta action chunk, Do, Da dimensions, C H W image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol, TypeAlias

from torch import Tensor

Obs: TypeAlias = dict[str, Tensor]
"""Observations, newest last: ``state`` [N, To, Do] float32, cameras [N, To, C, H, W] uint8."""

Record: TypeAlias = dict[str, Tensor]
"""What a policy needs to score one of its own actions again; every tensor leads with N."""

Metrics: TypeAlias = dict[str, Tensor | float]
"""Name -> scalar. Tensors are 0-d, on the device, and read once per iteration."""

ObsShapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Name -> shape of one observation without the leading N, e.g. ``{"state": (To, Do)}``."""


class UserError(ValueError):
    """A user's mistake: the message names the key, the value and what would be right. The mains print it and exit
    with 2.
    """


def require_ranges(config: object, key: str, ranges: Mapping[str, str]) -> None:
    """Raise UserError where an attribute of ``config``, whose key in the configuration is ``key``, leaves its interval.

    ``ranges`` maps attributes to intervals, written as in ``(0, 1]`` and ``[1, inf)``; None is in every interval.
    """
    for name, interval in ranges.items():
        value = attrgetter(name)(config)
        if value is None:
            continue
        low, high = map(float, interval[1:-1].split(","))
        closed = [end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in "[]"]
        if not (low < value < high or value in closed):
            raise UserError(f"{key}.{name}={value}".removeprefix(".") + f" must lie in {interval}")


@dataclass(frozen=True)
class Act:
    """A decision for N envs: ``action`` [N, Th, Da] in [-1, 1] over the policy's horizon, and its ``record``."""

    action: Tensor
    record: Record


@dataclass(frozen=True)
class Step:
    """What N envs answer to one action chunk.

    ``obs`` is where the next decision is taken, so after an episode's end it is the next episode's first observation.
    ``final_obs`` holds, in the rows where ``terminated | truncated``, the last observation of the episode that just
    ended (other rows repeat ``obs``); it is None when no episode ended. ``reward`` [N] float32 is summed over the
    chunk. ``terminated`` and ``truncated`` [N] bool are never both set. ``valid`` [N] bool is None, or False where
    the simulator produced NaN or Inf: that env was reset, its step counts as truncated, and must not be learned from.
    """

    obs: Obs
    final_obs: Obs | None
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor | None = None


class VecEnv(Protocol):
    """N environments that execute action chunks; tensors in, tensors out, on ``device``."""

    num_envs: int
    obs_shapes: ObsShapes
    action_dim: int
    act_steps: int
    max_episode_steps: int

    def reset(self, seed: int | None = None) -> Obs:
        """Start a new episode everywhere; with a seed, all randomness from here on follows from it."""
        ...

    def step(self, action: Tensor) -> Step:
        """Execute ``action`` [N, act_steps, Da], normalised to [-1, 1]."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to continue bit for bit."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        """Return to the saved moment and give the observation there. An env that cannot starts fresh episodes and has
        an attribute ``restarted``, which is True then.
        """
        ...

    def close(self) -> None: ...


@dataclass
class NoiseStream:
    """Where an actor's noise comes from. What env n gets for its decision number ``step`` follows from ``seed``, n and
    ``step`` alone (`dppo_fast.kernels.philox`). The next decision is for the envs from number ``first_env`` on.
    """

    seed: int
    step: int = 0
    first_env: int = 0


class Actor(Protocol):
    """What the collector and the evaluator drive."""

    noise: NoiseStream

    def act(self, obs: Obs, deterministic: bool = False) -> Act: ...
