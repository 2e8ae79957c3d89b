"""Minari: one HDF5 group per episode, and a description beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dppo_fast.data.convert.hdf5 import child, length, opened, rows
from dppo_fast.data.convert.images import decoded, require_images, require_size, spans, stacked
from dppo_fast.data.convert.stream import Block, Conversion, Stream
from dppo_fast.types import UserError


@dataclass
class Minari(Conversion):
    usage: ClassVar[str] = """A dataset as Minari keeps it: ~/.minari/datasets/<name>, which has data/main_data.hdf5.

An observation that is a dict is chosen from by low_dim_keys=[observation, desired_goal], side by side, by default all
that are vectors; inner keys are written a/b. cameras=[pixels] takes images, raw or JPEG, several become channels of
one, scaled to image_size=[H, W]."""

    low_dim_keys: list[str] | None = None
    cameras: list[str] | None = None
    image_size: list[int] | None = None

    @contextmanager
    def open(self) -> Iterator[Stream]:
        require_size(self.image_size)
        source = Path(self.source)
        folder = source.parent if source.is_file() else source / "data" if (source / "data").is_dir() else source
        if any(folder.glob("[0-9]*/*.parquet")) or any(folder.glob("[0-9]*/*.arrow")):
            raise UserError(f"{folder} is in Minari's arrow format; only its hdf5 format is read")
        with opened(folder / "main_data.hdf5") as file:
            names = sorted((name for name in file if name.startswith("episode_")), key=lambda name: (len(name), name))
            episodes = [child(file, name) for name in names]
            if not episodes:
                raise UserError("main_data.hdf5 holds no episodes")
            steps = sum(length(episode, "actions") for episode in episodes)
            yield Stream(steps, self._blocks(episodes), *_bounds(folder / "metadata.json"))

    def _blocks(self, episodes: Sequence[Any]) -> Iterator[Block]:
        keys = self.low_dim_keys or _vectors(child(episodes[0], "observations"))
        for episode in episodes:
            steps = length(episode, "actions")
            for first, last in spans(steps, bool(self.cameras)):
                images = [_frames(child(episode, "observations"), key, first, last) for key in self.cameras or ()]
                yield Block(
                    states=np.concatenate([_flat(episode, f"observations/{key}", first, last) for key in keys], -1),
                    actions=_flat(episode, "actions", first, last),
                    rewards=rows(episode, "rewards", first, last, dims=1),
                    terminals=rows(episode, "terminations", first, last, dims=1).astype(bool),
                    images=stacked(images, self.image_size),
                    starts=first == 0,
                )


def _vectors(observations: Any) -> list[str]:
    """Keys of all observations that are vectors; the empty key where the observation is one."""
    if hasattr(observations, "dtype"):
        return ["."]
    found: list[str] = []
    observations.visititems(lambda key, item: found.append(key) if getattr(item, "ndim", 0) == 2 else None)
    vectors = [key for key in found if observations[key].dtype.kind == "f"]
    if not vectors:
        raise UserError(f"observations hold no vectors, but {', '.join(observations)}; choose low_dim_keys")
    return vectors


def _flat(episode: Any, key: str, first: int, last: int) -> NDArray[Any]:
    """Rows as vectors: a number is a vector of one."""
    table = rows(episode, key.removesuffix("/."), first, last)
    if table.dtype.kind not in "biuf":
        raise UserError(f"{episode.name}/{key} is {table.dtype}; numbers are needed")
    return table.reshape(last - first, -1)


def _frames(observations: Any, key: str, first: int, last: int) -> NDArray[Any]:
    """uint8 [L, H, W, C], decoded where they are JPEG."""
    table = rows(observations, key, first, last)
    if table.ndim == 4:
        return require_images(key, table)
    return decoded(f"{observations.name}/{key}", (row.tobytes() for row in table))


def _bounds(metadata: Path) -> tuple[Any, Any]:
    """The action space's, where it is described."""
    if not metadata.is_file():
        return None, None
    try:
        space = json.loads(json.loads(metadata.read_bytes()).get("action_space", "{}"))
        return space.get("low"), space.get("high")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{metadata.name} is damaged ({error})") from error
