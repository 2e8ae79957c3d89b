"""Whole fine-tuning runs, faults included, against the reference's: samples, minibatches, weights, rates and results.

Environments, noise and permutations are the recorded ones; everything else is ours, in the reference's way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.dppo import DPPO, DPPOConfig
from dppo_fast.algorithms.ppo import PPO, Batch, PPOConfig
from dppo_fast.buffer import RolloutBuffer
from dppo_fast.kernels.denoise_step import chunk_log_prob
from dppo_fast.networks.vision import RandomShift, VitConfig
from dppo_fast.policies.gaussian import GaussianPolicy
from dppo_fast.rollout import Collector, EpisodeStatistics
from dppo_fast.trainer import TrainConfig, Trainer
from dppo_fast.types import Act, Obs, Step
from tests.golden_files import Case, golden_cases
from tests.golden_models import (
    CLASSES,
    DETERMINISTIC_STD,
    build,
    class_name,
    diffusion_policy,
    gaussian_policy,
    load_critic,
    options,
)
from tests.tolerances import EXACT, LOG_PROB, LOSS, SAMPLE, TABLE, weights_after_training

OUT = (
    ("loss/policy", 1),
    ("ppo/entropy", -1),
    ("loss/value", 1),
    ("ppo/clip_fraction", 1),
    ("ppo/approx_kl", 1),
    ("ppo/ratio", 1),
    ("loss/bc", 1),
    ("spread", 1),
)
"""What a minibatch's ``out`` lists, by our names, and the sign between them; the spread is eta, or a Gaussian's std."""

RESULTS = {
    "step": "env_steps",
    "train_episode_reward": "train/return",
    "eval_episode_reward": "eval/return",
    "eval_best_reward": "eval/best_reward",
    "eval_success_rate": "eval/success_rate",
}
"""The reference's names of logged numbers -> ours."""


def observations_of(case: Case, call: int) -> Obs:
    obs = {"state": torch.from_numpy(case["venv/obs"][call]).float()}
    return obs | ({"rgb": torch.from_numpy(case["venv/rgb"][call])} if "venv/rgb" in case else {})


class ScriptedEnv:
    """Answers what the reference's environments answered to the same actions; a reset after a reset changes nothing."""

    max_episode_steps = 1

    def __init__(self, case: Case) -> None:
        self.case = case
        _, self.num_envs, self.act_steps, self.action_dim = case["venv/action"].shape
        self.obs_shapes = {name: obs.shape[1:] for name, obs in observations_of(case, 0).items()}
        self.calls = self.steps = 0

    def reset(self, seed: int | None = None) -> Obs:
        if self.calls == 0 or self.case["venv/kind"][self.calls - 1] == 1:
            self._advance(kind=0)
        return self._obs()

    def step(self, action: Tensor) -> Step:
        self._advance(kind=1)
        t = self.steps
        self.steps += 1
        SAMPLE.check(action, self.case["venv/action"][t], f"action {t}")
        reward, terminated, truncated = (
            torch.from_numpy(self.case[f"venv/{name}"][t]) for name in ("reward", "terminated", "truncated")
        )
        return Step(self._obs(), None, reward.float(), terminated, truncated & ~terminated)

    def _advance(self, kind: int) -> None:
        assert self.case["venv/kind"][self.calls] == kind, f"call {self.calls} of the environments"
        self.calls += 1

    def _obs(self) -> Obs:
        return observations_of(self.case, self.calls - 1)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        raise NotImplementedError

    def close(self) -> None: ...


def updates_of(case: Case) -> list[Case]:
    names = dict.fromkeys(key.split("/")[1] for key in case if key.startswith("update/"))
    return [case.case(f"update/{name}") for name in names]


def draws_of(case: Case) -> Iterator[Tensor]:
    """The noise in the order of use: an iteration's samples, then its behaviour-cloning terms."""
    train = case.cfg["train"]
    samples = iter(case.tensor("sample_noise"))
    for iteration in range(train["n_train_itr"]):
        for _ in range(train["n_steps"]):
            yield next(samples)
        for update in updates_of(case):
            if update["itr"] == iteration and "bc_noise" in update:
                yield update.tensor("bc_noise")


