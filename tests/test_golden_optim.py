"""Learning-rate schedules against the reference's."""

from __future__ import annotations

import pytest
import torch

from dppo_fast.optim import CosineWarmup, LRConfig
from tests.golden_files import Case, golden_cases
from tests.golden_models import options
from tests.tolerances import FLOAT64


@pytest.mark.parametrize("case", golden_cases("07_lr_schedule"))
def test_cosine_warmup(case: Case) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    schedule = CosineWarmup(optimizer, case.cfg["max_lr"], options(LRConfig, case.cfg))
    rates = [schedule.lr]
    for _ in case["lr"][1:]:
        schedule.step()
        rates.append(schedule.lr)
    FLOAT64.check(rates, case["lr"])
