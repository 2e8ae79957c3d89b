"""What conversions are held to whatever the format: bad input, interruption, memory, ranges."""

from __future__ import annotations

import json
import pickle
import re
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dppo_fast.cli import INTERRUPTED
from dppo_fast.data import Trajectories
from dppo_fast.data.convert import Block, Conversion, Stream
from dppo_fast.data.convert import convert as run_conversion
from dppo_fast.data.convert.__main__ import main
from dppo_fast.types import UserError
from tests.data.conversions import (
    altered,
    d3il,
    d4rl,
    lerobot,
    robomimic,
    write,
    write_table,
)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def replaced(path: Path, key: str, value: Any) -> None:
    def change(file: Any) -> None:
        del file[key]
        if value is not None:
            file[key] = value

    altered(path, change)


def scrambled(path: Path, key: str) -> None:
    """Overwrite the compressed rows of a table."""
    with h5py.File(path) as file:
        chunk = file[key].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 8 : chunk.byte_offset + chunk.size] = b"\xaa" * (chunk.size - 8)
    path.write_bytes(content)


def edit_info(root: Path, **changes: Any) -> None:
    info = json.loads((root / "meta/info.json").read_bytes()) | changes
    write(root / "meta/info.json", json.dumps(info).encode())


def grouped(path: Path) -> None:
    replaced(path, "actions", None)
    altered(path, lambda file: file.create_dataset("actions/x", data=np.ones(3)))


def strangely_named(path: Path) -> None:
    replaced(path, "actions", None)
    altered(path, lambda file: file.create_group(b"\xff"))


def lacking(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, states=np.ones((3, 2)))


MAKERS: dict[str, Callable[[Path], Any]] = {"d4rl": d4rl, "robomimic": robomimic, "d3il": d3il, "lerobot": lerobot}

TOP = "cameras=[observation.images.top]"
VIDEO = "videos/observation.images.top/chunk-000/file-000.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"

