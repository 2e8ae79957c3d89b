"""LeRobot datasets, version 3: Parquet tables and MP4 videos, each with many episodes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dppo_fast.data.convert.images import BLOCK, Array, decoded, require_size, stacked
from dppo_fast.data.convert.stream import Block, Conversion, Stream, require
from dppo_fast.types import UserError


@dataclass
class LeRobot(Conversion):
    usage: ClassVar[str] = """A LeRobot dataset's folder, version 3, with meta/info.json, data/ and videos/.

The state is low_dim_keys side by side. cameras=[observation.images.top] takes images or videos, several become channels
of one image, scaled to image_size=[H, W]. Rewards are next.reward, terminal steps those of next.success, else
next.done, where the data has them."""

    low_dim_keys: list[str] = field(default_factory=lambda: ["observation.state"])
    action_key: str = "action"
    cameras: list[str] = field(default_factory=list)
    image_size: list[int] | None = None

    @contextmanager
    def open(self) -> Iterator[Stream]:
        require_size(self.image_size)
        root = Path(self.source)
        try:
            info = json.loads((root / "meta/info.json").read_bytes())
            version, steps, fps = str(info["codebase_version"]), int(info["total_frames"]), float(info["fps"])
            widths = {key: math.prod(feature["shape"]) for key, feature in info["features"].items()}
            videos = [key for key in self.cameras if info["features"].get(key, {}).get("dtype") == "video"]
        except FileNotFoundError as error:
            raise UserError("no meta/info.json; give a LeRobot dataset's folder") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"meta/info.json is damaged or incomplete ({error!r})") from error
        if not version.startswith("v3."):
            raise UserError(f"it is of version {version}, not 3: lerobot's convert_dataset_v21_to_v30 converts it")
        for key in [*self.low_dim_keys, self.action_key, *self.cameras]:
            if key not in widths:
                raise UserError(f"it has no feature {key!r}; there are {', '.join(widths)}")
        with ExitStack() as stack:
            cameras: dict[str, Video | None] = {
                key: stack.enter_context(Video(root, key, fps, self.image_size)) if key in videos else None
                for key in self.cameras
            }
            yield Stream(steps, self._blocks(root, widths, cameras))

    def _blocks(self, root: Path, widths: Mapping[str, int], cameras: Mapping[str, Video | None]) -> Iterator[Block]:
        ending = [key for key in ("next.success", "next.done") if key in widths][:1]
        keys = [*self.low_dim_keys, self.action_key, *ending, *({"next.reward"} & widths.keys())]
        pictures = [key for key, video in cameras.items() if video is None]
        size = BLOCK if cameras else 2**16
        previous = None
        for table in _tables(root, [*keys, *pictures, "episode_index", "frame_index"], size):
            columns = {key: _numbers(table, key, widths[key]) for key in keys}
            episodes, frames = (_numbers(table, key)[:, 0].astype(int) for key in ("episode_index", "frame_index"))
            cuts = [0, *(np.flatnonzero(np.diff(episodes)) + 1).tolist(), len(episodes)]
            for first, last in pairwise(cuts):
                rows, episode = slice(first, last), int(episodes[first])
                images = [
                    _pictures(table, key, rows) if video is None else video.frames(episode, frames[first], last - first)
                    for key, video in cameras.items()
                ]
                yield Block(
                    states=np.concatenate([columns[key][rows] for key in self.low_dim_keys], -1),
                    actions=columns[self.action_key][rows],
                    rewards=columns["next.reward"][rows, 0] if "next.reward" in columns else None,
                    terminals=columns[ending[0]][rows, 0].astype(bool) if ending else None,
                    images=stacked(images, self.image_size),
                    starts=episode != previous,
                )
                previous = episode


class Video:
    """A camera's frames, decoded by ffmpeg from one file after the other and scaled to ``size`` (H, W)."""

    def __init__(self, root: Path, key: str, fps: float, size: Sequence[int] | None) -> None:
        self._ffmpeg = require("imageio_ffmpeg", "video")
        self._places = _places(root, key)
        self._fps = fps
        scale = ["-vf", f"scale={size[1]}:{size[0]}:flags=area"] if size else []
        self._options = [*scale, "-fps_mode", "passthrough"]
        self._path: Path | None = None
        self._decoder: Any = None
        self._next = 0
        self._shape = (0, 0, 3)

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def frames(self, episode: int, first: int, count: int) -> Array:
        """uint8 [count, H, W, 3] from frame ``first`` of ``episode`` on. Raises UserError where there are none."""
        if episode not in self._places:
            raise UserError(f"meta/episodes does not say where the video of episode {episode} is")
        path, seconds = self._places[episode]
        first += round(seconds * self._fps)
        if not path.is_file():
            raise UserError(f"{path} is missing")
        try:
            if path != self._path or first < self._next:
                self._open(path)
            for _ in range(first - self._next):
                next(self._decoder)
            found = [np.frombuffer(next(self._decoder), np.uint8).reshape(self._shape) for _ in range(count)]
        except (StopIteration, OSError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [f"it ends before frame {first + count - 1}"])[-1]
            raise UserError(f"{path} is damaged or cut off: {reason}") from error
        self._next = first + count
        return np.stack(found)

    def _open(self, path: Path) -> None:
        self.__exit__()
        self._decoder = self._ffmpeg.read_frames(str(path), output_params=self._options)
        width, height = next(self._decoder)["size"]
        self._path, self._next, self._shape = path, 0, (height, width, 3)


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """A Parquet file."""
    parquet, arrow = require("pyarrow.parquet"), require("pyarrow")
    try:
        with parquet.ParquetFile(file) as table:
            yield table
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{file} is damaged ({error})") from error