class Replay:
    """Gives an algorithm the recorded randomness and compares what comes out; it is the run's log, too.

    Ours sorts a minibatch's pairs; ``order`` [B] sorts theirs.
    """

    def __init__(self, case: Case, algorithm: PPO) -> None:
        self.case = case
        self.algorithm = algorithm
        self.policy = algorithm.policy
        self.gaussian = isinstance(self.policy, GaussianPolicy)
        self.samples = iter(case["sample_actions" if self.gaussian else "sample_trajectories"])
        self.chains = iter(() if self.gaussian else case["sample_chains"])
        self.updates = iter(updates_of(case))
        self.orders = iter(case.tensor("index_order"))
        self.shifts = iter(case.tensors("aug_shift/").values())
        self.draws = draws_of(case)
        self.iteration_number = 0
        self._act, self._loss = self.policy.act, algorithm.loss
        self.policy.draw_noise = lambda batch, draws: next(self.draws)
        self.policy.randn = lambda *shape: next(self.draws).view(shape)[:, self.order]
        self.policy.act = self.act
        algorithm.permutation = self.permutation
        algorithm.draw_shift = lambda images: next(self.shifts).view(images, 2) - RandomShift.pad
        algorithm.loss = self.loss

    def act(self, obs: Obs, deterministic: bool = False) -> Act:
        act = self._act(obs, deterministic)
        if self.gaussian and deterministic:
            bound = self.policy.config.randn_clip_value
            noise = next(self.draws).view_as(act.action).clamp(-bound, bound)
            act = Act(act.action + DETERMINISTIC_STD * noise, {})
        SAMPLE.check(act.action, next(self.samples), "sample")
        theirs = next(self.chains, None)
        if "chain" in act.record:
            SAMPLE.check(act.record["chain"], theirs, "chain")
        return act

    def permutation(self, pairs: int) -> Tensor:
        order = next(self.orders)
        self.minibatches = iter(order.split(self.algorithm.config.batch_size))
        return order

    def loss(self, batch: Batch, row: Tensor, k: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = next(self.minibatches)
        self.order = drawn.argsort()
        EXACT.check(row * self.policy.decisions + k, drawn[self.order], "pairs")
        loss, parts = self._loss(batch, row, k, advantage)
        update = next(self.updates)
        assert update["itr"] == self.iteration_number
        obs = batch.observations(row)
        spread = self.policy.actor_ft(obs)[1].mean() if self.gaussian else self.policy.entropy(obs)
        ours = {"ppo/entropy": self.policy.entropy(obs), "loss/bc": torch.zeros(()), "spread": spread, **parts}
        for (name, sign), value in zip(OUT, update["out"], strict=True):
            LOSS.check(sign * ours[name], value, f"{update.name}: {name}")
        self.check_inputs(update.case("in"), batch, row, k)
        return loss, parts

    def check_inputs(self, theirs: Case, batch: Batch, row: Tensor, k: Tensor) -> None:
        if "state" not in theirs:
            return
        part = self.policy.select(batch.record, row, k)
        inputs = {name: value[self.order] for name, value in theirs.tensors("").items()}
        log_prob = inputs["oldlogprobs"]
        if self.gaussian:
            SAMPLE.check(part["action"], inputs["chains_or_actions"], "action")
        else:
            SAMPLE.check(part["x"], inputs["chains_prev"], "x")
            SAMPLE.check(part["x_next"], inputs["chains_next"], "x_next")
            EXACT.check(k, inputs["denoising_inds"], "step")
            log_prob = chunk_log_prob(log_prob, self.policy.reward_horizon)
        TABLE.check(batch.obs["state"][row], inputs["state"], "state")
        LOG_PROB.check(batch.record["log_prob"][row, k], log_prob, "old log-prob")
        LOSS.check(batch.returns[row], inputs["returns"], "return")
        LOSS.check(batch.value[row], inputs["oldvalues"], "old value")
        LOSS.check(batch.advantage[row], inputs["advantages"], "advantage")

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def iteration(self, row: Mapping[str, float]) -> None:
        if row["iteration"] == 0:
            return
        i = self.iteration_number
        self.iteration_number += 1
        for name, value in self.case.sub(f"result/itr{i}/").items():
            LOSS.check(row.get(RESULTS[name], 0.0), value, f"iteration {i}: {name}")
        after = self.case.case(f"after_itr{i}")
        for name, trainable in self.algorithm.trainables.items():
            if f"{name}_lr" in after:
                TABLE.check(trainable.schedule.lr, after[f"{name}_lr"], f"iteration {i}: {name} rate")
        modules = nn.ModuleDict({"actor_ft": self.policy.actor_ft, "critic": self.algorithm.critic})
        if getattr(self.policy, "eta", None) is not None:
            modules["eta"] = self.policy.eta
        for name, value in after.sub("w/").items():
            sensitivity = float(self.case.sub("sensitivity/").get(name, 0.0))
            tolerance = weights_after_training(sensitivity)
            tolerance.check(modules.get_parameter(name), value, f"iteration {i}: {name}")

    def finish(self) -> None:
        """All that was recorded has happened."""
        for left in (self.samples, self.updates, self.orders, self.draws, self.shifts):
            assert next(left, None) is None


def network_of(spec: Mapping[str, Any], case: Case) -> nn.Module:
    if "backbone" not in spec:
        return build(spec)
    arguments = {key: value for key, value in spec.items() if key != "augment"}
    arguments["backbone"] = options(VitConfig, spec["backbone"]["cfg"])
    if class_name(spec) == "VisionUnet1D":
        arguments["horizon_steps"] = case.cfg["horizon_steps"]
    return build(arguments, image_shapes={"rgb": case["venv/rgb"].shape[2:]})


def algorithm_of(case: Case) -> PPO:
    """The algorithm, with the initial weights and ready to collect."""
    cfg, model, weights = case.cfg, case.cfg["model"], case.tensors("w_init/")
    train = {**cfg["train"], "microbatch_size": cfg["train"]["batch_size"]}
    critic = load_critic(weights, network_of(model["critic"], case))
    buffer = RolloutBuffer(train["n_steps"], cfg["env"]["n_envs"])
    if class_name(model["actor"]) == "Gaussian_MLP":
        gaussian = gaussian_policy(model["actor"], model, weights, clamp_log_prob=True)
        return PPO(gaussian, critic, options(PPOConfig, train, model), buffer, bootstrap_truncated=False)
    horizon = {"reward_horizon": cfg.get("reward_horizon", cfg["act_steps"])}
    diffusion = diffusion_policy({**model, **horizon}, weights, network_of(model["actor"], case))
    config = options(DPPOConfig, train, model)
    return DPPO(diffusion, critic, config, buffer, bootstrap_truncated=False, shift_once=True)


def is_supported(case: Case) -> bool:
    return class_name(case.cfg["model"]["actor"]) in CLASSES


@pytest.mark.parametrize(
    "case",
    [
        case
        for policy in ("diffusion", "diffusion_img", "gaussian")
        for case in golden_cases(f"11_agent_ppo_{policy}", is_supported)
    ],
)
def test_fine_tuning_run(case: Case, tmp_path: Path) -> None:
    cfg, algorithm = case.cfg, algorithm_of(case)
    replay, env = Replay(case, algorithm), ScriptedEnv(case)
    statistics = EpisodeStatistics(
        env.num_envs, env.act_steps, cfg["env"]["best_reward_threshold_for_success"], whole_only=True
    )
    collector = Collector(env, algorithm.policy, statistics)
    config = options(TrainConfig, cfg["train"], cfg["env"], {"evaluate_in_place": True})
    Trainer(algorithm, config, tmp_path, torch.Generator(), collector).train(replay)
    replay.finish()
