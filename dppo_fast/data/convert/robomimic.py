"""robomimic: one HDF5 group per demonstration (Mandlekar et al. 2021, arXiv 2108.03298)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dppo_fast.data.convert.hdf5 import child, joined, length, opened, rows
from dppo_fast.data.convert.images import require_images, require_size, spans, stacked
from dppo_fast.data.convert.stream import Block, Conversion, Stream
from dppo_fast.types import UserError

ARM = ("eef_pos", "eef_quat", "gripper_qpos")


@dataclass
class Robomimic(Conversion):
    usage: ClassVar[str] = """robomimic's hdf5: data/demo_<i> with actions, rewards, dones and obs/<key>.

The state is low_dim_keys side by side; by default position, orientation and gripper of every arm and, without cameras,
the object. cameras=[agentview] takes obs/agentview_image, several cameras become channels of one image, scaled to
image_size=[H, W]. mask=train takes the demonstrations that mask/train lists. A step is terminal where it is done and
rewarded: an end without success is a time limit."""

    low_dim_keys: list[str] | None = None
    cameras: list[str] | None = None
    image_size: list[int] | None = None
    mask: str | None = None

    @contextmanager
    def open(self) -> Iterator[Stream]:
        require_size(self.image_size)
        with opened(Path(self.source)) as file:
            demos = self._demos(file)
            obs = self._obs(demos[0])
            robots = sorted(key.removesuffix("_eef_pos") for key in obs if re.fullmatch(r"robot\d_eef_pos", key))
            keys = [f"{robot}_{part}" for robot in robots for part in ARM] + ([] if self.cameras else ["object"])
            steps = sum(length(demo, "actions") for demo in demos)
            yield Stream(steps, self._blocks(demos, self.low_dim_keys or keys), -1, 1)

    def _demos(self, file: Any) -> list[Any]:
        data = child(file, "data")
        names: Sequence[str] = list(data)
        if self.mask is not None:
            names = [name.decode() for name in rows(child(file, "mask"), self.mask).tolist()]
        if not names:
            raise UserError(f"{data.name} holds no demonstrations")
        return [child(data, name) for name in sorted(names, key=lambda name: (len(name), name))]

    def _obs(self, demo: Any) -> Any:
        if "obs" not in demo and "states" in demo:
            raise UserError(
                f"{demo.name} holds states of the simulator and no obs; robomimic's dataset_states_to_obs.py makes them"
            )
        return child(demo, "obs")

    def _blocks(self, demos: Sequence[Any], keys: Sequence[str]) -> Iterator[Block]:
        for demo in demos:
            obs, steps = self._obs(demo), length(demo, "actions")
            for first, last in spans(steps, bool(self.cameras)):
                rewards = rows(demo, "rewards", first, last, dims=1) if "rewards" in demo else None
                done = rows(demo, "dones", first, last, dims=1) if "dones" in demo else None
                images = [
                    require_images(camera, rows(obs, f"{camera}_image", first, last)) for camera in self.cameras or ()
                ]
                yield Block(
                    states=joined(obs, keys, first, last),
                    actions=rows(demo, "actions", first, last, dims=2),
                    rewards=rewards,
                    terminals=None if rewards is None or done is None else (done != 0) & (rewards > 0),
                    images=stacked(images, self.image_size),
                    starts=first == 0,
                )
