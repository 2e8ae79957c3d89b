"""Every algorithm learns the same small task, from where its policy starts."""

from __future__ import annotations

import pytest

from dppo_fast.algorithms import ALGORITHMS
from dppo_fast.algorithms.base import OnlineAlgorithm
from dppo_fast.optim import LRConfig
from tests.algorithms.learning_tasks import Learner, diffusion, flow, gaussian, hill, squashed

FAST = dict.fromkeys(("actor_lr_scheduler", "critic_lr_scheduler"), LRConfig(min_lr=3e-3))
LIKELIHOOD = {
    "batch_size": 64,
    "update_epochs": 5,
    "clip_ploss_coef": 0.1,
    "reward_scale_running": False,
    "actor_lr_scheduler": LRConfig(min_lr=1e-3),
    "critic_lr_scheduler": LRConfig(min_lr=3e-3),
}
REGRESSION = {"batch_size": 64, "beta": 3.0, "update_epochs": 4, "lr_scheduler": LRConfig(min_lr=3e-3)}
ADVANTAGE = {"batch_size": 64, "beta": 3.0, "replay_ratio": 4, "buffer_size": 8, **FAST}
ENTROPY = {
    "batch_size": 64,
    "init_temperature": 0.1,
    **dict.fromkeys(("actor_lr_scheduler", "critic_lr_scheduler"), LRConfig(min_lr=1e-2)),
}
CONSERVATIVE = {
    "n_offline_itr": 2,
    "num_update": 40,
    "online_utd_ratio": 0.5,
    "cql_n_actions": 3,
    "cql_min_q_weight": 0.2,
    **ENTROPY,
}
ACTION_GRADIENT = {
    "batch_size": 64,
    "replay_ratio": 4,
    "target_ema_rate": 0.1,
    "action_lr": 0.05,
    "action_gradient_steps": 5,
    **dict.fromkeys(("actor_lr_scheduler", "critic_lr_scheduler"), LRConfig(min_lr=1e-2)),
}
IMPLICIT = {
    "batch_size": 64,
    "replay_ratio": 4,
    "target_ema_rate": 0.1,
    "eval_sample_num": 16,
    "exploration_expectile": 0.9,
    **FAST,
}
BACK_PROPAGATION = {
    "batch_size": 64,
    "replay_ratio": 8,
    "n_critic_warmup_itr": 2,
    "actor_lr_scheduler": LRConfig(min_lr=3e-3),
    "critic_lr_scheduler": LRConfig(min_lr=1e-2),
}

LEARNERS: dict[str, Learner] = {
    "ppo": Learner(gaussian, {"batch_size": 64, "update_epochs": 5, "clip_ploss_coef": 0.1, **FAST}),
    "dppo": Learner(lambda: diffusion(8), {"batch_size": 256, "update_epochs": 2, "clip_ploss_coef": 0.1, **FAST}),
    "exact_ppo": Learner(flow, LIKELIHOOD),
    "rwr": Learner(diffusion, REGRESSION),
    "rwr-gaussian": Learner(gaussian, REGRESSION),
    "awr": Learner(diffusion, ADVANTAGE),
    "awr-gaussian": Learner(gaussian, ADVANTAGE),
    "dipo": Learner(diffusion, ACTION_GRADIENT),
    "idql": Learner(diffusion, IMPLICIT, iterations=6),
    "dql": Learner(diffusion, BACK_PROPAGATION, iterations=8),
    "qsm": Learner(diffusion, {"batch_size": 64, "replay_ratio": 8, "q_grad_coeff": 5.0, **FAST}, reward=hill),
    "sac": Learner(squashed, {"critic_replay_ratio": 16, "actor_replay_ratio": 16, **ENTROPY}, iterations=5),
    "rlpd": Learner(squashed, {"critic_num_update": 1, "n_critics": 3, **ENTROPY}, n_steps=1, num_envs=32),
    "calql": Learner(squashed, CONSERVATIVE, n_steps=1),
    "ibrl": Learner(
        lambda: gaussian(tanh_output=True),
        {"batch_size": 64, "critic_num_update": 1, "n_critics": 3, **FAST},
        n_steps=1,
    ),
}
"""Name of the algorithm, and what distinguishes several entries for the same one -> how it learns."""

MARGIN = 0.4
"""Of the best policy's reward of 1. One that chooses among the modes at random gets 0.5."""


@pytest.mark.parametrize("name", LEARNERS)
def test_learns_to_choose_the_best_mode(name: str) -> None:
    cls, schema = ALGORITHMS[name.partition("-")[0]]
    assert issubclass(cls, OnlineAlgorithm)
    before, after = LEARNERS[name].learn(cls, schema)
    assert before < 0.6
    assert after > before + MARGIN, (before, after)


def test_no_algorithm_is_forgotten() -> None:
    online = {name for name, (cls, _) in ALGORITHMS.items() if issubclass(cls, OnlineAlgorithm)}
    assert {name.partition("-")[0] for name in LEARNERS} == online
