"""Furniture-Bench (Heo et al. 2023, arXiv 2305.12821) in IsaacGym, by ``FurnitureRLSimEnv`` of ankile/furniture-bench.

IsaacGym needs a Python too old for this package, so the simulator runs in that Python's own process
(`dppo_fast.envs.furniture_server`), and a chunk's actions, observations and rewards go through shared memory.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import tempfile
import weakref
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dppo_fast.envs import furniture_server
from dppo_fast.envs.furniture_server import ACTION_DIM, Host, layout, map_arrays
from dppo_fast.envs.normalize import BoundedMinMax, Identity, MinMax, Normalization
from dppo_fast.envs.simulator import EnvConfig, read_options
from dppo_fast.types import Obs, ObsShapes, Step, UserError

logger = logging.getLogger(__name__)

PARTS = {"one_leg": 5, "lamp": 3, "round_table": 3}
"""Name -> number of parts. An obstacle is one more; each has a pose of 7 numbers."""

ROBOT_DIM = 14
"""Position 3, quaternion 4 (xyzw), velocities 6 and the gripper's width; with the rotation in 6-D it has 16 numbers."""

RESET_ATTEMPTS = 5
INSTALL = "install IsaacGym and github.com/ankile/furniture-bench into a Python 3.8"


@dataclass(frozen=True)
class Options:
    """``python`` is the interpreter that has IsaacGym; None: this one, in this process."""

    randomness: Literal["low", "med"] = "low"
    headless: bool = True
    gpu_id: int = 0
    python: str | None = None


def task_ids() -> list[str]:
    return list(PARTS)


def make_vec_env(
    task_id: str,
    config: EnvConfig,
    device: torch.device,
    seed: int,
    normalization: Normalization | None,
    training: bool,
) -> FurnitureVecEnv:
    """Raises UserError where the simulator cannot be started or has other dims than the task."""
    options = read_options(Options, config)
    normalization = normalization or _load_normalization(task_id, config.normalization)
    arguments = {
        "furniture": task_id,
        "num_envs": config.num_envs,
        "max_env_steps": config.max_episode_steps,
        "randomness": options.randomness,
        "headless": options.headless,
        "gpu_id": options.gpu_id,
    }
    simulator: FurnitureSimulator
    if options.python is not None:
        simulator = RemoteHost(options.python, arguments, config.act_steps)
    else:
        try:
            simulator = Host(arguments)
        except ImportError as error:
            raise UserError(
                f"env.id={task_id}: this Python cannot import the simulator ({error}); {INSTALL}, and give its path "
                "as env.options.python"
            ) from error
    if simulator.sizes != (expected := [ROBOT_DIM, _poses_dim(task_id)]):
        simulator.close()
        raise UserError(
            f"env.id={task_id}: robot_state and parts_poses have {simulator.sizes} values, expected {expected}: this "
            "is another version of furniture-bench"
        )
    return FurnitureVecEnv(simulator, task_id, config, device, seed, normalization)


class FurnitureSimulator(Protocol):
    """What `Host` and `RemoteHost` have in common."""

    sizes: list[int]

    def reset(self, ids: list[int], seed: int | None = None) -> Tensor: ...

    def run(self, actions: Tensor) -> tuple[Tensor, Tensor]: ...

    def close(self) -> None: ...


