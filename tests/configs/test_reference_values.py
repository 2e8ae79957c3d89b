"""Every configuration of the reference is one of ours: its values, that it builds, and how it is listed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from dppo_fast import build, downloads
from dppo_fast.build import RunConfig
from dppo_fast.cli import config_names, outline
from dppo_fast.config import plain
from dppo_fast.policies.base import Policy
from dppo_fast.types import ObsShapes
from tests.configs.composed import composed
from tests.configs.mapping import DIFFERENT, KEYS, REFERENCE, difference_table, key_table, row, translated
from tests.configs.stated import StatedEnv, stated_trajectories

CPU = torch.device("cpu")
RECORDED = ("asset:", "data/metaworld/")
"""Where our own data lie: shipped, or recorded by the user."""


@pytest.fixture(autouse=True)
def without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DPPO_DATA_DIR", "DPPO_LOG_DIR"):
        monkeypatch.delenv(name, raising=False)


def cases(name: str) -> tuple[str, str]:
    """The algorithm and the task, by which DIFFERENT is indexed."""
    return composed(name).algorithm.get("name", "evaluation"), name.split("/")[2].partition("-")[0]


def test_all_279_are_compared() -> None:
    assert len(REFERENCE) == 279


@pytest.mark.parametrize("name", REFERENCE)
def test_values_are_the_references(name: str) -> None:
    ours, missing = composed(name), object()
    excused = {key for case in cases(name) for key in DIFFERENT.get(case, {})}
    different = {
        key: (found, expected)
        for key, expected in translated(REFERENCE[name]).items()
        if key not in excused and (found := OmegaConf.select(ours, key, default=missing)) != expected
    }
    assert not different


def test_every_row_of_the_table_is_of_use() -> None:
    assert {row(key) for values in REFERENCE.values() for key in values} == KEYS.keys()


def test_every_difference_is_one() -> None:
    found = set()
    for name, values in REFERENCE.items():
        ours, expected = composed(name), translated(values)
        for case in cases(name):
            for key in DIFFERENT.get(case, {}).keys() & expected.keys():
                if OmegaConf.select(ours, key) != expected[key]:
                    found.add((case, key))
    assert found == {(case, key) for case, rows in DIFFERENT.items() for key in rows}


def distinct() -> list[str]:
    """One name of each combination of task dims, policy, critic and algorithm."""
    names = {}
    for name in REFERENCE:
        node = plain(composed(name))
        node["policy"].pop("checkpoint")
        parts = [node[key] for key in ("task", "policy", "critic", "algorithm")]
        dims = {key: value for key, value in REFERENCE[name].items() if key.endswith(("_dim", "shape"))}
        names[json.dumps([*parts, dims], sort_keys=True)] = name
    return list(names.values())


def test_all_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy, critics, optimizers and buffers, and that a decision passes through them, which the memory forecast
    takes. Weights keep what was in memory, as drawing them would take most of the time.
    """
    for name in ("kaiming_uniform_", "uniform_", "trunc_normal_", "normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(build, "resolve_path", lambda path: path)
    monkeypatch.setattr(build, "start_policy", start)
    for name in distinct():
        monkeypatch.setattr(build, "make_env", lambda config, *_, name=name: StatedEnv(name, config))
        monkeypatch.setattr(build, "_trajectories", lambda _, name=name: stated_trajectories(name))
        config = build.parse(plain(composed(name)))
        if config.algorithm:
            make = build._build_offline if config.algorithm["name"] == "bc" else build._build_online
            make(config, Path(), CPU, torch.Generator(), None)
        else:
            env = StatedEnv(name, build.env_config(config))
            start(config, env.obs_shapes, env.action_dim, CPU)


def start(config: RunConfig, obs_shapes: ObsShapes, action_dim: int, device: torch.device) -> Policy:
    """The policy without its checkpoint."""
    return build.build_policy(config, obs_shapes, action_dim, config.seed)


def test_the_files_that_they_name_are_published() -> None:
    named = {
        path
        for name in config_names()
        for key in ("policy.checkpoint", "env.normalization", "data.path")
        if (path := OmegaConf.select(composed(name), key)) and not path.startswith(RECORDED)
    }
    assert named - {"running", "none"} <= downloads._places().keys()


def test_the_list_tells_what_hydra_composes() -> None:
    for name in config_names():
        node = composed(name)
        algorithm = node.algorithm.get("name", "evaluation")
        assert outline(name) == (node.env.id, algorithm, node.policy.network.name), name


def test_the_page_for_those_who_come_from_there_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
    assert key_table() in page
    assert difference_table() in page
    commands = re.findall(r"`python -m dppo_fast\.(?:train|evaluate) cfg=([^\s`]+)", page)
    assert len(commands) == 3
    assert set(commands) <= set(config_names())
