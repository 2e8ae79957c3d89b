from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dppo_fast.data import ChunkDataset, Trajectories, TrajectoryRecorder, epoch_batches
from dppo_fast.types import UserError
from tests.golden_files import FOLDERS, Case, golden_file

Arrays = dict[str, NDArray[Any]]


def arrays(lengths: list[int], state_dim: int = 3, action_dim: int = 2, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    steps = sum(lengths)
    return {
        "states": rng.standard_normal((steps, state_dim), np.float32),
        "actions": rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32),
        "traj_lengths": np.array(lengths),
        "rewards": rng.standard_normal(steps, np.float32),
        "terminals": rng.random(steps) < 0.1,
        "images": rng.integers(0, 256, (steps, 3, 2, 2), np.uint8),
    }


def savez(path: Path, data: dict[str, Any]) -> None:
    np.savez(path, **data)


def golden_windows() -> list[Any]:
    params = []
    for folder in FOLDERS:
        if not (folder / "09_datasets.npz").exists():
            continue
        file = golden_file(folder, "09_datasets")
        for name in dict.fromkeys(key.split("/")[0] for key in file):
            case, label = file.case(name), f"{folder.name}-{name}"
            if "state" in case and "next_state" not in case:
                params.append(pytest.param(file.case("data"), case, id=label, marks=pytest.mark.golden))
    return params


@pytest.mark.parametrize(("data", "case"), golden_windows())
def test_windows_equal_the_reference(data: Case, case: Case) -> None:
    trajectories = Trajectories(**data.sub("")).first(case.cfg.get("max_n_episodes"))
    sizes = case.cfg["horizon_steps"], case.cfg["cond_steps"]
    dataset = ChunkDataset(trajectories, *sizes, image_steps=case.cfg.get("img_cond_steps"))
    obs, action = dataset.batch(torch.arange(len(dataset)))
    np.testing.assert_array_equal(torch.stack([dataset.start, dataset.since_start], 1), case["indices_start_before"])
    np.testing.assert_array_equal(action, case["actions"])
    seen = {name: case[name] for name in ("state", "rgb") if name in case}
    assert obs.keys() == seen.keys()
    for name, value in seen.items():
        np.testing.assert_array_equal(obs[name], value)
    assert dataset.obs_shapes == {name: value.shape[1:] for name, value in seen.items()}
    assert dataset.action_dim == case["actions"].shape[-1]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    horizon=st.integers(1, 7),
    obs_steps=st.integers(1, 4),
    max_episodes=st.none() | st.integers(1, 6),
)
def test_windows_stay_inside_their_trajectory(
    lengths: list[int], horizon: int, obs_steps: int, max_episodes: int | None
) -> None:
    trajectories = Trajectories(**arrays(lengths)).first(max_episodes)
    used = lengths[:max_episodes]
    if horizon > max(used):
        with pytest.raises(UserError, match=f"horizon_steps={horizon} is longer than .*; at most {max(used)} fits"):
            ChunkDataset(trajectories, horizon, obs_steps)
        return
    expected = []
    for e, length in enumerate(used):
        first = sum(lengths[:e])
        for i in range(length - horizon + 1):
            history = [first + max(i - age, 0) for age in reversed(range(obs_steps))]
            expected.append((trajectories.states[history], trajectories.actions[first + i : first + i + horizon]))
    dataset = ChunkDataset(trajectories, horizon, obs_steps)
    assert len(dataset) == len(expected)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    obs, action = dataset.batch(order)
    np.testing.assert_array_equal(obs["state"], np.stack([expected[i][0] for i in order]))
    np.testing.assert_array_equal(action, np.stack([expected[i][1] for i in order]))


def test_images_are_read_when_they_are_looked_at(tmp_path: Path) -> None:
    path, data = tmp_path / "train.npz", arrays([3, 5])
    for compressed in (True, False):
        Trajectories(**data).save(path, compressed=compressed)
        images = Trajectories.load(path).images
        np.testing.assert_array_equal(images, data["images"])
        assert isinstance(images.base, np.memmap) == (not compressed)
    content = path.read_bytes()
    last = data["images"][-1].tobytes()
    assert content.count(last) == 1
    path.write_bytes(content.replace(last, bytes(len(last))))
    np.testing.assert_array_equal(images[-1], 0)


def test_images_that_are_not_there_are_missed() -> None:
    data = arrays([4])
    del data["images"]
    with pytest.raises(UserError, match="img_cond_steps=1: the data has no images"):
        ChunkDataset(Trajectories(**data), 2, 1, image_steps=1)


