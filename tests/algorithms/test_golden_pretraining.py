"""Whole pre-training runs against the reference's: losses, weights, their average and learning rates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dppo_fast.algorithms.bc import BCConfig, BehaviourCloning
from dppo_fast.data.trajectories import ChunkDataset, Trajectories
from dppo_fast.types import Obs
from tests.golden_files import Case, golden_cases
from tests.golden_models import CLASSES, build, class_name, diffusion_policy, options
from tests.tolerances import EXACT, LOSS, TABLE, weights_after_training


def is_supported(case: Case) -> bool:
    return "model" in case.cfg and class_name(case.cfg["model"]["network"]) in CLASSES


def windows(dataset: ChunkDataset, batch: Case) -> Tensor:
    """Which windows of the data a recorded batch consists of: [B]."""
    obs, action = dataset.batch(torch.arange(len(dataset)))
    all_windows = torch.cat((obs["state"].flatten(1), action.flatten(1)), 1)
    wanted = torch.cat((batch.tensor("state").flatten(1), batch.tensor("x_start").flatten(1)), 1)
    same = (wanted[:, None] == all_windows).all(-1)
    assert same.any(1).all()
    return same.int().argmax(1)


def check_weights(network: nn.Module, expected: dict[str, Tensor], what: str) -> None:
    for name, value in expected.items():
        ours = network.get_parameter(name.removeprefix("network."))
        weights_after_training(sensitivity=0).check(ours, value, f"{what}: {name}")


@pytest.mark.parametrize("case", golden_cases("11_agent_pretrain", is_supported))
def test_pretraining_run(case: Case) -> None:
    cfg = case.cfg
    data = case.file.case("data")
    dataset = ChunkDataset(
        Trajectories(**data.sub("")), cfg["model"]["horizon_steps"], cfg["train_dataset"]["cond_steps"]
    )
    policy = diffusion_policy(cfg["model"], case.tensors("w_init/"), build(cfg["model"]["network"]))
    algorithm = BehaviourCloning(policy, options(BCConfig, cfg["train"], {"ema_decay": cfg["ema"]["decay"]}), dataset)
    batches = [case.case(f"batch/{n}") for n in dict.fromkeys(key.split("/")[1] for key in case if "batch/" in key)]
    recorded = iter(batches)

    def cloning_loss(obs: Obs, action: Tensor) -> Tensor:
        batch = next(recorded)
        EXACT.check(obs["state"], batch["state"])
        EXACT.check(action, batch["x_start"])
        loss = policy.denoising_loss(obs, action, batch.tensor("t"), batch.tensor("noise"))
        LOSS.check(loss, batch["loss"].astype("float32"), f"epoch {batch['epoch']}")
        return loss

    policy.cloning_loss = cloning_loss
    own_sizes = [len(indices) for indices in algorithm.epoch_batches()]
    for epoch in range(1, cfg["train"]["n_epochs"] + 1):
        of_epoch = [batch for batch in batches if batch["epoch"] == epoch]
        assert own_sizes == [len(batch["t"]) for batch in of_epoch]
        algorithm.epoch_batches = lambda batches=of_epoch: [windows(dataset, batch) for batch in batches]
        after = case.case(f"after_epoch{epoch}")
        TABLE.check(algorithm.trainable.schedule.lr, after["lr_during_epoch"], f"epoch {epoch}: rate")
        algorithm.update(epoch - 1)
        algorithm.step_schedules(epoch - 1)
        check_weights(policy.actor, after.tensors("w/"), f"epoch {epoch}: weights")
        check_weights(algorithm.ema.average.actor, after.tensors("ema/"), f"epoch {epoch}: average")
    assert next(recorded, None) is None
