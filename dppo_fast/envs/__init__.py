"""Environments: `make_env` is the way in, `ChunkEnv` what it gives, `Simulator` what a new family implements."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol, cast

import numpy as np
import torch

from dppo_fast.envs.chunk import ChunkEnv
from dppo_fast.envs.normalize import Identity, MinMax, Normalization, Running
from dppo_fast.envs.simulator import EnvConfig, Simulator
from dppo_fast.types import UserError

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
]

logger = logging.getLogger(__name__)


class BackendModule(Protocol):
    """The two functions of a backend's module."""

    def task_ids(self) -> list[str]: ...

    def make(self, task_id: str, config: EnvConfig) -> Simulator: ...


@dataclass(frozen=True)
class Backend:
    """A module that is imported when its environments are asked for, and what pip installs to make that work."""

    module: str
    requirement: str

    def load(self) -> BackendModule:
        return cast(BackendModule, importlib.import_module(self.module))


BACKENDS = {
    "envpool": Backend("dppo_fast.envs.envpool", "envpool"),
    "gymnasium": Backend("dppo_fast.envs.gymnasium", "gymnasium[mujoco]"),
}
"""Name -> backend, in the order in which ``env.backend=auto`` tries them."""

REFERENCE_IDS = {
    "hopper-medium-v2": "Hopper-v4",
    "walker2d-medium-v2": "Walker2d-v4",
    "halfcheetah-medium-v2": "HalfCheetah-v4",
}
"""The reference's names, which are D4RL's: the bodies of mujoco-py's v2 are v4 here, with the same dims and rewards."""


def make_env(
    config: EnvConfig,
    device: torch.device | str,
    seed: int,
    normalization: Normalization | None = None,
    training: bool = True,
) -> ChunkEnv:
    """The environment that ``config`` describes.

    An evaluation environment shares the training one's ``normalization`` and has ``training`` False. Raises UserError
    for an unknown id or backend, a missing package, a negative seed, and a normalization that does not fit.
    """
    if seed < 0:
        raise UserError(f"seed={seed}: must be at least 0")
    simulator = _make_simulator(config)
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
    )


def _make_simulator(config: EnvConfig) -> Simulator:
    if config.backend != "auto" and config.backend not in BACKENDS:
        raise UserError(f"env.backend={config.backend}: unknown; choose from auto, {', '.join(BACKENDS)}")
    package, _, task_id = REFERENCE_IDS.get(config.id, config.id).rpartition(":")
    if package:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UserError(f"env.id={config.id}: cannot import {package} ({error})") from error

    known: list[str] = []
    missing: list[str] = []
    for name in BACKENDS if config.backend == "auto" else [config.backend]:
        try:
            backend = BACKENDS[name].load()
        except ImportError as error:
            missing.append(f"{name} is not usable here ({error}): pip install '{BACKENDS[name].requirement}'")
            continue
        if task_id in (ids := backend.task_ids()):
            logger.info("env.id=%s: %s through %s", config.id, task_id, name)
            return backend.make(task_id, config)
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
