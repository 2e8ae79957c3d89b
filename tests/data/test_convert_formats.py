"""Every format, from a small dataset of it to ours and back to its own numbers."""

from __future__ import annotations

import pickle
import re
import shlex
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from dppo_fast.collect import main as collect
from dppo_fast.data.convert import FORMATS
from dppo_fast.data.convert.__main__ import main
from dppo_fast.data.inspect import main as inspect
from tests.data.conversions import (
    LENGTHS,
    Array,
    check,
    convert,
    d3il,
    d4rl,
    frames,
    lerobot,
    npz,
    robomimic,
    steps,
)

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()


def joined(tables: dict[str, list[Array]], *keys: str) -> list[Array]:
    return [np.concatenate([tables[key][i].reshape(len(tables[key][i]), -1) for key in keys], -1) for i in range(3)]


def channels_first(*cameras: list[Array]) -> Array:
    return np.concatenate([np.concatenate(camera).transpose(0, 3, 1, 2) for camera in cameras], 1)


def reference_data() -> dict[str, Array]:
    return {
        "states": np.concatenate(steps(3, 0, 1.0)),
        "actions": np.concatenate(steps(2, 1, 1.0)),
        "traj_lengths": np.array(LENGTHS),
        "rewards": np.arange(76, dtype=np.float32),
        "terminals": np.arange(76) == 4,
        "images": channels_first(frames(2)),
    }


@pytest.mark.parametrize("write", ["npz", "compressed npz", "pickle 2", "pickle 5"])
def test_reference(write: str, tmp_path: Path) -> None:
    data = reference_data()
    source = tmp_path / ("train.npz" if "npz" in write else "train.pkl")
    if "npz" in write:
        npz(source, data, compressed=write != "npz")
    else:
        source.write_bytes(pickle.dumps(data, protocol=int(write[-1])))
    bounds = {"obs_min": -np.ones(3), "obs_max": 2 * np.ones(3), "action_min": -np.ones(2), "action_max": np.ones(2)}
    npz(tmp_path / "normalization.npz", bounds)
    trajectories, minmax = convert("reference", source, tmp_path / "out")
    for key, value in data.items():
        np.testing.assert_array_equal(getattr(trajectories, key), value)
    assert trajectories.images is not None
    assert isinstance(trajectories.images.base, np.memmap)
    np.testing.assert_array_equal(minmax.obs_max, bounds["obs_max"])


def test_raw_data_in_the_reference_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = reference_data() | {"actions": np.concatenate(steps(2, 1))}
    npz(tmp_path / "train.npz", data)
    assert main(["reference", f"source={tmp_path / 'train.npz'}", f"out={tmp_path / 'out'}"]) == 2
    assert "so they are not normalised; set normalized=false" in capsys.readouterr().err
    check(
        convert("reference", tmp_path / "train.npz", tmp_path / "raw", "normalized=false"),
        steps(3, 0, 1.0),
        steps(2, 1),
    )


def test_without_a_normalisation_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    npz(tmp_path / "train.npz", reference_data())
    assert main(["reference", f"source={tmp_path / 'train.npz'}", f"out={tmp_path / 'out'}"]) == 0
    assert "No normalisation came with the data" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train.npz"]


def test_d4rl(tmp_path: Path) -> None:
    content = d4rl(tmp_path / "data.hdf5")
    trajectories, minmax = convert("d4rl", tmp_path / "data.hdf5", tmp_path / "out")
    check((trajectories, minmax), steps(3, 0), steps(2, 1, 1.0))
    np.testing.assert_array_equal(trajectories.rewards, content["rewards"])
    np.testing.assert_array_equal(trajectories.terminals, content["terminals"])


def test_d4rl_without_timeouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    d4rl(tmp_path / "data.hdf5", timeouts=False)
    trajectories, _ = convert("d4rl", tmp_path / "data.hdf5", tmp_path / "out", "max_episode_steps=30")
    assert trajectories.traj_lengths.tolist() == [5, 30, 30, 11]
    assert trajectories.terminals is not None
    assert np.flatnonzero(trajectories.terminals).tolist() == [4]
    assert main(["d4rl", f"source={tmp_path / 'data.hdf5'}", f"out={tmp_path / 'none'}"]) == 2
    assert "the file has no timeouts: give the time limit, max_episode_steps=<steps>" in capsys.readouterr().err


