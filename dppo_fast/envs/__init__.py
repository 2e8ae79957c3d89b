"""Environments: `make_env` is the way in, `ChunkEnv` what it gives for a `Simulator`, which a new family implements.

A family that is vectorised on the device itself has a `make_vec_env` instead.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch

from dppo_fast.envs.chunk import ChunkEnv
from dppo_fast.envs.normalize import Identity, MinMax, Normalization, Running
from dppo_fast.envs.simulator import EnvConfig, Simulator, read_options
from dppo_fast.types import UserError, VecEnv

__all__ = [
    "BACKENDS",
    "ChunkEnv",
    "EnvConfig",
    "Identity",
    "MinMax",
    "Normalization",
    "Running",
    "Simulator",
    "make_env",
    "normalization_of",
    "read_options",
]

logger = logging.getLogger(__name__)


class Family(Protocol):
    """What every backend's module has. `task_ids` of a family with few tasks needs none of its packages."""

    def task_ids(self) -> list[str]: ...


@runtime_checkable
class SimulatorFamily(Family, Protocol):
    def make(self, task_id: str, config: EnvConfig) -> Simulator: ...


@runtime_checkable
class VecEnvFamily(Family, Protocol):
    """Vectorised on the device: chunks, history, normalisation and time limits are its own.

    What it makes has an attribute ``normalization``, None where it needs none; given one, it uses that.
    """

    def make_vec_env(
        self,
        task_id: str,
        config: EnvConfig,
        device: torch.device,
        seed: int,
        normalization: Normalization | None,
        training: bool,
    ) -> VecEnv: ...


@dataclass(frozen=True)
class Backend:
    """A module that is imported when its environments are asked for, and what pip installs for it, where known."""

    module: str
    requirement: str

    def missing(self, error: ImportError) -> str:
        return f"not usable here ({error})" + (f": pip install '{self.requirement}'" if self.requirement else "")

    def load(self) -> SimulatorFamily | VecEnvFamily:
        return cast("SimulatorFamily | VecEnvFamily", importlib.import_module(self.module))


BACKENDS = {
    "kitchen": Backend("dppo_fast.envs.kitchen", "envpool"),
    "envpool": Backend("dppo_fast.envs.envpool", "envpool"),
    "gymnasium": Backend("dppo_fast.envs.gymnasium", "gymnasium[mujoco]"),
    "avoid": Backend("dppo_fast.envs.avoid", "mujoco"),
    "avoid_torch": Backend("dppo_fast.envs.avoid_torch", "dppo-fast"),
    "robomimic": Backend("dppo_fast.envs.robomimic", "dppo-fast[robomimic]"),
    "furniture": Backend("dppo_fast.envs.furniture", ""),
    "own": Backend("dppo_fast.envs.own", ""),
}
"""Name -> backend, in the order in which ``env.backend=auto`` tries them."""

REFERENCE_IDS = {
    "hopper-medium-v2": "Hopper-v4",
    "walker2d-medium-v2": "Walker2d-v4",
    "halfcheetah-medium-v2": "HalfCheetah-v4",
    "avoiding-m5": "avoid",
}
"""The reference's names, which are D4RL's: the bodies of mujoco-py's v2 are v4 here, with the same dims and rewards."""


def make_env(
    config: EnvConfig,
    device: torch.device | str,
    seed: int,
    normalization: Normalization | None = None,
    training: bool = True,
) -> VecEnv:
    """The environment that ``config`` describes: a `ChunkEnv`, or what the family's `make_vec_env` gives.

    An evaluation environment shares the training one's ``normalization`` and has ``training`` False. Raises UserError
    for an unknown id, backend or option, a missing package, a negative seed, and a normalization that does not fit.
    """
    if seed < 0:
        raise UserError(f"seed={seed}: must be at least 0")
    backend, family, task_id = _find(config)
    try:
        if isinstance(family, VecEnvFamily):
            if config.groups > 1:
                raise UserError(f"env.groups={config.groups}: {config.id} steps all its envs at once; use 1")
            return family.make_vec_env(task_id, config, torch.device(device), seed, normalization, training)
        simulator = family.make(task_id, config)
    except ImportError as error:
        raise UserError(f"env.id={config.id}: {backend.missing(error)}") from error
    return ChunkEnv(
        simulator,
        normalization or _make_normalization(config, simulator),
        act_steps=config.act_steps,
        obs_steps=config.obs_steps,
        max_episode_steps=config.max_episode_steps,
        device=device,
        seed=seed,
        training=training,
        time_limit_terminates=config.time_limit_terminates,
        image_steps=config.image_steps,
        groups=config.groups,
    )


def normalization_of(env: VecEnv) -> Normalization | None:
    """How ``env`` maps to the policy's units; None where the policy sees the env's own."""
    return cast("Normalization | None", getattr(env, "normalization", None))


def _find(config: EnvConfig) -> tuple[Backend, SimulatorFamily | VecEnvFamily, str]:
    """The backend of an environment, its module, and the environment's name there."""
    if config.backend != "auto" and config.backend not in BACKENDS:
        raise UserError(f"env.backend={config.backend}: unknown; choose from auto, {', '.join(BACKENDS)}")
    name = REFERENCE_IDS.get(config.id, config.id)
    package, _, task_id = name.rpartition(":")
    if package:
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UserError(f"env.id={config.id}: cannot import {package} ({error})") from error
        if isinstance(cls := getattr(module, task_id, None), type):
            libraries = {base.__module__.partition(".")[0] for base in cls.__mro__}
            backend = BACKENDS["gymnasium" if "gymnasium" in libraries else "own"]
            return replace(backend, requirement=""), backend.load(), name

    known: list[str] = []
    missing: list[str] = []
    for name, backend in BACKENDS.items():
        if config.backend not in ("auto", name):
            continue
        try:
            family = backend.load()
        except ImportError as error:
            missing.append(f"{name} is {backend.missing(error)}")
            continue
        if task_id in (ids := family.task_ids()):
            logger.info("env.id=%s: %s through %s", config.id, task_id, name)
            return backend, family, task_id
        known += ids
    nearest = get_close_matches(config.id, dict.fromkeys([*known, *REFERENCE_IDS]), n=5, cutoff=0.5)
    reasons = ([f"unknown; nearest names: {', '.join(nearest) or 'none'}"] if known else []) + missing
    raise UserError(f"env.id={config.id}, env.backend={config.backend}: " + "; ".join(reasons))


def _make_normalization(config: EnvConfig, simulator: Simulator) -> Normalization:
    (obs_dim,), low, high = simulator.obs_shapes["state"], simulator.action_low, simulator.action_high
    if config.normalization not in ("none", "running"):
        return MinMax.load(config.normalization, obs_dim, len(low))
    if not np.isfinite([low, high]).all():
        raise UserError(f"env.normalization={config.normalization}: {config.id} has unbounded actions; give a file")
    return Identity(low, high) if config.normalization == "none" else Running(low, high, obs_dim)
