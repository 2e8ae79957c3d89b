"""Q-score matching: its losses against the reference's, and what its score leads to."""

from __future__ import annotations

import pytest
from torch import nn

from dppo_fast.algorithms.qsm import QSM, QSMConfig
from dppo_fast.types import UserError
from tests.algorithms.diffusion_q import golden, small
from tests.algorithms.off_policy import check_capturable, golden_transitions, parts
from tests.golden_files import Case, golden_cases
from tests.golden_models import check_gradients
from tests.small import diffusion_policy
from tests.tolerances import LOSS

CASES = golden_cases("08_diffusion_q", lambda case: case.name.startswith("qsm"))


def qsm_of(case: Case) -> QSM:
    return golden(QSM, QSMConfig, case, q_grad_coeff=case.cfg["q_grad_coeff"])


@pytest.mark.parametrize("case", CASES)
def test_critic_loss(case: Case) -> None:
    algorithm = qsm_of(case)
    loss = algorithm.critic_loss(golden_transitions(case), {"next_noise": case.tensor("critic/noise")})
    LOSS.check(loss, case["critic/loss"])
    loss.backward()
    check_gradients(case.tensors("critic/grad/"), nn.ModuleDict({"critic_q": algorithm.critic}))


@pytest.mark.parametrize("case", CASES)
def test_actor_loss(case: Case) -> None:
    algorithm = qsm_of(case)
    draws = {"t": case.tensor("actor/noise/001_randint"), "noise": case.tensor("actor/noise/000_randn")}
    loss = algorithm.actor_loss(golden_transitions(case), draws)
    LOSS.check(loss, case["actor/loss"])
    loss.backward()
    check_gradients(case.tensors("actor/grad/"), nn.ModuleDict({"network": algorithm.policy.actor}))


def test_networks_that_predict_the_action_are_refused() -> None:
    with pytest.raises(UserError, match=r"policy\.options\.predict_epsilon"):
        QSM(QSMConfig(), parts(diffusion_policy(ft_denoising_steps=0, predict_epsilon=False)))


def test_gradient_steps_can_be_captured() -> None:
    check_capturable(small(QSM, QSMConfig))
