"""Algorithms by name; each is one file, whose config dataclass holds its hyperparameters."""

from dppo_fast.algorithms.base import Algorithm
from dppo_fast.algorithms.bc import BCConfig, BehaviourCloning
from dppo_fast.algorithms.dppo import DPPO, DPPOConfig
from dppo_fast.algorithms.ppo import PPO, PPOConfig

__all__ = ["ALGORITHMS", "Algorithm"]

ALGORITHMS: dict[str, tuple[type[Algorithm], type]] = {
    "bc": (BehaviourCloning, BCConfig),
    "ppo": (PPO, PPOConfig),
    "dppo": (DPPO, DPPOConfig),
}
"""Name -> the algorithm and its config."""
