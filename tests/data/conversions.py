"""Small datasets in the formats of others, and what all conversions are held to."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from dppo_fast.data import Trajectories
from dppo_fast.data.convert.__main__ import main
from dppo_fast.envs.normalize import MinMax

Array = NDArray[Any]

LENGTHS = (5, 70, 1)
"""Of the trajectories; the second is longer than a block of images."""


def steps(width: int, seed: int, scale: float = 3.0) -> list[Array]:
    """A table of random numbers for every trajectory."""
    rng = np.random.default_rng(seed)
    return [scale * rng.uniform(-1, 1, (length, width)).astype(np.float32) for length in LENGTHS]


def frames(seed: int, size: tuple[int, int] = (4, 6)) -> list[Array]:
    """Random pictures [L, H, W, 3] for every trajectory."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (length, *size, 3), np.uint8) for length in LENGTHS]


def convert(name: str, source: Path, out: Path, *arguments: str) -> tuple[Trajectories, MinMax]:
    """What the command makes of ``source``: the demonstrations and their normalisation."""
    assert main([name, f"source={source}", f"out={out}", *arguments]) == 0
    assert {file.name for file in out.iterdir()} == {"train.npz", "normalization.npz"}
    trajectories = Trajectories.load(out / "train.npz")
    return trajectories, MinMax.load(out / "normalization.npz", trajectories.state_dim, trajectories.action_dim)


def check(made: tuple[Trajectories, MinMax], states: list[Array], actions: list[Array]) -> None:
    """The trajectories of ``made`` are these, normalised by their ranges."""
    trajectories, minmax = made
    raw_states, raw_actions = np.concatenate(states), np.concatenate(actions)
    np.testing.assert_array_equal(trajectories.traj_lengths, [len(table) for table in states])
    np.testing.assert_allclose(minmax.obs_min, raw_states.min(0), rtol=1e-6)
    np.testing.assert_allclose(minmax.action_max, raw_actions.max(0), rtol=1e-6)
    np.testing.assert_allclose(trajectories.states, minmax.normalize_obs(raw_states), atol=1e-6)
    np.testing.assert_allclose(minmax.unnormalize_action(trajectories.actions), raw_actions, atol=1e-5)


def d4rl(path: Path, timeouts: bool = True) -> dict[str, Array]:
    """The first trajectory ends in a terminal state, the second by a time limit, the last with the file."""
    content = {
        "observations": np.concatenate(steps(3, 0)),
        "actions": np.concatenate(steps(2, 1, 1.0)),
        "rewards": np.arange(76, dtype=np.float32),
        "terminals": np.arange(76) == 4,
    }
    if timeouts:
        content["timeouts"] = np.arange(76) == 74
    with h5py.File(path, "w") as file:
        for key, value in content.items():
            file.create_dataset(key, data=value, compression="gzip")
        file["metadata/algorithm"] = "none"
    return content


def robomimic(path: Path, arms: int = 1) -> dict[str, list[Array]]:
    """Observations by name; the last demonstration ends without a reward, and its name sorts before the second's."""
    parts = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}
    obs = {f"robot{arm}_{part}": steps(width, arm) for arm in range(arms) for part, width in parts.items()}
    obs |= {"object": steps(10, 5), "agentview_image": frames(6), "robot0_eye_in_hand_image": frames(7)}
    with h5py.File(path, "w") as file:
        for i, name in enumerate(("demo_1", "demo_9", "demo_10")):
            demo = file.create_group(f"data/{name}")
            ended = np.arange(LENGTHS[i]) == LENGTHS[i] - 1
            demo["actions"], demo["dones"] = steps(7, 8, 1.0)[i].astype(np.float64), ended.astype(np.int64)
            demo["rewards"] = (ended & (i < 2)).astype(np.float64)
            demo["states"] = np.zeros((LENGTHS[i], 32))
            for key, tables in obs.items():
                demo[f"obs/{key}"] = tables[i]
                demo[f"next_obs/{key}"] = tables[i]
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift"})
        file["mask/train"] = np.array([b"demo_10", b"demo_1"])
    return obs