@pytest.mark.parametrize("key", ["horizon_steps", "cond_steps"])
def test_sizes_below_one_are_refused(key: str) -> None:
    sizes = {"horizon_steps": 2, "cond_steps": 1} | {key: 0}
    with pytest.raises(UserError, match=f"{key}=0: must be at least 1"):
        ChunkDataset(Trajectories(**arrays([4])), sizes["horizon_steps"], sizes["cond_steps"])


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 50), batch_size=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_an_epoch_visits_every_window_once_and_repeats_from_its_generator_state(
    n: int, batch_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if batch_size > n:
        with pytest.raises(UserError, match=f"batch_size={batch_size} is larger than the {n} windows"):
            epoch_batches(n, batch_size, generator)
        return
    state = generator.get_state()
    batches = list(epoch_batches(n, batch_size, generator))
    after = generator.get_state()
    assert [len(batch) for batch in batches] == [min(batch_size, n - i) for i in range(0, n, batch_size)]
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(n))
    generator.set_state(state)
    assert torch.equal(torch.cat(list(epoch_batches(n, batch_size, generator))), torch.cat(batches))
    assert torch.equal(generator.get_state(), after)


def test_the_next_epoch_is_another_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat(list(epoch_batches(50, 8, generator))) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size=0: must be at least 1"):
        epoch_batches(5, 0, torch.Generator())


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("optional", [("rewards", "terminals", "images"), ("rewards",), ()])
def test_a_file_holds_what_was_saved(tmp_path: Path, compressed: bool, optional: tuple[str, ...]) -> None:
    data = {key: v for key, v in arrays([3, 1, 5]).items() if key in ("states", "actions", "traj_lengths", *optional)}
    path = tmp_path / "train.npz"
    Trajectories(**data).save(path, compressed=compressed)
    first = path.read_bytes()
    Trajectories.load(path).save(path, compressed=compressed)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
    with np.load(path, allow_pickle=False) as file:
        assert set(file.files) == set(data)
        for key, value in data.items():
            np.testing.assert_array_equal(file[key], value)


def test_other_dtypes_of_the_same_values_are_taken(tmp_path: Path) -> None:
    data = arrays([3, 5])
    taken = {"states": "f8", "actions": "f2", "traj_lengths": "f4", "rewards": ">f4", "terminals": "i1", "images": "i8"}
    data = {key: array.astype(taken[key]) for key, array in data.items()}
    savez(tmp_path / "train.npz", data | {"extra": np.zeros(3)})
    loaded = Trajectories.load(tmp_path / "train.npz")
    kept = {"states": "f4", "actions": "f4", "traj_lengths": "i8", "rewards": "f4", "terminals": "?", "images": "u1"}
    for key, dtype in kept.items():
        assert getattr(loaded, key).dtype == dtype
        np.testing.assert_array_equal(getattr(loaded, key), data[key])


def test_a_file_with_raw_actions_warns(tmp_path: Path) -> None:
    savez(tmp_path / "train.npz", arrays([3]) | {"actions": np.full((3, 2), 2.5)})
    with pytest.warns(UserWarning, match=r"train\.npz: actions reach 2\.5; they should be normalised to \[-1, 1\]"):
        Trajectories.load(tmp_path / "train.npz")


def with_row(array: NDArray[Any], row: int, value: float) -> NDArray[Any]:
    changed = np.array(array, np.float64)
    changed[row] = value
    return changed


