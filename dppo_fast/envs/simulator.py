"""What a family of CPU environments implements; `ChunkEnv` makes a `VecEnv` of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, get_args, get_origin, get_type_hints, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dppo_fast.types import UserError

T = TypeVar("T")

Array: TypeAlias = NDArray[Any]
Ids: TypeAlias = NDArray[np.int64]
"""Indices of some of the N envs, ascending."""


@dataclass(frozen=True)
class EnvConfig:
    """The environment of a run.

    ``id`` is a task of one of the backends (``Hopper-v4``), one of the reference's names (``hopper-medium-v2``), or
    ``module:Name``: a class of that module, which is a gymnasium environment or a `VecEnv` (`dppo_fast.envs.own`), or
    an id that importing the module registers with gymnasium. ``normalization`` is the path of a normalization file,
    ``none`` or ``running``. ``num_threads`` 0 means one per core; it also counts the worker processes of families that
    have them. ``time_limit_terminates`` reports time limits as terminations, as the reference's gym environments do.
    ``options`` are the family's own, see `read_options`. With ``groups`` 2, half of the envs steps while the policy
    decides for the other half.
    """

    id: str
    num_envs: int
    act_steps: int
    obs_steps: int = 1
    image_steps: int = 1
    backend: str = "auto"
    max_episode_steps: int = 1000
    normalization: str = "none"
    num_threads: int = 0
    time_limit_terminates: bool = False
    groups: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in fields(self):
            value = getattr(self, key.name)
            least = 0 if key.name == "num_threads" else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise UserError(f"env.{key.name}={value}: must be at least {least}")
        if self.groups > self.num_envs:
            raise UserError(f"env.groups={self.groups}: must be at most env.num_envs={self.num_envs}")
        if self.groups > 1 and self.normalization == "running":
            raise UserError(f"env.groups={self.groups}: env.normalization=running learns from all envs at once; use 1")


def read_options(schema: type[T], config: EnvConfig) -> T:
    """``config.options`` as a family's dataclass, all of whose fields have defaults.

    Raises UserError for a key that it does not have and for a value of another type.
    """
    types = get_type_hints(schema)
    require_options(config, types)
    for name, value in config.options.items():
        if not _is_a(types[name], value):
            raise UserError(f"env.options.{name}={value}: must be {_describe(types[name])}")
    return schema(**config.options)


def require_options(config: EnvConfig, known: Iterable[str]) -> None:
    """Raise UserError where ``config.options`` has a key that is not ``known``."""
    known = list(known)
    for name in config.options:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.5)
            meant = f" (did you mean {' or '.join(near)}?)" if near else ""
            choice = f"choose from {', '.join(known)}" if known else "it takes none"
            raise UserError(f"env.options.{name} is unknown to env.id={config.id}{meant}; {choice}")


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return str(hint) if get_args(hint) else str(hint.__name__)


def _is_a(hint: Any, value: Any) -> bool:
    """Whether ``value``, of YAML's types, is of type ``hint``: a scalar, list, dict, Literal, or a union of them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_is_a(arguments[0], item) for item in value)
    if arguments and origin is not dict:
        return any(_is_a(argument, value) for argument in arguments)
    return isinstance(value, origin or hint)


class Simulator(Protocol):
    """N environments without a time limit, stepped one step at a time on any subset, in NumPy and in their own units.

    Observations are dicts: ``state`` [n, Do] floating point, cameras [n, C, H, W] uint8; rows follow ``ids``.
    Same seed, same numbers of resets, same actions since the last reset: same state, however the envs were grouped.
    """

    num_envs: int
    obs_shapes: Mapping[str, tuple[int, ...]]
    action_low: NDArray[np.float64]
    action_high: NDArray[np.float64]

    def seed(self, seed: int, resets: Ids) -> None:
        """Let all randomness follow from ``seed``, as if env i had been reset ``resets[i]`` times since."""
        ...

    def reset(self, ids: Ids) -> dict[str, Array]:
        """Start a new episode in the envs ``ids``."""
        ...

    def step(self, actions: NDArray[np.float64], ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
        """Apply ``actions`` [n, Da] to the envs ``ids``: observation, reward [n], terminated [n], truncated [n].

        An env that has ended is not stepped again before it is reset.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Drawing(Protocol):
    """A `Simulator` that has pictures."""

    def render(self, env: int) -> NDArray[np.uint8]:
        """How one env looks now [H, W, 3]. Raises UserError where there is no OpenGL (`dppo_fast.runtime.gl`)."""
        ...
