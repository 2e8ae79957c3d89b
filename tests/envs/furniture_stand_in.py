"""The interface of furniture-bench's ``FurnitureRLSimEnv``, without IsaacGym: parts that drift, assembled by a signal.

Needs PyTorch alone and runs on Python 3.8. An env assembles its next pair in the step whose action has a gripper of
0.9 or more; an action whose first number is 7 gives NaN, 8 kills the process and 9 raises. `install` puts it where
``furniture_bench`` is imported from.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

PARTS = {"one_leg": 5, "lamp": 3, "round_table": 3}
PAIRS = {"one_leg": 1, "lamp": 2, "round_table": 2}
DEFAULT_STATE_OBS = ["robot_state/ee_pos", "robot_state/ee_quat", "robot_state/gripper_width", "parts_poses"]


class FurnitureRLSimEnv:
    def __init__(
        self,
        *,
        act_rot_repr: str,
        action_type: str,
        april_tags: bool,
        concat_robot_state: bool,
        ctrl_mode: str,
        obs_keys: list[str],
        furniture: str,
        gpu_id: int,
        headless: bool,
        num_envs: int,
        observation_space: str,
        randomness: str,
        max_env_steps: int,
        record: bool,
        pos_scalar: float,
        rot_scalar: float,
        stiffness: float,
        damping: float,
    ) -> None:
        print("Importing module 'gym_38'")  # IsaacGym is as talkative
        assert (act_rot_repr, action_type, ctrl_mode, observation_space) == ("rot_6d", "pos", "diffik", "state")
        assert (april_tags, concat_robot_state, record) == (False, True, False)
        assert (pos_scalar, rot_scalar, stiffness, damping) == (1, 1, 1000, 200)
        assert obs_keys == DEFAULT_STATE_OBS
        if gpu_id > 7:
            raise RuntimeError(f"no GPU {gpu_id}")
        self.num_envs, self.max_env_steps, self.device = num_envs, max_env_steps, torch.device("cpu")
        self.env_steps = torch.zeros(num_envs, 1, dtype=torch.int64)
        self._pairs, self._spread = PAIRS[furniture], {"low": 0.01, "med": 0.05}[randomness]
        parts = PARTS[furniture] + 1 + int(os.environ.get("STAND_IN_MORE_PARTS", "0"))
        self._robot = torch.zeros(num_envs, 14)
        self._poses = torch.zeros(num_envs, parts, 7)
        self._assembled = torch.zeros(num_envs, dtype=torch.int64)

    def reset(self, env_idxs: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        ids = torch.arange(self.num_envs) if env_idxs is None else env_idxs.long()
        assert ids.numel() > 0
        self.env_steps[ids] = 0
        self._assembled[ids] = 0
        self._robot[ids] = torch.tensor([0.5, 0, 0.1] + [0.6, 0, 0, 0.8] + [0] * 6 + [0.08])
        self._poses[ids] = torch.randn(len(ids), *self._poses.shape[1:]) * self._spread
        return self._obs()

    def step(self, action: torch.Tensor) -> tuple[Any, ...]:
        assert action.shape == (self.num_envs, 10)
        assert action.dtype == torch.float32
        if (action[:, 0] == 8).any():
            print("PhysX: out of memory", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if (action[:, 0] == 9).any():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.env_steps += 1
        self._robot[:, :3] = action[:, :3]
        self._robot[:, 13] = action[:, 9]
        self._robot[action[:, 0] == 7, 0] = float("nan")  # until the next step
        self._poses[..., 0] += 0.001
        assembles = (action[:, 9] >= 0.9) & (self._assembled < self._pairs)
        self._assembled += assembles
        done = (self._assembled == self._pairs)[:, None] | (self.env_steps >= self.max_env_steps)
        return self._obs(), assembles.float()[:, None], done, {}

    def _obs(self) -> dict[str, torch.Tensor]:
        return {"robot_state": self._robot.clone(), "parts_poses": self._poses.flatten(1)}


def install(folder: Path) -> Path:
    """Make ``furniture_bench`` importable from ``folder``."""
    package = folder / "furniture_bench" / "envs"
    package.mkdir(parents=True)
    for path in (package.parent / "__init__.py", package / "__init__.py"):
        path.touch()
    (package / "furniture_rl_sim_env.py").write_text(Path(__file__).read_text())
    (package / "observation.py").write_text(f"DEFAULT_STATE_OBS = {DEFAULT_STATE_OBS}\n")
    return folder
