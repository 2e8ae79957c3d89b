"""Frames of cameras as training wants them: a few at a time, [L, C, H, W], of one size."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dppo_fast.types import UserError

Array = NDArray[Any]

BLOCK = 64
"""Steps with images that are in memory at once."""


def spans(length: int, with_images: bool = True) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) steps of a trajectory's blocks; without images it is one block."""
    size = BLOCK if with_images else max(length, 1)
    for first in range(0, length, size):
        yield first, min(first + size, length)


def stacked(cameras: Sequence[Array], size: Sequence[int] | None) -> Array | None:
    """Frames of every camera, uint8 [L, H, W, C], as [L, C, H, W] with the channels one camera after the other, scaled
    to ``size`` (H, W); None without cameras.
    """
    if not cameras:
        return None
    if size is not None:
        cameras = [_resized(frames, size) for frames in cameras]
    if len(sizes := {frames.shape[1:3] for frames in cameras}) > 1:
        raise UserError(f"cameras have images of different sizes: {sorted(sizes)}; set image_size=[H, W]")
    return np.concatenate(cameras, -1).transpose(0, 3, 1, 2)


def require_size(size: Sequence[int] | None) -> None:
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f"image_size={list(size)}: give [height, width] in pixels")


def require_images(key: str, frames: Array) -> Array:
    """``frames``, if they are uint8 [L, H, W, C]."""
    if frames.ndim != 4 or frames.dtype != np.uint8:
        raise UserError(f"{key} is {frames.dtype} of shape {list(frames.shape)}; images must be uint8 [L, H, W, C]")
    return frames


def _resized(frames: Array, size: Sequence[int]) -> Array:
    from PIL import Image

    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    scaled = [
        np.stack([np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BOX)) for plane in planes])
        for planes in frames.transpose(0, 3, 1, 2)
    ]  # channel by channel, so that any number of them will do
    return np.stack(scaled).transpose(0, 2, 3, 1)


def decoded(key: str, files: Iterable[bytes]) -> Array:
    """PNG or JPEG files as uint8 [L, H, W, 3]."""
    from PIL import Image

    try:
        return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    except (OSError, ValueError) as error:
        raise UserError(f"{key} is damaged, or holds no images of one size ({error})") from error
