"""python -m dppo_fast.latency checkpoint=<file or run> [key=value ...]: how long one decision takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from dppo_fast.cli import command_main
from dppo_fast.types import require_ranges


@dataclass
class LatencyConfig:
    """``calls`` decisions are timed after ``warm_up`` others; ``num_threads=0`` leaves PyTorch's."""

    checkpoint: str = MISSING
    calls: int = 1000
    warm_up: int = 50
    num_threads: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        require_ranges(self, "", {"calls": "[1, inf)", "warm_up": "[0, inf)", "num_threads": "[0, inf)"})


def latency(config: LatencyConfig) -> dict[str, float]:
    """Print and return the median and the 99th percentile, in ms, of ``act`` on one NumPy observation."""
    from time import perf_counter

    import numpy as np
    import torch

    from dppo_fast.config import naming
    from dppo_fast.deploy import load_policy

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with naming("checkpoint"):
        policy = load_policy(config.checkpoint, config.device)
    obs = {
        name: np.zeros(shape, np.float32 if name == "state" else np.uint8) for name, shape in policy.obs_shapes.items()
    }
    seconds = []
    for _ in range(config.warm_up + config.calls):
        start = perf_counter()
        policy.act(obs)
        seconds.append(perf_counter() - start)
    p50, p99 = 1e3 * np.percentile(seconds[config.warm_up :], (50, 99))
    where = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else "CPU"
    print(
        f"p50 {p50:.3f} ms  p99 {p99:.3f} ms  ({config.calls} decisions, B = 1, {where}, "
        f"{torch.get_num_threads()} threads)"
    )
    return {"p50": p50, "p99": p99}


def main(arguments: Sequence[str] | None = None) -> int:
    return command_main(LatencyConfig, latency, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