BAD_DATA: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "no states": (lambda a: {k: a[k] for k in a if k != "states"}, "key 'states' is missing; needed are states"),
    "no lengths": (lambda a: {k: a[k] for k in a if k != "traj_lengths"}, "key 'traj_lengths' is missing"),
    "objects": (lambda a: a | {"actions": a["actions"].astype(object)}, "actions is pickled, and unpickling runs code"),
    "strings": (lambda a: a | {"actions": a["actions"].astype("U8")}, "actions has dtype <U8; it must be float32"),
    "1-d states": (lambda a: a | {"states": a["states"][:, 0]}, r"states has shape \[8\]; it must be \[steps"),
    "3-d actions": (lambda a: a | {"actions": a["actions"][None]}, r"actions has shape \[1, 8, 2\]; it must"),
    "scalar lengths": (lambda a: a | {"traj_lengths": np.array(8)}, r"traj_lengths has shape \[\]"),
    "no state dim": (lambda a: a | {"states": np.zeros((8, 0))}, r"states has shape \[8, 0\]; no dimension"),
    "fewer actions": (lambda a: a | {"actions": a["actions"][1:]}, "actions has 7 rows and states 8"),
    "more rewards": (lambda a: a | {"rewards": np.zeros(9)}, "rewards has 9 rows and states 8"),
    "sum": (lambda a: a | {"traj_lengths": np.array([3, 4])}, "traj_lengths adds up to 7, states has 8 rows"),
    "empty trajectory": (lambda a: a | {"traj_lengths": np.array([3, 0, 5])}, r"traj_lengths\[1\]=0: every trajectory"),
    "negative": (lambda a: a | {"traj_lengths": np.array([3, 6, -1])}, r"traj_lengths\[2\]=-1: every trajectory"),
    "fractions": (lambda a: a | {"traj_lengths": np.array([3.5, 4.5])}, "traj_lengths is float64 with values"),
    "NaN lengths": (lambda a: a | {"traj_lengths": np.array([3, np.nan])}, "traj_lengths is float64 with values"),
    "no data": (lambda a: {k: v[:0] for k, v in a.items()}, "no data: states has 0 rows, traj_lengths 0"),
    "NaN": (lambda a: a | {"states": with_row(a["states"], 4, np.nan)}, "states has NaN or Inf in 1 of 8 .* row 4"),
    "Inf": (lambda a: a | {"rewards": with_row(a["rewards"], 0, -np.inf)}, "rewards has NaN or Inf in 1 of 8 .* row 0"),
    "overflow": (lambda a: a | {"actions": with_row(a["actions"], 2, 1e300)}, "actions has NaN or Inf .* row 2"),
    "float images": (lambda a: a | {"images": a["images"] / 255}, "images is float64 with values that uint8"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_named(tmp_path: Path, name: str) -> None:
    damage, message = BAD_DATA[name]
    path = tmp_path / "train.npz"
    savez(path, damage(arrays([3, 5])))
    with pytest.raises(UserError, match=r"train\.npz: " + message):
        Trajectories.load(path)


def bomb(path: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (path,)

    return pickle.dumps(Bomb())


def test_files_that_are_no_npz_are_named_and_never_unpickled(tmp_path: Path) -> None:
    Trajectories(**arrays([300, 500])).save(tmp_path / "good.npz", compressed=False)
    good, mark = (tmp_path / "good.npz").read_bytes(), tmp_path / "unpickled"
    for name, content, message in [
        ("train.pkl", bomb(mark), "a pickle is not loaded, because unpickling runs code"),
        ("train.npz", bomb(mark), "not an npz file"),
        ("empty.npz", b"", "not an npz file"),
        ("cut.npz", good[: len(good) // 2], "not an npz file, or cut off"),
        ("narrow.npz", good.replace(b"(800, 3)", b"(800, 2)"), "states is damaged"),
        ("syntax.npz", good.replace(b"(800, 3)", b"(800, (3"), "states is damaged"),
        ("large.npz", good.replace(b"(800, 3), }" + b" " * 10, b"(8000000000000, 3), }"), "states is damaged"),
        ("huge.npz", good.replace(b"(800, 3), }" + b" " * 18, b"(800000000000000000000, 3), }"), "states is damaged"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            Trajectories.load(tmp_path / name)
    for path in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(UserError, match=f"{path.name}: no such file"):
            Trajectories.load(path)
    assert not mark.exists()


@settings(deadline=None, max_examples=150)
@given(data=st.data(), compressed=st.booleans())
def test_a_damaged_file_never_gives_other_data(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, compressed: bool
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "train.npz"
    original = arrays([2, 1])
    Trajectories(**original).save(path, compressed=compressed)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = Trajectories.load(path)
    except UserError:
        return
    for key, value in original.items():
        if getattr(loaded, key) is not None:  # an optional array may have lost its name
            np.testing.assert_array_equal(getattr(loaded, key), value)


def test_describe_counts_and_returns() -> None:
    data = arrays([1, 2, 3]) | {"rewards": np.array([5, 1, 2, 10, 20, 30])}
    summary = Trajectories(**data).describe()
    returns = np.array([5, 3, 60])
    assert summary == pytest.approx(
        {
            "episodes": 3,
            "steps": 6,
            "length_mean": 2,
            "return_mean": returns.mean(),
            "return_std": returns.std(),
            "return_p10": np.quantile(returns, 0.1),
            "return_p90": np.quantile(returns, 0.9),
        }
    )
    del data["rewards"]
    assert set(Trajectories(**data).describe()) == {"episodes", "steps", "length_mean"}


Stream = tuple[Arrays, list[tuple[int, int, int]]]


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Steps [T, N] of N envs, and the finished episodes (env, first step, end) in the order of their ends."""
    steps, envs = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    kind = rng.choice(3, (steps, envs), p=[0.7, 0.15, 0.15])
    stream = {
        "state": rng.normal(5, 30, (steps, envs, 3)).astype(np.float32),
        "action": rng.normal(0, 0.4, (steps, envs, 2)).astype(np.float32),
        "reward": rng.normal(size=(steps, envs)).astype(np.float32),
        "terminated": kind == 1,
        "truncated": kind == 2,
    }
    stream["state"][..., 1] = 7.0
    first = [0] * envs
    episodes = []
    for step, env in np.argwhere(kind > 0).tolist():
        episodes.append((env, first[env], step + 1))
        first[env] = step + 1
    return stream, episodes


@settings(deadline=None, max_examples=60)
@given(stream=streams())
def test_recorded_steps_become_whole_episodes(stream: Stream) -> None:
    steps, expected = stream
    recorder = TrajectoryRecorder(steps["reward"].shape[1])
    buffer = {key: np.empty_like(value[0]) for key, value in steps.items()}
    returned = []
    for t in range(len(steps["reward"])):
        for key, value in steps.items():
            buffer[key][:] = value[t]  # as envs do, the same memory every step
        returned += recorder.record(**buffer)
    assert returned == recorder.episodes
    assert len(returned) == len(expected)
    for episode, (env, first, end) in zip(returned, expected, strict=True):
        for name in ("state", "action", "reward"):
            recorded = getattr(episode, name + "s")
            assert recorded.dtype == np.float32
            np.testing.assert_array_equal(recorded, steps[name][first:end, env])
        assert episode.terminated == steps["terminated"][end - 1, env]
        assert episode.episode_return == pytest.approx(steps["reward"][first:end, env].sum(), rel=1e-5, abs=1e-5)
    if not expected:
        with pytest.raises(UserError, match="none has ended"):
            recorder.to_trajectories()
        return

    trajectories, _ = recorder.to_trajectories()
    raw = {name: np.concatenate([steps[name][first:end, env] for env, first, end in expected]) for name in steps}
    for name, recorded in [("state", trajectories.states), ("action", trajectories.actions)]:
        low, high = raw[name].min(0), raw[name].max(0)
        normalised = 2 * ((raw[name] - low) / (high - low + 1e-6) - 0.5)
        varying = high > low
        np.testing.assert_allclose(recorded[:, varying], normalised[:, varying], atol=1e-4)
        assert np.abs(recorded).max() <= 1 + 1e-6
    np.testing.assert_array_equal(trajectories.traj_lengths, [end - first for _, first, end in expected])
    np.testing.assert_array_equal(trajectories.terminals, raw["terminated"])
    np.testing.assert_array_equal(trajectories.rewards, raw["reward"])


def recorder_with_returns(*returns: float) -> TrajectoryRecorder:
    recorder = TrajectoryRecorder(1)
    yes, no = np.array([True]), np.array([False])
    for i, value in enumerate(returns):
        recorder.record(np.full((1, 3), i), np.full((1, 2), i), np.array([value]), yes, no)
    return recorder


def test_episodes_are_chosen_by_return() -> None:
    recorder = recorder_with_returns(1, 5, 9, 7)
    np.testing.assert_array_equal(recorder.to_trajectories(min_return=5)[0].returns, [5, 9, 7])
    chosen, minmax = recorder.to_trajectories(min_return=5, max_return=7)
    np.testing.assert_array_equal(chosen.returns, [5, 7])
    np.testing.assert_array_equal([minmax.action_min, minmax.action_max], [[1, 1], [3, 3]])
    with pytest.raises(UserError, match=r"min_return=10, .* leave no episode; the returns reach from 1 to 9"):
        recorder.to_trajectories(min_return=10)


def test_an_episode_that_the_simulator_broke_is_thrown_away() -> None:
    recorder = TrajectoryRecorder(2)
    state, action, reward = np.ones((2, 3)), np.ones((2, 2)), np.ones(2)
    yes, no = np.array([True, True]), np.array([False, False])
    recorder.record(state, action, reward, no, no)
    ended = recorder.record(state, action, np.array([np.nan, 1]), no, yes, valid=np.array([False, True]))
    assert [episode.episode_return for episode in ended] == [2]
    assert [episode.episode_return for episode in recorder.record(state, action, reward, yes, no)] == [1, 1]


def test_recorded_actions_come_back_through_the_normalisation() -> None:
    recorder = recorder_with_returns(1, 5, 9, 7)
    trajectories, minmax = recorder.to_trajectories()
    raw = np.concatenate([episode.actions for episode in recorder.episodes])
    np.testing.assert_allclose(minmax.unnormalize_action(trajectories.actions), raw, atol=1e-5)
