"""Action chunks, observation history, time limits and NaN handling around any `Simulator`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dppo_fast.envs.normalize import Normalization
from dppo_fast.envs.replay import EpisodeLog
from dppo_fast.envs.simulator import Array, Drawing, Ids, Simulator
from dppo_fast.types import Obs, ObsShapes, Step, UserError

logger = logging.getLogger(__name__)

RESET_ATTEMPTS = 5


class ChunkEnv:
    """The `VecEnv` of a simulator.

    A chunk is executed step by step in the envs whose episode still runs; those that ended are reset after it, never
    inside. At an episode's start the history is its first observation, repeated. All tensors returned are the caller's.

    A NaN or Inf from the simulator ends the episode at the last finite observation: ``Step.valid`` is False there and
    the reward 0. ``nan_count`` counts these events, those at a reset included.

    ``groups`` are slices of the envs. What `start` begins in one goes on in the background, one group at a time, until
    `finish`; the results are those of `step`.
    """

    def __init__(
        self,
        simulator: Simulator,
        normalization: Normalization,
        *,
        act_steps: int,
        obs_steps: int,
        max_episode_steps: int,
        device: torch.device | str,
        seed: int,
        training: bool = True,
        time_limit_terminates: bool = False,
        image_steps: int | None = None,
        groups: int = 1,
    ) -> None:
        """``seed`` serves a first `reset` without one; ``training``: a running normalization learns here.

        An observation is the state of the last ``obs_steps`` steps and the images of the last ``image_steps``, or of as
        many.
        With ``time_limit_terminates`` an episode that reaches its time limit counts as terminated.
        """
        self.num_envs = simulator.num_envs
        self.obs_shapes: ObsShapes = {
            name: (obs_steps if name == "state" or image_steps is None else image_steps, *shape)
            for name, shape in simulator.obs_shapes.items()
        }
        self.action_dim = len(simulator.action_low)
        self.act_steps = act_steps
        self.max_episode_steps = max_episode_steps
        self.normalization = normalization
        self.nan_count, self.restarted = 0, False
        self.observer: Callable[[Ids], object] | None = None  # told of every simulator step which envs made it
        self._simulator = simulator
        self._seed = seed
        self._training = training
        self._time_limit_terminates = time_limit_terminates
        self._log = EpisodeLog(self.num_envs)
        self._elapsed = np.zeros(self.num_envs, np.int64)  # steps of the running episodes
        self._history: dict[str, Array] = {
            name: np.zeros((self.num_envs, *shape), np.float64 if name == "state" else np.uint8)
            for name, shape in self.obs_shapes.items()
        }
        parts = np.array_split(np.arange(self.num_envs), groups)
        self.groups = [slice(int(ids[0]), int(ids[-1]) + 1) for ids in parts]
        self._all = _Rows(np.arange(self.num_envs), self.obs_shapes, device)
        self._parts = [_Rows(ids, self.obs_shapes, device) for ids in parts] if groups > 1 else [self._all]
        self._background = ThreadPoolExecutor(1)
        self._pending: dict[int, Future[_Outcome]] = {}

    @property
    def worker_deaths(self) -> int:
        """How many of the simulator's processes died and were started anew."""
        return int(getattr(self._simulator, "worker_deaths", 0))

    @property
    def raw_obs(self) -> dict[str, Array]:
        """The current observations with their history, in the simulator's units."""
        return {name: value.copy() for name, value in self._history.items()}

    def reset(self, seed: int | None = None) -> Obs:
        """Start a new episode everywhere; with a seed, all randomness from here on follows from it."""
        if seed is not None or not self._started:
            self._seed = self._seed if seed is None else seed
            self._log = EpisodeLog(self.num_envs)
            self._simulator.seed(self._seed, self._log.resets)
        self._begin_episodes(np.arange(self.num_envs))
        self._learn()
        return self._send_obs(self._all, self._history)

    def step(self, action: Tensor) -> Step:
        """Execute ``action`` [N, act_steps, Da], normalised to [-1, 1].

        Raises ValueError where the shape differs, FloatingPointError where an action is not finite.
        """
        return self._deliver(self._all, self._advance(self._raw_actions(action, self._all), self._all.ids))

    def start(self, action: Tensor, group: int) -> None:
        """Begin to execute ``action`` [n, act_steps, Da] in one of the ``groups``. Raises as `step`."""
        rows = self._parts[group]
        self._pending[group] = self._background.submit(self._advance, self._raw_actions(action, rows), rows.ids)

    def finish(self, group: int) -> Step:
        """What came of the chunk that was started in ``group``."""
        return self._deliver(self._parts[group], self._pending.pop(group).result())

    def _advance(self, actions: NDArray[np.float64], ids: Ids) -> _Outcome:
        """Execute ``actions`` [N, Ta, Da] in the envs ``ids``, and start new episodes where that ended theirs."""
        reward = np.zeros(self.num_envs)
        terminated, truncated, valid = (np.full(self.num_envs, value) for value in (False, False, True))
        live = ids
        for t in range(self.act_steps):
            obs, rewards, ended, cut = self._simulator.step(actions[live, t], live)
            if self.observer is not None:
                self.observer(live)
            finite = self._check_finite(live, obs["state"], rewards)
            self._elapsed[live] += 1
            self._remember(live[finite], {name: value[finite] for name, value in obs.items()})
            reward[live] += np.where(finite, rewards, 0)
            valid[live] = finite
            terminated[live] = ended = ended & finite
            truncated[live] = cut = ~ended & (cut | ~finite | (self._elapsed[live] >= self.max_episode_steps))
            live = live[~(ended | cut)]
            if not live.size:
                break
        if self._time_limit_terminates:
            terminated |= truncated & valid
            truncated &= ~terminated
        self._log.append(actions[ids], ids)

        over = np.flatnonzero(terminated | truncated)
        final = self.raw_obs if over.size else None
        if over.size:
            self._begin_episodes(over)
        self._learn()
        flags = {"terminated": terminated, "truncated": truncated, "valid": valid}
        return _Outcome({"reward": np.where(valid, reward, 0), **flags}, final)

    def _deliver(self, rows: _Rows, outcome: _Outcome) -> Step:
        """A step's results on the device."""
        self._write_obs(rows, rows.step, self._history)
        for name, value in outcome.arrays.items():
            rows.step.arrays[name][:] = value[rows.ids]
        sent = rows.step.send()
        return Step(
            obs={name: sent[name] for name in self.obs_shapes},
            final_obs=None if outcome.final is None else self._send_obs(rows, outcome.final),
            reward=sent["reward"],
            terminated=sent["terminated"],
            truncated=sent["truncated"],
            valid=None if rows.step.arrays["valid"].all() else sent["valid"],
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only. Raises RuntimeError before the first reset."""
        self._require_started()
        return {
            "seed": self._seed,
            "nan_count": self.nan_count,
            "act_steps": self.act_steps,
            "episodes": self._log.state_dict(),
            "history": {name: torch.tensor(value) for name, value in self._history.items()},
            "normalization": self.normalization.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> Obs:
        """Return to the saved moment by repeating the running episodes' actions, and give the observation there.

        Where the simulator does not arrive at the saved observation bit for bit, a warning is logged and fresh episodes
        start. Raises UserError where the state belongs to an env of other sizes.
        """
        history = {name: value.cpu().numpy() for name, value in state["history"].items()}
        if (envs := len(history["state"])) != self.num_envs:
            raise UserError(
                f"env.num_envs={self.num_envs}: the run has {envs}, with which alone it can go on; "
                "policy.checkpoint=<run> starts another one from its policy"
            )
        saved, own = ({name: value.shape for name, value in h.items()} for h in (history, self._history))
        if (saved, state["act_steps"]) != (own, self.act_steps):
            raise UserError(
                f"env: the saved state has observations {saved} and act_steps={state['act_steps']}, "
                f"this configuration {own} and act_steps={self.act_steps}"
            )
        self.normalization.load_state_dict(state["normalization"])
        self._seed, self.nan_count = state["seed"], state["nan_count"]
        self._log.load_state_dict(state["episodes"])
        replayed = self._log.replay(self._simulator, self._seed)
        self.restarted = not all(np.array_equal(value, history[name][:, -1]) for name, value in replayed.items())
        if self.restarted:
            logger.warning("this simulator cannot be brought back to its saved state exactly: starting fresh episodes")
            return self.reset()
        self._elapsed = self._log.lengths * self.act_steps
        for name, value in history.items():
            self._history[name][:] = value
        return self._send_obs(self._all, self._history)

    def render(self, env: int) -> NDArray[np.uint8]:
        """How one env looks now [H, W, 3]. Raises UserError where the simulator cannot draw."""
        if not isinstance(self._simulator, Drawing):
            raise UserError(f"render: {type(self._simulator).__name__} cannot be drawn")
        return self._simulator.render(env)

    def close(self) -> None:
        self._background.shutdown()
        self._simulator.close()

    @property
    def _started(self) -> bool:
        return bool(self._log.resets.any())

    def _require_started(self) -> None:
        if not self._started:
            raise RuntimeError("the environment has not been reset yet: call reset() first")

    def _raw_actions(self, action: Tensor, rows: _Rows) -> NDArray[np.float64]:
        """The chunks of all envs [N, Ta, Da], of which only ``rows`` count, in the simulator's units."""
        self._require_started()
        expected = (len(rows.ids), self.act_steps, self.action_dim)
        if tuple(action.shape) != expected:
            raise ValueError(f"action has shape {tuple(action.shape)}, expected (N, act_steps, Da) = {expected}")
        actions = action.detach().cpu().numpy()
        if not np.isfinite(actions).all():
            raise FloatingPointError("the policy's actions hold NaN or Inf")
        raw = np.empty((self.num_envs, *expected[1:]))
        raw[rows.ids] = self.normalization.unnormalize_action(actions)
        return raw

    def _begin_episodes(self, ids: Ids) -> None:
        self._elapsed[ids] = 0
        for _ in range(RESET_ATTEMPTS):
            obs = self._simulator.reset(ids)
            self._log.begin(ids)
            for name, value in obs.items():
                self._history[name][ids] = value[:, None]
            ids = ids[~self._check_finite(ids, obs["state"])]
            if not ids.size:
                return
        raise RuntimeError(f"envs {ids.tolist()}: NaN or Inf from {RESET_ATTEMPTS} resets in a row")

    def _check_finite(self, ids: Ids, *values: Array) -> NDArray[np.bool_]:
        """Which rows are finite in all ``values`` [n, ...]; the others are counted."""
        finite = np.ones(len(ids), bool)
        for value in values:
            finite &= np.isfinite(value).reshape(len(ids), -1).all(1)
        if not finite.all():
            if not self.nan_count:
                logger.warning("nan: NaN or Inf from the simulator in envs %s, which are reset", ids[~finite].tolist())
            self.nan_count += int((~finite).sum())
        return finite

    def _remember(self, ids: Ids, obs: Mapping[str, Array]) -> None:
        for name, value in obs.items():
            history = self._history[name]
            history[ids, :-1] = history[ids, 1:]
            history[ids, -1] = value

    def _learn(self) -> None:
        if self._training:
            self.normalization.update(self._history["state"][:, -1])

    def _write_obs(self, rows: _Rows, block: _HostBlock, history: Mapping[str, Array]) -> None:
        for name, value in history.items():
            own = value[rows.ids]
            block.arrays[name][:] = self.normalization.normalize_obs(own) if name == "state" else own

    def _send_obs(self, rows: _Rows, history: Mapping[str, Array]) -> Obs:
        self._write_obs(rows, rows.obs, history)
        return rows.obs.send()


class _Outcome(NamedTuple):
    """What came of a chunk, all [N, ...]: reward and flags, and, where an episode ended, the observations before the
    resets.
    """

    arrays: dict[str, Array]
    final: dict[str, Array] | None


class _Rows:
    """Some of the envs, and what sends their observations and steps."""

    def __init__(self, ids: Ids, obs_shapes: ObsShapes, device: torch.device | str) -> None:
        self.ids = ids
        obs = {
            name: ((len(ids), *shape), torch.float32 if name == "state" else torch.uint8)
            for name, shape in obs_shapes.items()
        }
        outcome = {"reward": torch.float32, "terminated": torch.bool, "truncated": torch.bool, "valid": torch.bool}
        self.obs = _HostBlock(obs, device)
        self.step = _HostBlock(obs | {name: ((len(ids),), dtype) for name, dtype in outcome.items()}, device)


class _HostBlock:
    """Named arrays in one piece of host memory, pinned for a CUDA device, that travel there in one copy."""

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._layout: dict[str, tuple[slice, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, (shape, dtype) in fields.items():
            start = -(-end // 64) * 64
            end = start + prod(shape) * dtype.itemsize
            self._layout[name] = (slice(start, end), shape, dtype)
        self._block = torch.zeros(end, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self.arrays: dict[str, Array] = {name: value.numpy() for name, value in self._views(self._block).items()}

    def send(self) -> dict[str, Tensor]:
        """A copy on the device, complete when this returns."""
        return self._views(self._block.to(self._device, copy=True))

    def _views(self, block: Tensor) -> dict[str, Tensor]:
        return {name: block[part].view(dtype).view(shape) for name, (part, shape, dtype) in self._layout.items()}
