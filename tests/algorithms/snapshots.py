"""What two iterations of every algorithm come to: ``python -m tests.algorithms.snapshots`` writes it to snapshots.json.

That is for changes that are meant to change numbers; the rest is held to the file by `test_snapshots`.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from dppo_fast.algorithms.bc import BCConfig, BehaviourCloning
from dppo_fast.data.trajectories import ChunkDataset
from dppo_fast.optim import LRConfig
from dppo_fast.types import Obs, Step
from tests.algorithms import learning_tasks
from tests.algorithms.learning_tasks import Modes, demonstrations, diffusion
from tests.algorithms.test_learning import LEARNERS, iterate, small_trainer
from tests.small import seeded

FILE = Path(__file__).with_name("snapshots.json")
NAMES = ["bc", *LEARNERS]
ITERATIONS = 2


class Walk(Modes):
    """Episodes of two decisions, which terminate, and of three, which a time limit cuts; they add up their actions'
    first coordinates and see the sum.
    """

    max_episode_steps = 3

    def reset(self, seed: int | None = None) -> Obs:
        self.position, self.age = torch.zeros(2, self.num_envs)
        return self._obs()

    def step(self, action: torch.Tensor) -> Step:
        reward = self.reward(action[:, 0] - 0.2 * self.position[:, None])
        self.position, self.age = self.position + action[:, 0, 0], self.age + 1
        last, short = self._obs(), torch.arange(self.num_envs) % 2 == 0
        terminated, truncated = short & (self.age == 2), ~short & (self.age == 3)
        going = (~(terminated | truncated)).float()
        self.position, self.age = going * self.position, going * self.age
        return Step(self._obs(), last, reward, terminated, truncated)

    def _obs(self) -> Obs:
        return {"state": self.position[:, None, None].clone()}


def snapshot(name: str) -> dict[str, float]:
    """Metrics of every iteration, and at the end the length of each module's weights."""
    result: dict[str, float] = {}
    # without the pre-training, whose 400 steps would make much of a CPU's roundings
    with TemporaryDirectory() as run, patch.object(learning_tasks, "pretrained", learning_tasks.untrained):
        if name == "bc":
            options = BCConfig(batch_size=64, lr_scheduler=LRConfig(min_lr=1e-2), epoch_start_ema=1, update_ema_freq=2)
            algorithm = BehaviourCloning(diffusion(), options, ChunkDataset(demonstrations(), 1, 1))
            algorithm.generator = seeded(0)
            rows = [algorithm.update(iteration) for iteration in range(ITERATIONS)]
        else:
            trainer = small_trainer(name, Path(run), Walk)
            algorithm = trainer.algorithm
            rows = [iterate(trainer) for _ in range(ITERATIONS)]
    for number, row in enumerate(rows, start=1):
        result |= {f"{number}/{key}": float(value) for key, value in row.items()}
    for module, content in algorithm.modules().items():
        flat = torch.cat([parameter.detach().flatten() for parameter in content.parameters()])
        result[f"weights/{module}"] = float(flat.double().norm())
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({name: snapshot(name) for name in NAMES}, indent=1) + "\n")