class FurnitureVecEnv:
    """The `VecEnv` of a simulator that steps all its envs at once. Conversion and normalisation happen on ``device``.

    A chunk is executed whole, so an episode ends with the chunk in which it reaches its time limit; nothing else ends
    it, but for NaN or Inf from the simulator, which end it at the last finite observation, as in `ChunkEnv`.
    """

    def __init__(
        self,
        simulator: FurnitureSimulator,
        task_id: str,
        config: EnvConfig,
        device: torch.device,
        seed: int,
        normalization: Normalization,
    ) -> None:
        self.num_envs, self.act_steps, self.action_dim = config.num_envs, config.act_steps, ACTION_DIM
        self.max_episode_steps = config.max_episode_steps
        obs_dim = state_dim(task_id)
        self.obs_shapes: ObsShapes = {"state": (config.obs_steps, obs_dim)}
        self.normalization = normalization
        self.nan_count, self.restarted = 0, False
        self._simulator, self._device, self._seed, self._started = simulator, device, seed, False
        self._time_limit_terminates = config.time_limit_terminates
        self._read_normalization()
        self._history = torch.zeros(self.num_envs, config.obs_steps, obs_dim, device=device)
        self._elapsed = torch.zeros(self.num_envs, dtype=torch.int64, device=device)  # steps of the running episodes

    def reset(self, seed: int | None = None) -> Obs:
        if seed is not None or not self._started:
            self._seed = self._seed if seed is None else seed
            self._begin(list(range(self.num_envs)), self._seed)
        else:
            self._begin(list(range(self.num_envs)))
        self._started = True
        return self._obs()

    def step(self, action: Tensor) -> Step:
        """Execute ``action`` [N, act_steps, Da].

        Raises ValueError where the shape differs, FloatingPointError where an action is not finite.
        """
        expected = (self.num_envs, self.act_steps, self.action_dim)
        if tuple(action.shape) != expected:
            raise ValueError(f"action has shape {tuple(action.shape)}, expected (N, act_steps, Da) = {expected}")
        if not action.isfinite().all():
            raise FloatingPointError("the policy's actions hold NaN or Inf")
        raw = ((action.detach().double() + 1) / 2 * self._action_range + self._action_min).float()
        obs, rewards = (value.to(self._device) for value in self._simulator.run(raw.transpose(0, 1)))
        states = to_state(obs)  # [Ta, N, Do]
        finite = (states.isfinite().all(-1) & rewards.isfinite()).cumprod(0).bool()  # [Ta, N]: until the first NaN
        for state, good in zip(states, finite, strict=True):
            newer = torch.cat((self._history[:, 1:], state[:, None]), 1)
            self._history = torch.where(good[:, None, None], newer, self._history)
        self._elapsed += self.act_steps

        valid = finite[-1]
        over = ~valid | (self._elapsed >= self.max_episode_steps)
        terminated = over & valid if self._time_limit_terminates else torch.zeros_like(over)
        reward = torch.where(valid, rewards.sum(0), 0.0)
        self._count_nan(valid)
        final = None
        if ids := over.nonzero().flatten().tolist():
            final = self._obs()
            self._begin(ids)
        return Step(self._obs(), final, reward, terminated, over & ~terminated, None if valid.all() else valid)

    def state_dict(self) -> dict[str, Any]:
        """IsaacGym's own state cannot be saved."""
        return {"seed": self._seed, "nan_count": self.nan_count, "normalization": self.normalization.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        """Start fresh episodes, which is said once in the log."""
        logger.warning("IsaacGym cannot be brought back to a saved state: starting fresh episodes")
        self._seed, self.nan_count, self.restarted = state["seed"], state["nan_count"], True
        self.normalization.load_state_dict(state["normalization"])
        self._read_normalization()
        return self.reset()

    def close(self) -> None:
        self._simulator.close()

    def _begin(self, ids: list[int], seed: int | None = None) -> None:
        """Start new episodes in the envs ``ids``."""
        for _ in range(RESET_ATTEMPTS):
            rows = torch.tensor(ids, device=self._device)
            states = to_state(self._simulator.reset(ids, seed).to(self._device)[rows])
            self._history[rows], self._elapsed[rows] = states[:, None], 0
            finite = states.isfinite().all(-1)
            self._count_nan(finite)
            ids, seed = rows[~finite].tolist(), None
            if not ids:
                return
        raise RuntimeError(f"envs {ids}: NaN or Inf from {RESET_ATTEMPTS} resets in a row")

    def _count_nan(self, valid: Tensor) -> None:
        bad = int((~valid).sum())
        if bad and not self.nan_count:
            logger.warning("nan: NaN or Inf from the simulator in %d envs, which are reset", bad)
        self.nan_count += bad

    def _obs(self) -> Obs:
        scaled = self._history.double() * self._obs_scale + self._obs_shift
        return {"state": scaled.clamp(-self._obs_bound, self._obs_bound).float()}

    def _read_normalization(self) -> None:
        def constant(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=self._device)

        norm = self.normalization
        self._obs_scale, self._obs_shift, self._obs_bound = constant(1.0), constant(0.0), float("inf")
        if isinstance(norm, MinMax):
            spread = norm.obs_max - norm.obs_min + norm.epsilon
            self._obs_scale, self._obs_shift = constant(2 / spread), constant(-2 * norm.obs_min / spread - 1)
        if isinstance(norm, BoundedMinMax):
            self._obs_bound = norm.bound.item()
        self._action_min, self._action_range = constant(norm.action_min), constant(norm.action_max - norm.action_min)


class RemoteHost:
    """A `Host` in a process of another Python. Raises UserError where that does not start, and when it dies."""

    def __init__(self, python: str, arguments: dict[str, Any], steps: int) -> None:
        self._python = python
        memory = os.memfd_create("furniture")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, furniture_server.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                pass_fds=[memory],
                start_new_session=True,  # Ctrl-C is for the training, which still needs the simulator then
                text=True,
            )
            self._end = weakref.finalize(self, _end, self._process)
            found = self._ask(simulator=arguments, steps=steps, memory=memory)
            if "missing" in found:
                self.close()
                raise UserError(
                    f"env.options.python={python}: cannot import the simulator ({found['missing']}); {INSTALL}"
                )
            self.sizes: list[int] = found["sizes"]
            arrays = map_arrays(memory, layout(steps, arguments["num_envs"], self.sizes))
        except OSError as error:
            raise UserError(f"env.options.python={python}: cannot be run ({error.strerror})") from error
        finally:
            os.close(memory)
        self._shared = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def reset(self, ids: list[int], seed: int | None = None) -> Tensor:
        self._ask(reset=ids, seed=seed)
        return self._shared["obs"][0].clone()

    def run(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        self._shared["actions"].copy_(actions)
        self._ask()
        return self._shared["obs"].clone(), self._shared["rewards"].clone()

    def close(self) -> None:
        self._end()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._errors.seek(0)
        tail = "\n".join(self._errors.read().decode(errors="replace").splitlines()[-20:])
        raise UserError(
            f"env.options.python={self._python}: the simulator's process ended with {code}; the end of its output:\n"
            f"{tail or '(nothing)'}"
        )


def _end(process: subprocess.Popen[str]) -> None:
    """The process ends with its input; IsaacGym may hang on its way out."""
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _poses_dim(task_id: str) -> int:
    return 7 * (PARTS[task_id] + 1)


def state_dim(task_id: str) -> int:
    """Do: the robot's 16 numbers and the poses."""
    return ROBOT_DIM + 2 + _poses_dim(task_id)


def to_state(obs: Tensor) -> Tensor:
    """Robot state and poses [..., 14 + P] with the robot's quaternion as the first two rows of its rotation matrix
    [..., 16 + P] (Zhou et al. 2019, arXiv 1812.07035).
    """
    quaternion = obs[..., 3:7]
    x, y, z, w = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    first = (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w))
    second = (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w))
    return torch.cat((obs[..., :3], torch.stack(first + second, -1), obs[..., 7:]), -1)