def test_minari_s_own_file(tmp_path: Path) -> None:
    """Written by Minari 0.5.4: an episode of n steps counts to n, from dict observations with JPEG images."""
    zipfile.ZipFile(Path(__file__).with_name("minari.zip")).extractall(tmp_path)
    keys = ["low_dim_keys=[observation,desired_goal,step]", "cameras=[pixels]"]
    trajectories, minmax = convert("minari", tmp_path, tmp_path / "out", *keys)
    counts = np.concatenate([np.arange(n) for n in (5, 4, 5)])
    states = np.stack([counts, counts / 2, -counts, np.ones(14), counts % 2, counts], 1)
    np.testing.assert_array_equal(trajectories.traj_lengths, [5, 4, 5])
    np.testing.assert_allclose(trajectories.states, minmax.normalize_obs(states), atol=1e-6)
    np.testing.assert_array_equal(trajectories.rewards, counts + 1)
    assert trajectories.terminals is not None
    assert np.flatnonzero(trajectories.terminals).tolist() == [8]  # the others end by truncation
    assert trajectories.images is not None
    assert trajectories.images.shape == (14, 3, 32, 32)
    expected = np.stack([40 * counts % 256, np.full(14, 100), np.full(14, 200)], 1)
    assert np.abs(trajectories.images - expected[:, :, None, None]).max() <= 3  # JPEG
    convert("minari", tmp_path / "data/main_data.hdf5", tmp_path / "vectors")


@pytest.mark.parametrize("arms", [1, 2])
def test_robomimic_states(arms: int, tmp_path: Path) -> None:
    obs = robomimic(tmp_path / "low_dim.hdf5", arms)
    keys = [f"robot{arm}_{part}" for arm in range(arms) for part in ("eef_pos", "eef_quat", "gripper_qpos")]
    trajectories, minmax = convert("robomimic", tmp_path / "low_dim.hdf5", tmp_path / "out")
    check((trajectories, minmax), joined(obs, *keys, "object"), steps(7, 8, 1.0))
    assert trajectories.state_dim == 9 * arms + 10
    assert trajectories.rewards is not None
    assert trajectories.terminals is not None
    for column in (trajectories.rewards, trajectories.terminals):
        assert np.flatnonzero(column).tolist() == [4, 74]  # the third has no success


def test_robomimic_images_and_masks(tmp_path: Path) -> None:
    obs = robomimic(tmp_path / "image.hdf5")
    cameras = "cameras=[agentview,robot0_eye_in_hand]"
    trajectories, _ = convert("robomimic", tmp_path / "image.hdf5", tmp_path / "out", cameras)
    assert trajectories.state_dim == 9  # without the object
    both = obs["agentview_image"], obs["robot0_eye_in_hand_image"]
    np.testing.assert_array_equal(trajectories.images, channels_first(*both))
    arguments = [cameras, "image_size=[2,3]", "mask=train", "low_dim_keys=[object]"]
    small, minmax = convert("robomimic", tmp_path / "image.hdf5", tmp_path / "small", *arguments)
    check((small, minmax), [obs["object"][0], obs["object"][2]], [steps(7, 8, 1.0)[i] for i in (0, 2)])
    means = channels_first(*([camera[0], camera[2]] for camera in both)).reshape(6, 6, 2, 2, 3, 2).mean((3, 5))
    assert small.images is not None
    assert np.abs(small.images - means).max() <= 1