def _require_columns(table: Any, file: Path, columns: Sequence[str]) -> None:
    if missing := set(columns) - set(table.schema_arrow.names):
        raise UserError(f"{file} has no column {min(missing)!r}")


def _tables(root: Path, columns: Sequence[str], size: int) -> Iterator[Any]:
    """The data's rows in their order, ``size`` or fewer at a time."""
    files = sorted((root / "data").glob("chunk-*/file-*.parquet"))
    if not files:
        raise UserError("no data/chunk-*/file-*.parquet")
    for file in files:
        with _reading(file) as table:
            _require_columns(table, file, columns)
            yield from table.iter_batches(size, columns=list(columns))


def _places(root: Path, camera: str) -> dict[int, tuple[Path, float]]:
    """Episode -> its video file, and the second at which it starts there."""
    columns = [f"videos/{camera}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    places = {}
    for file in sorted((root / "meta/episodes").glob("chunk-*/file-*.parquet")):
        with _reading(file) as table:
            _require_columns(table, file, ["episode_index", *columns])
            rows = table.read(columns=["episode_index", *columns]).to_pylist()
        for row in rows:
            chunk, number, seconds = (row[column] for column in columns)
            path = root / f"videos/{camera}/chunk-{chunk:03d}/file-{number:03d}.mp4"
            places[row["episode_index"]] = path, seconds
    return places


def _numbers(table: Any, key: str, width: int = 1) -> Array:
    """A column of numbers or of lists of them, [rows, width]."""
    column = table.column(key)
    values = column.flatten() if hasattr(column.type, "value_type") else column
    array = np.asarray(values.to_numpy(zero_copy_only=False))
    if array.dtype.kind not in "biuf" or len(array) != len(table) * width:
        raise UserError(f"column {key!r} does not hold {width} numbers in every row")
    return array.reshape(len(table), width)


def _pictures(table: Any, key: str, rows: slice) -> Array:
    """A column of image files, uint8 [rows, H, W, 3]."""
    found = table.column(key)[rows].to_pylist()
    if not all(isinstance(row, dict) and row.get("bytes") for row in found):
        raise UserError(f"column {key!r} holds paths, and no images")
    return decoded(f"column {key!r}", (row["bytes"] for row in found))