def d3il(folder: Path) -> list[dict[str, Any]]:
    """State files as D3IL's recorder writes them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = []
    for i, length in enumerate((30, 12)):
        robot = {key: rng.normal(size=(length, 3)) for key in ("des_c_pos", "c_pos", "c_vel", "des_c_vel")}
        robot |= {"c_quat": rng.normal(size=(length, 4)), "time_stamp": np.arange(length) / 1e3}
        box = {"pos": rng.normal(size=(length, 3)), "quat": rng.normal(size=(length, 4))}
        contents.append({"robot": robot, "push-box": box})
        (folder / f"env_{i:04d}_00.pkl").write_bytes(pickle.dumps(contents[-1]))
    return contents


def lerobot(root: Path, codec: str = "libx264rgb", size: tuple[int, int] = (32, 48)) -> dict[str, list[Array]]:
    """Two data files, whose border is inside an episode, and two videos; a camera of PNGs."""
    content = {
        "observation.state": steps(3, 0),
        "observation.goal": steps(1, 1),
        "action": steps(2, 2),
        "next.reward": [np.arange(length) / 2 for length in LENGTHS],
        "observation.images.png": frames(3),
        "observation.images.top": frames(4, size),
    }
    rows = []
    for episode, length in enumerate(LENGTHS):
        for frame in range(length):
            row = {key: tables[episode][frame] for key, tables in content.items()}
            buffer = BytesIO()
            Image.fromarray(row.pop("observation.images.png")).save(buffer, format="PNG")
            row.pop("observation.images.top")
            row = {key: value.tolist() for key, value in row.items()}
            row["observation.goal"] = row["observation.goal"][0]  # a feature of one number is no list
            row["observation.images.png"] = {"bytes": buffer.getvalue(), "path": f"frame-{frame:06d}.png"}
            rows.append(row | {"episode_index": episode, "frame_index": frame, "next.done": frame == length - 1})
    features = {
        key: {"dtype": "float32", "shape": [1 if tables[0].ndim == 1 else tables[0].shape[1]]}
        for key, tables in content.items()
    }
    features["observation.images.png"] = {"dtype": "image", "shape": [4, 6, 3]}
    features["observation.images.top"] = {"dtype": "video", "shape": [*size, 3]}
    features["next.done"] = {"dtype": "bool", "shape": [1]}
    info = {"codebase_version": "v3.0", "fps": 10, "total_frames": 76, "total_episodes": 3, "features": features}
    write(root / "meta/info.json", json.dumps(info).encode())
    for i, part in enumerate((rows[:40], rows[40:])):
        write_table(root / f"data/chunk-000/file-{i:03d}.parquet", part)
    videos = (np.concatenate(content["observation.images.top"][:2]), content["observation.images.top"][2])
    for i, pictures in enumerate(videos):
        write_video(root / f"videos/observation.images.top/chunk-000/file-{i:03d}.mp4", pictures, codec)
    places = [(0, 0.0), (0, 0.5), (1, 0.0)]
    episodes: list[dict[str, Any]] = [
        {
            "episode_index": i,
            "length": LENGTHS[i],
            "videos/observation.images.top/chunk_index": 0,
            "videos/observation.images.top/file_index": file,
            "videos/observation.images.top/from_timestamp": start,
        }
        for i, (file, start) in enumerate(places)
    ]
    write_table(root / "meta/episodes/chunk-000/file-000.parquet", episodes)
    return content


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_video(path: Path, pictures: Array, codec: str) -> None:
    """Without loss where the codec can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pictures.shape[1:3]
    lossless = ["-qp", "0"] if codec == "libx264rgb" else ["-crf", "10"]
    pix_fmt = "rgb24" if codec == "libx264rgb" else "yuv420p"
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=10, codec=codec, pix_fmt_out=pix_fmt, quality=None, output_params=lossless
    )
    writer.send(None)
    for picture in pictures:
        writer.send(np.ascontiguousarray(picture))
    writer.close()


def altered(path: Path, change: Callable[[Any], None]) -> None:
    """Change an HDF5 file in place."""
    with h5py.File(path, "r+") as file:
        change(file)


def npz(path: Path, content: Mapping[str, Any], compressed: bool = False) -> None:
    save: Any = np.savez_compressed if compressed else np.savez
    save(path, **content)
