"""Plain gymnasium environments, one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.spaces import Box, Dict, Space
from numpy.typing import NDArray

from dppo_fast.envs.simulator import Array, EnvConfig, Ids
from dppo_fast.runtime.gl import require_gl
from dppo_fast.types import UserError

Leaf: TypeAlias = tuple[str, ...]
"""The keys that lead to one space of nested Dicts."""


def task_ids() -> list[str]:
    """All registered environments."""
    return list(gymnasium.registry)


def make(task_id: str, config: EnvConfig) -> GymnasiumSimulator:
    """``options`` are the keyword arguments of the environment's constructor."""
    return GymnasiumSimulator(task_id, config.num_envs, config.options)


class GymnasiumSimulator:
    """A `Simulator` of N environments with Box actions; ``task_id`` is registered or of the form ``module:Class``."""

    def __init__(self, task_id: str, num_envs: int, options: Mapping[str, Any] | None = None) -> None:
        spec = gymnasium.spec(task_id) if task_id in gymnasium.registry else EnvSpec(task_id, task_id)
        assert spec.entry_point is not None
        creator = spec.entry_point if callable(spec.entry_point) else load_env_creator(spec.entry_point)
        modes = getattr(creator, "metadata", {}).get("render_modes", [])
        arguments = {"render_mode": "rgb_array"} if "rgb_array" in modes else {}
        arguments |= options or {}
        try:
            self._envs = [
                gymnasium.make(spec, disable_env_checker=True, max_episode_steps=-1, **arguments)
                for _ in range(num_envs)
            ]
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(f"env.id={task_id}: {error}") from error
        except TypeError as error:
            if not options:
                raise
            raise UserError(f"env.options={dict(options)}: {task_id} does not take them ({error})") from error
        self.num_envs = num_envs
        self._task_id = task_id
        self._layout = Layout(task_id, self._envs[0].observation_space)
        self.obs_shapes = self._layout.shapes
        self.action_low, self.action_high = action_bounds(task_id, self._envs[0].action_space)
        self._action_dtype = self._envs[0].action_space.dtype

    def seed(self, seed: int, resets: Ids) -> None:
        """Each episode of each env has its own seed, so resets need not be repeated."""
        self._seed, self._resets = seed, resets.copy()

    def reset(self, ids: Ids) -> dict[str, Array]:
        rows = []
        for i in ids:
            episode = np.random.SeedSequence(self._seed, spawn_key=(i, self._resets[i]))
            rows.append(self._envs[i].reset(seed=int(episode.generate_state(1)[0]))[0])
            self._resets[i] += 1
        return self._stack(rows)

    def step(self, actions: NDArray[np.float64], ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
        actions = actions.astype(self._action_dtype)
        steps = [self._envs[i].step(action) for i, action in zip(ids, actions, strict=True)]
        rows, *outcome, _ = zip(*steps, strict=True)
        reward, terminated, truncated = map(np.array, outcome)
        return self._stack(rows), reward, terminated, truncated

    def render(self, env: int) -> NDArray[np.uint8]:
        if hasattr(self._envs[env].unwrapped, "mujoco_renderer"):
            require_gl(f"env.id={self._task_id}")
        try:
            picture = self._envs[env].render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(f"render: env.id={self._task_id}: {error}") from error
        if not isinstance(picture, np.ndarray):
            raise UserError(f"render: env.id={self._task_id} has no render mode rgb_array")
        return picture

    def close(self) -> None:
        for env in self._envs:
            env.close()

    def _stack(self, rows: Any) -> dict[str, Array]:
        return self._layout.read(lambda leaf: np.stack([reduce(getitem, leaf, row) for row in rows]))


class Layout:
    """Where in an observation space the state and the cameras are.

    The state [Do] is every floating-point Box of nested Dicts, flattened, in the space's own order; every Box of uint8
    of rank three is a camera of that name, [C, H, W] or [H, W, C]. Raises UserError for any other space.
    """

    def __init__(self, task_id: str, space: Space[Any]) -> None:
        leaves = dict(_leaves(space))
        self._state: list[Leaf] = []
        self._cameras: dict[str, Leaf] = {}
        self.shapes: dict[str, tuple[int, ...]] = {"state": (0,)}
        for leaf, box in leaves.items():
            rank, kind = (len(box.shape), box.dtype.kind) if isinstance(box, Box) else (0, "")
            name = ".".join(leaf)
            if kind == "f" and rank < 3:
                self._state.append(leaf)
                self.shapes["state"] = (self.shapes["state"][0] + int(np.prod(box.shape)),)
            elif kind == "u" and rank == 3 and leaf:
                self._cameras[name] = leaf
                self.shapes[name] = (box.shape[2], *box.shape[:2]) if _channels_last(box.shape) else box.shape
            else:
                raise _wrong_space(task_id, name or "state", box)
        if not self._state:
            raise _wrong_space(task_id, "state", None)

    def read(self, values: Any) -> dict[str, Array]:
        """``values`` gives the batch [n, ...] of a leaf."""
        pieces = [values(leaf) for leaf in self._state]
        pieces = [piece.reshape(len(piece), -1) for piece in pieces]
        obs = {"state": pieces[0] if len(pieces) == 1 else np.concatenate(pieces, 1)}
        for name, leaf in self._cameras.items():
            image = values(leaf)
            obs[name] = np.moveaxis(image, -1, 1) if _channels_last(image.shape[1:]) else image
        return obs


def action_bounds(task_id: str, space: Space[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest action, each [Da]. Raises UserError where actions are of another kind."""
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise UserError(f"env.id={task_id}: actions are {space}; needed is a Box of shape [Da]")
    return space.low.astype(np.float64), space.high.astype(np.float64)


def _leaves(space: Space[Any], path: Leaf = ()) -> Iterator[tuple[Leaf, Any]]:
    if not isinstance(space, Dict):
        yield path, space
        return
    for name, part in space.spaces.items():
        yield from _leaves(part, (*path, name))


def _wrong_space(task_id: str, name: str, space: Any) -> UserError:
    return UserError(
        f"env.id={task_id}: observation {name} is {space}; needed are floating-point Boxes of rank 2 at most, which "
        "make up the state, and, where there are cameras, uint8 Boxes [C, H, W] or [H, W, C]"
    )


def _channels_last(shape: tuple[int, ...]) -> bool:
    """Whether this is [H, W, C], and not [C, H, W]: an image has more pixels a side than channels."""
    return len(shape) == 3 and shape[2] < shape[0]
