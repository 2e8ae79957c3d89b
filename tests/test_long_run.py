"""A run of 200 iterations holds no more memory and no more files at its end than early on."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from dppo_fast.log import RunLog
from tests.small import gaussian_policy
from tests.test_nan import NEVER, Corruption, trainer

WARM_UP, ITERATIONS = 50, 200
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_memory_and_file_descriptors_stay(tmp_path: Path) -> None:
    run = trainer(tmp_path, gaussian_policy(), Corruption(NEVER), update_epochs=1)
    object.__setattr__(run.config, "n_train_itr", ITERATIONS)
    with RunLog(tmp_path, ITERATIONS, live=False, tensorboard=True) as log:
        run.train(log, lambda: run.iteration >= WARM_UP)
        memory, files = resident(), descriptors()
        run.train(log)
    assert run.iteration == ITERATIONS
    assert descriptors() <= files
    assert resident() - memory < 8 * 2**20
    assert len(list((tmp_path / "checkpoint").iterdir())) == 4  # the newest two and those of 0 and 100
