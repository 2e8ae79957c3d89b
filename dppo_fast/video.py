"""Films chosen envs, without a screen: one mp4 a whole episode.

`Filmed` is a `VecEnv` around another, so whatever drives envs (a collector, an evaluator) films without knowing it:

    Evaluator(lambda: Filmed(make_env(...), envs=range(8), folder=run / "videos", label=lambda: "evaluation"), ...)
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dppo_fast.types import Obs, Step, UserError, VecEnv

Picture = NDArray[np.uint8]
"""[H, W, 3]"""


class Drawable(VecEnv, Protocol):
    """A `VecEnv` that can be filmed. A frame is a chunk, or, where it has an attribute ``observer``, an env step: it
    calls ``observer(ids)`` whenever the envs ``ids`` have made one.
    """

    def render(self, env: int) -> Picture:
        """How one env looks now."""
        ...


class Filmed:
    """``env``, of whose envs numbered ``envs`` whole episodes go to ``folder/<label>_env<number>.mp4``.

    An env is filmed once for every ``label()``, from the start of its next episode; None films nothing. `close` keeps
    what there is of episodes that still run. It steps all envs at once, as OpenGL draws in one thread only. Raises
    UserError where the environment cannot be drawn here.
    """

    groups = ()

    def __init__(
        self, env: VecEnv, envs: Iterable[int], folder: Path, label: Callable[[], str | None], fps: int = 20
    ) -> None:
        self.num_envs, self.act_steps, self.action_dim = env.num_envs, env.act_steps, env.action_dim
        self.obs_shapes, self.max_episode_steps = env.obs_shapes, env.max_episode_steps
        self._env, self._folder, self._label, self._fps = env, folder, label, fps
        self._films: dict[int, Film | None] = dict.fromkeys(envs)
        self._labels: dict[int, str] = {}  # of each env's last film
        if beyond := [i for i in self._films if not 0 <= i < env.num_envs]:
            raise UserError(f"render: there is no env {beyond[0]}; there are 0 to {env.num_envs - 1}")
        if not hasattr(env, "render"):
            raise UserError("render: this environment cannot be drawn")
        if hasattr(env, "observer"):
            env.observer = self._capture

    def __getattr__(self, name: str) -> Any:
        """All else is the env's own."""
        return getattr(self._env, name)

    def reset(self, seed: int | None = None) -> Obs:
        obs = self._env.reset(seed)
        for i in self._films:
            self._start(i)
        return obs

    def step(self, action: Tensor) -> Step:
        step = self._env.step(action)
        over = (step.terminated | step.truncated).cpu().numpy()
        if not hasattr(self._env, "observer"):
            self._capture(np.flatnonzero(~over))
        for i in self._films:
            if over[i]:
                self._start(i)
        return step

    def state_dict(self) -> dict[str, Any]:
        return self._env.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        return self._env.load_state_dict(state)

    def close(self) -> None:
        for film in self._films.values():
            if film is not None:
                film.close()
        self._env.close()

    def _start(self, i: int) -> None:
        """An episode of env i begins."""
        if (film := self._films[i]) is not None:
            film.close()
        self._films[i], label = None, self._label()
        if label is not None and label != self._labels.get(i):
            self._labels[i] = label
            self._films[i] = Film(self._folder / f"{label}_env{i}.mp4", self._fps)
            self._capture(np.array([i]))

    def _capture(self, ids: NDArray[np.int64]) -> None:
        for i in ids.tolist():
            if (film := self._films.get(i)) is not None:
                film.add(cast(Drawable, self._env).render(i))


class Film:
    """An mp4 file that appears when it is closed. Raises UserError where imageio-ffmpeg is not installed."""

    def __init__(self, path: Path, fps: int) -> None:
        self.path, self._fps = path, fps
        self._part = path.with_name(f".{path.name}")
        self._writer: Generator[None, Picture, None] | None = None

    def add(self, picture: Picture) -> None:
        """One more frame; all have the first one's size."""
        if self._writer is None:
            self._writer = self._open(picture.shape)
            next(self._writer)
        self._writer.send(np.ascontiguousarray(picture))

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            os.replace(self._part, self.path)

    def _open(self, shape: tuple[int, ...]) -> Generator[None, Picture, None]:
        try:
            from imageio_ffmpeg import write_frames
        except ImportError as error:
            raise UserError(f"render: videos need imageio-ffmpeg ({error}): pip install 'dppo-fast[video]'") from error
        atexit.register(self.close)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        height, width = shape[:2]
        writer = write_frames(
            str(self._part), (width, height), fps=self._fps, macro_block_size=2, ffmpeg_log_level="error"
        )
        return cast("Generator[None, Picture, None]", writer)
