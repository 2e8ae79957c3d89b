from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dppo_fast.envs import Identity, MinMax, Running
from dppo_fast.types import UserError
from tests.golden_files import Case, golden_cases

Arrays = dict[str, Any]


def bounds() -> Arrays:
    return {
        "obs_min": np.array([-1.0, 0.0, 2.0]),
        "obs_max": np.array([1.0, 5.0, 2.0]),
        "action_min": np.array([-2.0, 0.0]),
        "action_max": np.array([2.0, 1.0]),
    }


@pytest.mark.parametrize("case", golden_cases("10_normalization", lambda case: case.name.startswith("minmax")))
def test_min_max_agrees_with_the_reference(case: Case, tmp_path: Path) -> None:
    np.savez(tmp_path / "n.npz", **{key: case[key] for key in bounds()})
    normalization = MinMax.load(tmp_path / "n.npz", len(case["obs_min"]), len(case["action_min"]))
    np.testing.assert_allclose(normalization.normalize_obs(case["raw_obs"]), case["norm_obs"], rtol=1e-6)
    np.testing.assert_allclose(normalization.unnormalize_action(case["action"]), case["raw_action"], rtol=1e-6)


@pytest.mark.parametrize("case", golden_cases("10_normalization", lambda case: case.name.startswith("linear")))
def test_ranges_of_data_agree_with_the_reference(case: Case) -> None:
    data = case["data"]
    normalization = MinMax.from_data(data, data, epsilon=0)
    np.testing.assert_allclose(normalization.obs_min, case["w/stats.observations.min"], rtol=1e-6)
    np.testing.assert_allclose(normalization.obs_max, case["w/stats.observations.max"], rtol=1e-6)
    np.testing.assert_allclose(normalization.normalize_obs(data), case["normalized"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(normalization.unnormalize_action(data), case["denormalized"], rtol=1e-6, atol=1e-6)


def test_demonstrations_survive_the_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(50, 4, 3)), rng.normal(size=(50, 4, 2))
    MinMax.from_data(states, actions).save(tmp_path / "n.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["n.npz"]
    normalization = MinMax.load(tmp_path / "n.npz", 3, 2)
    scaled = normalization.normalize_action(actions)
    assert scaled.min() == -1
    assert scaled.max() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(normalization.unnormalize_action(scaled), actions, atol=1e-5)


def test_identity_and_running_scale_actions_to_the_bounds() -> None:
    action = np.array([[-1, -1], [0, 1], [2, 0]], np.float32)
    expected = [[-2, 0], [0, 1], [4, 0.5]]  # not clipped
    for normalization in (Identity([-2, 0], [2, 1]), Running([-2, 0], [2, 1], 3)):
        np.testing.assert_allclose(normalization.unnormalize_action(action), expected)


def test_running_statistics_are_those_of_all_rows() -> None:
    batches = np.random.default_rng(1).normal([1, -5, 1000], [1, 3, 0.1], size=(20, 7, 3))
    running = Running([-1], [1], 3)
    running.count = np.array(0.0)
    for batch in batches:
        running.update(batch)
    rows = batches.reshape(-1, 3)
    np.testing.assert_allclose(running.mean, rows.mean(0))
    np.testing.assert_allclose(running.variance, rows.var(0))
    assert running.normalize_obs(rows * 100).max() == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("obs_max"), "lacks obs_max"),
        (lambda a: a.update(obs_min=np.zeros(4)), r"obs_min has shape \(4,\), expected \(3,\)"),
        (lambda a: a.update(action_max=np.zeros((2, 1))), r"action_max has shape \(2, 1\), expected \(2,\)"),
        (lambda a: a.update(obs_min=np.array([0, np.nan, 0])), "obs_min holds something other than finite numbers"),
        (lambda a: a.update(action_min=np.array(["a", "b"])), "action_min holds something other than finite numbers"),
        (lambda a: a.update(action_min=np.array([{}, {}])), "not a readable npz file"),
        (lambda a: a.update(obs_min=np.array([-1.0, 6.0, 2.0])), r"obs_min exceeds obs_max in columns \[1\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change: Callable[[Arrays], Any], message: str, tmp_path: Path) -> None:
    arrays = bounds()
    change(arrays)
    np.savez(tmp_path / "broken.npz", **arrays)
    with pytest.raises(UserError, match=rf"broken\.npz: {message}"):
        MinMax.load(tmp_path / "broken.npz", 3, 2)


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        for name in bounds():
            archive.writestr(name, b"text")
    with pytest.raises(UserError, match=r"odd\.npz: obs_min has shape \(\), expected \(3,\)"):
        MinMax.load(tmp_path / "odd.npz", 3, 2)


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", **bounds())
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"text",
        "npy": (tmp_path / "array.npy").read_bytes(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a readable npz file"):
            MinMax.load(tmp_path / name, 3, 2)
    with pytest.raises(UserError, match="nowhere: no such file"):
        MinMax.load(tmp_path / "nowhere", 3, 2)


def test_a_state_of_another_kind_or_size_is_refused() -> None:
    state = Running([-1], [1], 3).state_dict()
    with pytest.raises(UserError, match="holds"):
        Identity([-1], [1]).load_state_dict(state)
    with pytest.raises(UserError, match=r"mean has shape \(3,\), expected \(4,\)"):
        Running([-1], [1], 4).load_state_dict(state)