FAULTS: dict[str, tuple[str, Callable[[Path], Any], list[str], str]] = {
    "d4rl: absent": ("d4rl", lambda path: path.unlink(), [], "no such file"),
    "d4rl: cut off": ("d4rl", cut, [], "data is not a readable HDF5 file, or is cut off"),
    "d4rl: no HDF5": ("d4rl", lambda path: path.write_bytes(b"text"), [], "data is not a readable HDF5 file"),
    "d4rl: damaged rows": ("d4rl", lambda path: scrambled(path, "observations"), [], "/observations is damaged"),
    "d4rl: missing key": (
        "d4rl",
        lambda path: replaced(path, "actions", None),
        [],
        "/ has no readable 'actions'; it holds metadata, observations, rewards, terminals, timeouts",
    ),
    "d4rl: short rewards": (
        "d4rl",
        lambda p: replaced(p, "rewards", np.ones(70)),
        [],
        "/rewards has 70 rows, and needs",
    ),
    "d4rl: wrong dims": (
        "d4rl",
        lambda path: replaced(path, "actions", np.ones((76, 2, 2))),
        [],
        r"/actions has shape \[76, 2, 2\]; it must have 2 dims",
    ),
    "d4rl: text": (
        "d4rl",
        lambda p: replaced(p, "actions", np.full((76, 2), b"x")),
        [],
        r"actions has dtype \|S1; numbers are needed",
    ),
    "d4rl: a type": ("d4rl", lambda path: replaced(path, "actions", np.dtype("f8")), [], "a table is needed"),
    "d4rl: a name in no encoding": ("d4rl", strangely_named, [], r"has no readable 'actions'; it holds .*b'\\xff'"),
    "d4rl: a group": ("d4rl", grouped, [], "/actions is a group, of x; a table is needed"),
    "d4rl: NaN": (
        "d4rl",
        lambda path: altered(path, lambda file: file["observations"].__setitem__((7, 1), np.nan)),
        [],
        "states has NaN or Inf in 1 of 76 rows, first in row 7",
    ),
    "d4rl: limit": ("d4rl", lambda path: None, ["max_episode_steps=5"], "the file has timeouts of its own; remove it"),
    "d4rl: unknown key": ("d4rl", lambda path: None, ["max_steps=5"], "max_steps is unknown"),
    "robomimic: raw recording": (
        "robomimic",
        lambda path: replaced(path, "data/demo_1/obs", None),
        [],
        "/data/demo_1 holds states of the simulator and no obs; robomimic's dataset_states_to_obs.py makes them",
    ),
    "robomimic: no such camera": (
        "robomimic",
        lambda path: None,
        ["cameras=[top]"],
        "has no readable 'top_image'; it holds",
    ),
    "robomimic: no such mask": (
        "robomimic",
        lambda path: None,
        ["mask=valid"],
        "/mask has no readable 'valid'; it holds train",
    ),
    "robomimic: other widths": (
        "robomimic",
        lambda path: replaced(path, "data/demo_9/actions", np.ones((70, 6))),
        [],
        r"actions have different widths in different trajectories: \[\(6,\), \(7,\)\]",
    ),
    "robomimic: other image size": (
        "robomimic",
        lambda path: replaced(path, "data/demo_9/obs/agentview_image", np.ones((70, 5, 6, 3), np.uint8)),
        ["cameras=[agentview]"],
        r"images change from \(3, 4, 6\) to \(3, 5, 6\); set image_size=\[H, W\]",
    ),
    "robomimic: other cameras": (
        "robomimic",
        lambda path: replaced(path, "data/demo_1/obs/agentview_image", np.ones((5, 5, 6, 3), np.uint8)),
        ["cameras=[agentview,robot0_eye_in_hand]"],
        "cameras have images of different sizes",
    ),
    "robomimic: image of floats": (
        "robomimic",
        lambda path: replaced(path, "data/demo_1/obs/agentview_image", np.ones((5, 4, 6, 3))),
        ["cameras=[agentview]"],
        "agentview is float64 .* images must be uint8",
    ),
    "robomimic: image size": (
        "robomimic",
        lambda path: None,
        ["cameras=[agentview]", "image_size=[96]"],
        r"image_size=\[96\]: give \[height, width\] in pixels",
    ),
    "robomimic: no data": ("robomimic", lambda path: replaced(path, "data", None), [], "/ has no readable 'data'"),
    "minari: no hdf5": ("minari", lambda path: path.mkdir(), [], "no such file: .*main_data.hdf5"),
    "d3il: no files": ("d3il", lambda path: [file.unlink() for file in path.iterdir()], [], "the folder holds no .pkl"),
    "d3il: no such key": (
        "d3il",
        lambda path: None,
        ["low_dim_keys=[robot/pose]"],
        r"env_0000_00\.pkl: has no 'robot/pose': there is des_c_pos",
    ),
    "d3il: too few columns": (
        "d3il",
        lambda p: None,
        ["action_key=robot/c_pos:4"],
        "'robot/c_pos' has 3 columns, not 4",
    ),
    "d3il: a list": (
        "d3il",
        lambda path: (path / "env_0000_00.pkl").write_bytes(pickle.dumps([1, 2])),
        [],
        "has no 'robot/des_c_pos': there is no dict",
    ),
    "lerobot: no folder": (
        "lerobot",
        lambda p: (p / "meta/info.json").unlink(),
        [],
        "no meta/info.json; give a LeRobot",
    ),
    "lerobot: old": (
        "lerobot",
        lambda path: edit_info(path, codebase_version="v2.1"),
        [],
        "it is of version v2.1, not 3",
    ),
    "lerobot: no JSON": ("lerobot", lambda p: write(p / "meta/info.json", b"{"), [], "meta/info.json is damaged"),
    "lerobot: no features": ("lerobot", lambda path: edit_info(path, features=3), [], "meta/info.json is damaged"),
    "lerobot: no such camera": ("lerobot", lambda path: None, ["cameras=[top]"], "it has no feature 'top'; there are"),
    "lerobot: steps missing": (
        "lerobot",
        lambda path: (path / "data/chunk-000/file-001.parquet").unlink(),
        [],
        "it says that it has 76 steps, and has 40",
    ),
    "lerobot: cut table": (
        "lerobot",
        lambda path: cut(path / "data/chunk-000/file-000.parquet"),
        [],
        "file-000.parquet is damaged",
    ),
    "lerobot: no column": (
        "lerobot",
        lambda path: write_table(path / "data/chunk-000/file-000.parquet", [{"action": [1.0]}]),
        [],
        "file-000.parquet has no column 'episode_index'",
    ),
    "lerobot: widths": (
        "lerobot",
        lambda path: write_table(
            path / "data/chunk-000/file-000.parquet",
            [
                {
                    "action": [1.0],
                    "observation.state": [1.0],
                    "episode_index": 0,
                    "frame_index": 0,
                    "next.done": True,
                    "next.reward": 0.0,
                }
            ],
        ),
        [],
        "does not hold [23] numbers in every row",
    ),
    "lerobot: no video": ("lerobot", lambda path: (path / VIDEO).unlink(), [TOP], "file-000.mp4 is missing"),
    "lerobot: cut video": ("lerobot", lambda path: cut(path / VIDEO), [TOP], "file-000.mp4 is damaged or cut off"),
    "lerobot: no video at all": (
        "lerobot",
        lambda p: write(p / VIDEO, b"text"),
        [TOP],
        "file-000.mp4 is damaged or cut off",
    ),
    "lerobot: no places": (
        "lerobot",
        lambda p: (p / EPISODES).unlink(),
        [TOP],
        "does not say where the video of episode 0",
    ),
    "reference: text": ("reference", lambda path: path.write_bytes(b"text"), [], "it is no npz file, or cut off"),
    "reference: lacking": ("reference", lacking, [], "key 'actions' is missing; found states"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_bad_input_gets_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage, arguments, message = FAULTS[case]
    source = tmp_path / "data"
    if name in MAKERS:
        MAKERS[name](source)
    damage(source)
    assert main([name, f"source={source}", f"out={tmp_path / 'out'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("d4rl", "h5py", "data"), ("lerobot", "pyarrow.parquet", "data"), ("lerobot", "imageio_ffmpeg", "video")],
)
def test_a_missing_extra_names_the_command(
    name: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    MAKERS[name](tmp_path / "data")
    monkeypatch.setitem(sys.modules, module, None)
    cameras = [TOP] if name == "lerobot" else []
    assert main([name, f"source={tmp_path / 'data'}", f"out={tmp_path / 'out'}", *cameras]) == 2
    assert f"this format needs {module}: pip install 'dppo-fast[{extra}]'" in capsys.readouterr().err


def test_an_unwritable_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    d4rl(tmp_path / "data")
    (tmp_path / "out").write_text("a file")
    assert main(["d4rl", f"source={tmp_path / 'data'}", f"out={tmp_path / 'out'}"]) == 2
    assert "out is not writable (File exists); choose another folder" in capsys.readouterr().err


def test_actions_outside_the_bounds_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(file: Any) -> None:
        file["actions"][3:5, 1] = 1.5

    d4rl(tmp_path / "data")
    altered(tmp_path / "data", change)
    assert main(["d4rl", f"source={tmp_path / 'data'}", f"out={tmp_path / 'out'}"]) == 0
    assert (
        "actions leave the environment's bounds in 2 of 76 steps, by up to 0.5, in dims [1]" in capsys.readouterr().out
    )
    assert np.abs(Trajectories.load(tmp_path / "out/train.npz").actions).max() <= 1


class Generated(Conversion):
    """Blocks out of nowhere."""

    blocks: Callable[[], Any]
    count: int

    def open(self) -> Any:
        return nullcontext(Stream(self.count, self.blocks()))


def generated(out: Path, count: int, blocks: Callable[[], Any]) -> Generated:
    conversion = Generated("nowhere", str(out))
    conversion.count, conversion.blocks = count, blocks
    return conversion


def block(images: int | None = None) -> Block:
    pictures = None if images is None else np.full((16, 3, images, images), 7, np.uint8)
    return Block(np.ones((16, 2)), np.arange(32.0).reshape(16, 2), images=pictures)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_an_interrupted_conversion_leaves_the_old_files(error: BaseException, tmp_path: Path) -> None:
    def interrupted() -> Any:
        yield block(4)
        raise error

    run_conversion(generated(tmp_path, 16, lambda: iter([block(4)])))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert {file.name for file in before} == {"train.npz", "normalization.npz"}
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        run_conversion(generated(tmp_path, 32, interrupted))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert [file.name[:11] for file in (tmp_path / "out").iterdir()] == [".train.npz."]
        raise KeyboardInterrupt

    robomimic(tmp_path / "data")
    monkeypatch.setattr("dppo_fast.data.convert.robomimic.stacked", interrupted)
    arguments = [f"source={tmp_path / 'data'}", f"out={tmp_path / 'out'}", "cameras=[agentview]"]
    assert main(["robomimic", *arguments]) == INTERRUPTED
    assert list((tmp_path / "out").iterdir()) == []


def test_images_are_never_in_memory_at_once(tmp_path: Path) -> None:
    """150 MB of them."""
    tracemalloc.start()
    try:
        run_conversion(generated(tmp_path, 800, lambda: (block(256) for _ in range(50))))
        images = Trajectories.load(tmp_path / "train.npz").images
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "train.npz").stat().st_size > 150e6
    assert peak < 40e6
    assert images is not None
    assert images.shape == (800, 3, 256, 256)
    assert (images[::100] == 7).all()
    (tmp_path / "train.npz").unlink()
