"""What drives ``FurnitureRLSimEnv``, in a process of its own: ``python furniture_server.py``, started by `furniture`.

Runs on Python 3.8, which IsaacGym needs, with what IsaacGym brings (NumPy, any PyTorch) and without this package.

Each line of the standard input is a request, in JSON, and each of the standard output its answer; what IsaacGym
prints goes to the standard error. The first request says which simulator to build and for chunks of how many ``steps``,
and gives the descriptor ``memory`` of a file in memory. Its answer tells the ``sizes`` of an observation's parts, which
settle the file's `layout`. Then ``{"reset": [env, ...], "seed": null}`` writes the new observations to ``obs[0]``, and
``{}`` executes ``actions``. The process ends with its input.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
from typing import Any

import numpy as np

SETTINGS: dict[str, Any] = {
    "act_rot_repr": "rot_6d",
    "action_type": "pos",
    "april_tags": False,
    "concat_robot_state": True,
    "ctrl_mode": "diffik",
    "observation_space": "state",
    "record": False,
    "pos_scalar": 1,
    "rot_scalar": 1,
    "stiffness": 1000,
    "damping": 200,
}
PARTS = ("robot_state", "parts_poses")
ACTION_DIM = 10


class Host:
    """The simulator of N envs. ``sizes``: the widths of robot state and poses, which an observation [N, D] joins."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Raises ImportError where IsaacGym is missing, or not imported before PyTorch."""
        from furniture_bench.envs.furniture_rl_sim_env import FurnitureRLSimEnv
        from furniture_bench.envs.observation import DEFAULT_STATE_OBS

        # isort: split
        import torch

        self._torch = torch
        self._env = FurnitureRLSimEnv(obs_keys=DEFAULT_STATE_OBS, **SETTINGS, **arguments)
        obs = self._env.reset()
        self.sizes = [int(obs[name].shape[-1]) for name in PARTS]

    def reset(self, ids: list[int], seed: int | None = None) -> Any:
        """Start new episodes in the envs ``ids``; gives the observation of all [N, D]. ``seed`` is process-wide."""
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            self._torch.manual_seed(seed)
        if len(ids) == self._env.num_envs:
            return self._join(self._env.reset())
        return self._join(self._env.reset(self._torch.tensor(ids, dtype=self._torch.int32, device=self._env.device)))

    def run(self, actions: Any) -> tuple[Any, Any]:
        """Execute ``actions`` [T, N, Da]: observations [T, N, D] and rewards [T, N]."""
        obs, rewards = [], []
        for action in actions.to(self._env.device):
            new, reward, _, _ = self._env.step(action)
            obs.append(self._join(new))
            rewards.append(reward.reshape(-1).float())
        return self._torch.stack(obs), self._torch.stack(rewards)

    def close(self) -> None:
        """IsaacGym frees its simulation with the process."""

    def _join(self, obs: dict[str, Any]) -> Any:
        return self._torch.cat([obs[name].float() for name in PARTS], -1)


def layout(steps: int, num_envs: int, sizes: list[int]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the float32 arrays that lie in memory one after the other."""
    return {
        "actions": (steps, num_envs, ACTION_DIM),
        "obs": (steps, num_envs, sum(sizes)),
        "rewards": (steps, num_envs),
    }


def map_arrays(descriptor: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arrays of that `layout` in a file, which is made large enough."""
    ends = np.cumsum([np.prod(shape, dtype=np.int64) for shape in shapes.values()])
    os.ftruncate(descriptor, 4 * int(ends[-1]))
    flat = np.frombuffer(mmap.mmap(descriptor, 4 * int(ends[-1])), np.float32)
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, np.split(flat, ends[:-1]))}  # noqa: B905


def serve() -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    first = json.loads(requests.readline())
    try:
        host = Host(first["simulator"])
    except ImportError as error:
        answer(missing=str(error))
        return
    arrays = map_arrays(first["memory"], layout(first["steps"], first["simulator"]["num_envs"], host.sizes))
    answer(sizes=host.sizes)

    from torch import from_numpy

    for line in requests:
        request = json.loads(line)
        if "reset" in request:
            arrays["obs"][0] = host.reset(request["reset"], request["seed"]).cpu().numpy()
        else:
            obs, rewards = host.run(from_numpy(arrays["actions"]))
            arrays["obs"][:] = obs.cpu().numpy()
            arrays["rewards"][:] = rewards.cpu().numpy()
        answer()


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are named after libraries
    serve()