def test_d3il(tmp_path: Path) -> None:
    contents = d3il(tmp_path / "demos")
    made = convert("d3il", tmp_path / "demos", tmp_path / "out")
    robots = [content["robot"] for content in contents]
    states = [np.concatenate([robot["des_c_pos"][:-1, :2], robot["c_pos"][:-1, :2]], 1) for robot in robots]
    check(made, states, [robot["des_c_pos"][1:, :2] - robot["des_c_pos"][:-1, :2] for robot in robots])
    keys = ["low_dim_keys=[push-box/pos,push-box/quat]", "action_key=robot/c_pos"]
    made = convert("d3il", tmp_path / "demos", tmp_path / "box", *keys)
    boxes = [np.concatenate([content["push-box"][key][:-1] for key in ("pos", "quat")], 1) for content in contents]
    check(made, boxes, [np.diff(robot["c_pos"], axis=0) for robot in robots])


def test_lerobot(tmp_path: Path) -> None:
    content = lerobot(tmp_path / "data")
    keys = ["low_dim_keys=[observation.state,observation.goal]"]
    trajectories, minmax = convert("lerobot", tmp_path / "data", tmp_path / "out", *keys)
    check((trajectories, minmax), joined(content, "observation.state", "observation.goal"), content["action"])
    np.testing.assert_array_equal(trajectories.rewards, np.concatenate(content["next.reward"]))
    assert trajectories.terminals is not None
    assert np.flatnonzero(trajectories.terminals).tolist() == [4, 74, 75]


def test_lerobot_images(tmp_path: Path) -> None:
    content = lerobot(tmp_path / "data")
    for camera in ("observation.images.png", "observation.images.top"):
        trajectories, _ = convert("lerobot", tmp_path / "data", tmp_path / camera, f"cameras=[{camera}]")
        np.testing.assert_array_equal(trajectories.images, channels_first(content[camera]))
    keys = ["cameras=[observation.images.png,observation.images.top]", "image_size=[4,6]"]
    trajectories, _ = convert("lerobot", tmp_path / "data", tmp_path / "both", *keys)
    assert trajectories.images is not None
    np.testing.assert_array_equal(trajectories.images[:, :3], channels_first(content["observation.images.png"]))
    means = channels_first(content["observation.images.top"]).reshape(76, 3, 4, 8, 6, 8).mean((3, 5))
    assert np.abs(trajectories.images[:, 3:] - means).max() <= 2


def test_lerobot_s_default_codec(tmp_path: Path) -> None:
    content = lerobot(tmp_path / "data", "libsvtav1", (64, 64))
    keys = ["cameras=[observation.images.top]", "image_size=[2,2]"]
    trajectories, _ = convert("lerobot", tmp_path / "data", tmp_path / "out", *keys)
    means = channels_first(content["observation.images.top"]).reshape(76, 3, 2, 32, 2, 32).mean((3, 5))
    assert trajectories.images is not None
    assert np.abs(trajectories.images - means).max() < 12


@pytest.mark.parametrize("name", FORMATS)
def test_help_explains_a_format_and_its_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    for key in fields(FORMATS[name]):
        assert re.search(rf"^{key.name}:", shown, re.MULTILINE)


def test_an_unknown_format_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["d4lr"]) == 2
    assert (
        "format=d4lr is unknown (did you mean d4rl or d3il?); choose one of reference, d4rl" in capsys.readouterr().err
    )
    assert main([]) == 0
    assert "robomimic" in capsys.readouterr().out


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_documented(name: str) -> None:
    assert f"| `{name}` |" in PAGE
    assert f"dppo_fast.data.convert {name} " in PAGE


def test_the_documented_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    d4rl(tmp_path / "hopper_medium-v2.hdf5")
    zipfile.ZipFile(Path(__file__).with_name("minari.zip")).extractall(tmp_path / "minari/counting-v0")
    for file in ("low_dim_v141.hdf5", "image_v141.hdf5"):
        robomimic(tmp_path / file)
    d3il(tmp_path / "avoiding")
    lerobot(tmp_path / "so100_pick")
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(reference_data()))
    mains = {"convert": main, "inspect": inspect, "collect": collect}
    for line in re.findall(r"^python -m dppo_fast\.(.*)", PAGE, re.MULTILINE):
        module, *arguments = shlex.split(line)
        assert mains[module.removeprefix("data.")](arguments) == 0, line
    assert len(list((tmp_path / "data").glob("*/train.npz"))) == 8
    assert (tmp_path / "data/lift/train.png").stat().st_size > 10_000