def _load_normalization(task_id: str, path: str) -> Normalization:
    """``none``, an npz file as for the other environments, or the reference's ``normalization.pth``."""
    obs_dim = state_dim(task_id)
    if path == "none":
        return Identity(-np.ones(ACTION_DIM), np.ones(ACTION_DIM))
    if path == "running":
        raise UserError(f"env.normalization=running: {task_id} has none; give the demonstrations' file")
    norm = _load_pth(path, obs_dim) if path.endswith(".pth") else BoundedMinMax.load(path, obs_dim, ACTION_DIM)
    for kind in ("obs", "action"):
        low, high = getattr(norm, f"{kind}_min"), getattr(norm, f"{kind}_max")
        if bad := np.flatnonzero(~(low < high)).tolist():
            raise UserError(f"env.normalization={path}: {kind}_max does not exceed {kind}_min in columns {bad}")
    return norm


def _load_pth(path: str, obs_dim: int) -> BoundedMinMax:
    """The state_dict of the reference's normaliser."""
    names = {"observations": obs_dim, "actions": ACTION_DIM}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"env.normalization={path}: no such file; give an npz or pth file, or none") from None
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"env.normalization={path}: not readable as tensors alone ({reason})") from error
    ranges: dict[str, Any] = {}
    for name, size in names.items():
        for end in ("min", "max"):
            value = content.get(key := f"stats.{name}.{end}") if isinstance(content, dict) else None
            if not isinstance(value, Tensor) or value.shape != (size,):
                found = list(value.shape) if isinstance(value, Tensor) else value
                raise UserError(f"env.normalization={path}: {key} is {found}, expected a tensor of shape [{size}]")
            ranges[f"{'obs' if name == 'observations' else 'action'}_{end}"] = value.double().numpy()
    return BoundedMinMax(**ranges)
