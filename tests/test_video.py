"""Videos of chosen envs, read back frame by frame."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imageio_ffmpeg import read_frames

from dppo_fast.envs import EnvConfig, make_env
from dppo_fast.runtime import gl
from dppo_fast.types import Step, UserError
from dppo_fast.video import Film, Filmed
from tests.envs.toy import ToySimulator, chunk_env, random_actions

SIZE = 64


class Drawn(ToySimulator):
    """The picture of an env shows in its brightness how many steps its episode is old."""

    def render(self, env: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.full((SIZE, SIZE, 3), 10 * self.state[env, 1], np.uint8)


def ages(path: Path) -> list[int]:
    """What `Drawn` drew."""
    frames = read_frames(str(path))
    size = next(frames)["size"]
    assert size == (SIZE, SIZE)
    return [round(np.frombuffer(frame, np.uint8).mean() / 10) for frame in frames]


def test_whole_episodes_step_by_step(tmp_path: Path) -> None:
    """Env 1's first episode ends after 6 steps, inside the second chunk of 4, its second after 3."""
    labels = iter(["first", "first", None, "second"])
    env = Filmed(chunk_env(Drawn(3, done_at={0: [6], 1: [3], 2: [2]})), [1], tmp_path / "videos", lambda: next(labels))
    env.reset()
    actions = random_actions(env, 5)
    env.step(actions[0])
    assert not list(tmp_path.rglob("[!.]*.mp4"))
    env.step(actions[1])
    assert ages(tmp_path / "videos/first_env1.mp4") == [0, 1, 2, 3, 4, 5, 6]
    env.step(actions[2])  # the second episode ends: its label was that of the film before
    env.step(actions[3])  # the third ends, which had none
    env.step(actions[4])
    env.close()
    assert ages(tmp_path / "videos/second_env1.mp4") == [0, 1, 2, 3, 4]
    assert len(ages(tmp_path / "videos/first_env1.mp4")) == 7
    assert len(list(tmp_path.rglob("*.mp4"))) == 2


def test_filming_changes_nothing(tmp_path: Path) -> None:
    plain = chunk_env(ToySimulator(2, done_at={0: [5]}))
    filmed = Filmed(chunk_env(Drawn(2, done_at={0: [5]}), groups=2), [0, 1], tmp_path, lambda: "label")
    assert torch.equal(plain.reset()["state"], filmed.reset()["state"])
    for action in random_actions(plain, 3):
        a, b = plain.step(action), filmed.step(action)
        assert torch.equal(a.obs["state"], b.obs["state"])
        assert torch.equal(a.reward, b.reward)
    assert filmed.nan_count == 0
    assert not filmed.groups  # nothing draws in another thread
    restored = chunk_env(ToySimulator(2, done_at={0: [5]}))
    assert torch.equal(restored.load_state_dict(filmed.state_dict())["state"], b.obs["state"])


class DeviceEnv:
    """A `VecEnv` without single steps: its frames are chunks."""

    num_envs, act_steps, action_dim, max_episode_steps, obs_shapes = 1, 4, 2, 100, {"state": (1, 1)}

    def reset(self, seed: int | None = None) -> Any:
        self.age = 0
        return {"state": torch.zeros(1, 1, 1)}

    def step(self, action: torch.Tensor) -> Step:
        self.age = (self.age + 1) % 3
        over = torch.tensor([self.age == 0])
        return Step({"state": torch.zeros(1, 1, 1)}, None, torch.zeros(1), over, torch.tensor([False]))

    def render(self, env: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.full((SIZE, SIZE, 3), 10 * self.age, np.uint8)

    def close(self) -> None: ...


def test_an_env_that_steps_in_chunks_is_filmed_by_the_chunk(tmp_path: Path) -> None:
    device: Any = DeviceEnv()
    env = Filmed(device, [0], tmp_path, lambda: "chunks")
    env.reset()
    for _ in range(3):
        env.step(torch.zeros(1, 4, 2))
    assert ages(tmp_path / "chunks_env0.mp4") == [0, 1, 2]


def test_what_cannot_be_filmed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no env 3; there are 0 to 2"):
        Filmed(chunk_env(Drawn(3)), [1, 3], tmp_path, lambda: "a")
    with pytest.raises(UserError, match="ToySimulator cannot be drawn"):
        Filmed(chunk_env(ToySimulator(1)), [0], tmp_path, lambda: "a").reset()
    without: Any = DeviceEnv()
    monkeypatch.delattr(DeviceEnv, "render")
    with pytest.raises(UserError, match="cannot be drawn"):
        Filmed(without, [0], tmp_path, lambda: "a")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"pip install 'dppo-fast\[video\]'"):
        Film(tmp_path / "a.mp4", 20).add(np.zeros((SIZE, SIZE, 3), np.uint8))


@pytest.mark.parametrize(("backend", "kinds"), [("gymnasium", {"egl", "osmesa"}), ("envpool", {"egl"})])
def test_real_pictures_change_as_the_body_moves(backend: str, kinds: set[str]) -> None:
    if gl.headless_gl() not in kinds:
        pytest.skip(f"has none of {kinds}")
    env: Any = make_env(EnvConfig("Hopper-v4", 2, 8, backend=backend, num_threads=1), "cpu", 0)
    env.reset()
    before = env.render(1)
    env.step(random_actions(env, 1)[0])
    after = env.render(1)
    env.close()
    assert before.dtype == np.uint8
    assert before.ndim == 3
    assert before.shape[2] == 3
    assert before.std() > 5
    assert (before != after).mean() > 0.001


def test_a_package_that_only_pictures_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)
    env: Any = make_env(EnvConfig("Pendulum-v1", 1, 1, backend="gymnasium"), "cpu", 0)
    env.reset()
    with pytest.raises(UserError, match=r"Pendulum-v1: pygame is not installed, .*gymnasium\[classic_control\]"):
        env.render(0)


def test_without_opengl_one_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl, "DRAW", "raise SystemExit(1)")
    gl.headless_gl.cache_clear()
    env: Any = make_env(EnvConfig("Hopper-v4", 1, 1, backend="gymnasium"), "cpu", 0)
    env.reset()
    with pytest.raises(UserError, match=r"Hopper-v4 cannot be drawn.*neither EGL nor OSMesa; install EGL .*libegl1"):
        env.render(0)
    gl.headless_gl.cache_clear()


def test_osmesa_is_the_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl, "DRAW", "import os; assert os.environ['MUJOCO_GL'] == 'osmesa'")
    gl.headless_gl.cache_clear()
    assert gl.headless_gl() == "osmesa"
    assert os.environ["MUJOCO_GL"] == "osmesa"
    with pytest.raises(
        UserError, match=r"Hopper cannot be drawn.*: found only osmesa; install EGL \(Debian: [^()]*\)$"
    ):
        gl.require_gl("Hopper", "egl")
    gl.headless_gl.cache_clear()


def test_triton_comes_before_opengl() -> None:
    """In a process of its own: the other way round a clash of their LLVMs crashes it."""
    pytest.importorskip("triton")
    code = "import sys; from dppo_fast.runtime.gl import headless_gl; headless_gl(); print('triton' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == "True", found.stderr
