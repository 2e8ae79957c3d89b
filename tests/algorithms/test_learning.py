"""Every algorithm learns the same small task, from where its policy starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dppo_fast.algorithms import ALGORITHMS
from dppo_fast.algorithms.base import OnlineAlgorithm
from dppo_fast.algorithms.off_policy import OffPolicy
from dppo_fast.algorithms.ppo import PPO
from dppo_fast.optim import LRConfig
from dppo_fast.trainer import TrainConfig, Trainer
from tests.algorithms.learning_tasks import Learner, Modes, diffusion, flow, gaussian, hill, squashed, task_parts
from tests.small import collector, distance, weights
from tests.test_zero_waste import count_reads

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


def small_trainer(name: str, run: Path, environment: type[Modes] = Modes) -> Trainer:
    """One that begins with its algorithm's first iteration in environments."""
    learner = LEARNERS[name]
    cls, schema = ALGORITHMS[name.partition("-")[0]]
    assert issubclass(cls, OnlineAlgorithm)
    parts = task_parts(learner.policy(), learner.n_steps, 16)
    algorithm = cls.build(schema(**learner.options), parts)
    parts.policy.generator = parts.generator
    env = environment(16, learner.reward)
    trainer = Trainer(algorithm, TrainConfig(), run, parts.generator, collector(env, algorithm.actor))
    trainer.iteration = learner.options.get("n_offline_itr", 0)
    return trainer


def iterate(trainer: Trainer) -> dict[str, float]:
    """The metrics."""
    row = trainer._collect(deterministic=False) | trainer._update(trainer.iteration)
    trainer.algorithm.step_schedules(trainer.iteration)
    trainer.iteration += 1
    return row


@pytest.mark.parametrize("name", [name for name in LEARNERS if not name.startswith("rwr")])
def test_the_host_reads_once_per_iteration(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics, after everything else is on its way. Only RWR has to know before how many episodes ended."""
    monkeypatch.setenv("DPPO_FAST_BACKEND", "reference")  # the C++ ops are for the CPU
    trainer = small_trainer(name, tmp_path)
    if isinstance(trainer.algorithm, PPO):
        trainer.algorithm.on_host = False
    iterate(trainer)  # which allocates
    trainer._collect(deterministic=False)
    with count_reads() as reads:
        trainer._update(trainer.iteration)
    assert reads == {"tolist": 1}


@pytest.mark.parametrize("name", [x for x in LEARNERS if issubclass(ALGORITHMS[x.partition("-")[0]][0], OffPolicy)])
def test_a_restored_run_goes_on_exactly(name: str, tmp_path: Path) -> None:
    whole, resumed = (small_trainer(name, tmp_path) for _ in range(2))
    iterate(whole)
    whole.save()
    iterate(whole)
    resumed.restore(whole.save())
    for trainer in (whole, resumed):
        iterate(trainer)
    for one, other in zip(whole.algorithm.modules().values(), resumed.algorithm.modules().values(), strict=True):
        assert distance(weights(one), weights(other)) == 0
    (kept, again) = (trainer.algorithm.replay for trainer in (whole, resumed))
    assert kept is not None
    assert again is not None
    assert kept.size == again.size
    assert all(value[: kept.size].equal(again.data[path][: kept.size]) for path, value in kept.data.items())


def test_no_algorithm_is_forgotten() -> None:
    online = {name for name, (cls, _) in ALGORITHMS.items() if issubclass(cls, OnlineAlgorithm)}
    assert {name.partition("-")[0] for name in LEARNERS} == online
