"""Environments in worker processes: whatever steps one env at a time, on as many cores as there are.

Actions, observations and outcomes lie in memory that all processes share; through a worker's pipe goes only what its
envs are to do. A worker that dies takes its episodes with it, and nothing else: it is started anew.
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from multiprocessing.util import Finalize
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dppo_fast.envs.gymnasium import Layout, action_bounds
from dppo_fast.envs.simulator import Array, Ids
from dppo_fast.types import UserError

logger = logging.getLogger(__name__)

DEATHS_IN_A_ROW = 3
"""How often a worker may die without having stepped in between."""
PATIENCE = 5.0
"""Seconds that workers have to end by themselves once their pipes are closed."""

Fields = dict[str, tuple[tuple[int, ...], str]]
"""Name -> shape and dtype."""


class Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class WorkerSimulator:
    """A `Simulator` of N gymnasium-like environments; env i is the business of worker ``i mod num_workers``.

    A worker that dies is started anew. Its episodes are over: where the next step would have been, they are truncated
    at their last observation, with reward 0. ``worker_deaths`` counts the workers that died.
    """

    def __init__(
        self,
        task_id: str,
        make: Callable[[int], Any],
        num_envs: int,
        num_workers: int = 0,
        preload: Sequence[str] = (),
    ) -> None:
        """``make`` builds one env from its index and can be pickled; a reset's seed must govern all randomness of the
        episode. ``num_workers`` 0 means one per core. The modules ``preload`` are imported once for all workers.

        Raises UserError where ``make`` does, and for spaces that a `Simulator` cannot have.
        """
        self.num_envs = num_envs
        self.worker_deaths = 0
        self._task_id, self._make = task_id, make
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *preload])
        num_workers = min(num_workers or len(os.sched_getaffinity(0)), num_envs)
        self._deaths = [0] * num_workers  # of each worker since it last stepped
        self._workers: list[Worker] = []
        # at exit before multiprocessing waits for its processes, which without this would not end
        self._end = Finalize(self, _end, (self._workers,), exitpriority=0)
        for w in range(num_workers):
            self._workers.append(self._start(w))
        self.obs_shapes, self.action_low, self.action_high = self._greet(self._workers)
        outcome: Fields = {"reward": ((num_envs,), "f8"), "ended": ((num_envs,), "?"), "cut": ((num_envs,), "?")}
        obs: Fields = {
            name: ((num_envs, *shape), "f8" if name == "state" else "u1") for name, shape in self.obs_shapes.items()
        }
        commands: Fields = {"action": ((num_envs, len(self.action_low)), "f8"), "seed": ((num_envs,), "u4")}
        self._fields = {**{f"obs/{name}": field for name, field in obs.items()}, **outcome, **commands}
        self._descriptor, self._shared = _share(self._fields)
        weakref.finalize(self, os.close, self._descriptor)
        for worker in self._workers:
            self._hand_over(worker)
        self._obs: dict[str, Array] = {name: np.zeros(*field) for name, field in obs.items()}  # whole, whoever dies
        self._lost = np.zeros(num_envs, bool)  # which envs have no episode because their worker died

    def seed(self, seed: int, resets: Ids) -> None:
        """Each episode of each env has its own seed, so resets need not be repeated."""
        self._seed, self._resets = seed, resets.copy()

    def reset(self, ids: Ids) -> dict[str, Array]:
        for i in ids:
            episode = np.random.SeedSequence(self._seed, spawn_key=(i, self._resets[i]))
            self._shared["seed"][i] = episode.generate_state(1)[0]
        self._resets[ids] += 1
        left = ids
        while left.size:
            self._lost[left] = False
            self._command("reset", left)
            left = ids[self._lost[ids]]
        return self._read(ids)

    def step(self, actions: NDArray[np.float64], ids: Ids) -> tuple[dict[str, Array], Array, Array, Array]:
        self._shared["action"][ids] = actions
        self._command("step", ids[~self._lost[ids]])
        lost = self._lost[ids]
        self._read(ids[~lost])
        reward, ended, cut = (self._shared[name][ids] for name in ("reward", "ended", "cut"))
        obs = {name: value[ids] for name, value in self._obs.items()}
        return obs, np.where(lost, 0.0, reward), ended & ~lost, cut | lost

    def render(self, env: int) -> NDArray[np.uint8]:
        picture: NDArray[np.uint8] | None = None
        while picture is None:
            (picture,) = self._command("render", np.array([env]))
        return picture

    def close(self) -> None:
        self._end()

    def _read(self, ids: Ids) -> dict[str, Array]:
        """Take over what the workers wrote of the envs ``ids``."""
        for name, value in self._obs.items():
            value[ids] = self._shared[f"obs/{name}"][ids]
        return {name: value[ids] for name, value in self._obs.items()}

    def _command(self, command: str, ids: Ids) -> list[Any]:
        """Let the workers of the envs ``ids`` do something at the same time; their answers, None from who died."""
        owners = ids % len(self._workers)
        asked = np.unique(owners).tolist()
        answers = []
        for w in asked:
            try:
                self._workers[w].connection.send((command, ids[owners == w]))
            except OSError:
                continue  # then nothing can be received either
        for w in asked:
            try:
                answers.append(_raised(self._workers[w].connection.recv()))
            except (EOFError, OSError):
                self._replace(w)
                answers.append(None)
            else:
                self._deaths[w] = 0 if command == "step" else self._deaths[w]
        return answers

    def _replace(self, w: int) -> None:
        """Start worker ``w`` anew. Raises RuntimeError where that has not helped before."""
        process, connection = self._workers[w]
        process.join()
        connection.close()
        self.worker_deaths += 1
        self._deaths[w] += 1
        mine = np.arange(w, self.num_envs, len(self._workers))
        what = f"env.id={self._task_id}: the worker of envs {mine.tolist()} died (exit code {process.exitcode})"
        if self._deaths[w] >= DEATHS_IN_A_ROW:
            raise RuntimeError(f"{what}, {self._deaths[w]} times in a row; env.num_envs may need too much memory")
        logger.warning("%s; it is started anew, and its episodes count as truncated", what)
        self._lost[mine] = True
        self._workers[w] = self._start(w)
        self._greet([self._workers[w]])
        self._hand_over(self._workers[w])

    def _start(self, w: int) -> Worker:
        ours, theirs = self._context.Pipe()
        mine = range(w, self.num_envs, len(self._deaths))
        process = self._context.Process(target=_work, args=(theirs, self._task_id, self._make, mine), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _greet(self, workers: Sequence[Worker]) -> Any:
        """Wait until the workers have their envs: observation shapes and action bounds."""
        for process, connection in workers:
            try:
                answer = _raised(connection.recv())
            except (EOFError, OSError) as error:
                process.join()
                raise RuntimeError(
                    f"env.id={self._task_id}: a worker died (exit code {process.exitcode}) while it made its envs"
                ) from error
        return answer

    def _hand_over(self, worker: Worker) -> None:
        worker.connection.send(self._fields)
        assert worker.process.pid is not None
        send_handle(worker.connection, self._descriptor, worker.process.pid)


def _work(connection: Connection, task_id: str, make: Callable[[int], Any], mine: Sequence[int]) -> None:
    """A worker's life: greet, receive the shared memory, do as told until the pipe is closed."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # for the main process, which then closes the pipe
        signal.signal(name, signal.SIG_IGN)
    try:
        envs = {i: make(i) for i in mine}
        env = envs[mine[0]]
        layout = Layout(task_id, env.observation_space)
        connection.send((layout.shapes, *action_bounds(task_id, env.action_space)))
        fields = connection.recv()
        _, shared = _share(fields, recv_handle(connection))
        while True:
            command, ids = connection.recv()
            answer = None
            for i in ids.tolist():
                answer = _obey(envs[i], command, {name: value[i : i + 1] for name, value in shared.items()}, layout)
            connection.send(answer)
    except UserError as error:
        connection.send(error)
    except (EOFError, OSError):  # the main process is gone
        return


def _obey(env: Any, command: str, row: Mapping[str, Array], layout: Layout) -> Any:
    """Let one env do something and write what comes of it to its ``row``; a picture is the answer."""
    if command == "render":
        return env.render()
    if command == "reset":
        obs, _ = env.reset(seed=int(row["seed"][0]))
    else:
        action = row["action"][0].astype(env.action_space.dtype)
        obs, row["reward"][0], row["ended"][0], row["cut"][0], _ = env.step(action)
    for name, value in layout.read(lambda leaf: np.asarray(reduce(getitem, leaf, obs))[None]).items():
        row[f"obs/{name}"][:] = value
    return None


def _share(fields: Fields, descriptor: int | None = None) -> tuple[int, dict[str, Array]]:
    """Arrays in new memory that has a file descriptor, or in that of one."""
    starts, end = {}, 0
    for name, (shape, dtype) in fields.items():
        starts[name] = end
        end += -(-prod(shape) * np.dtype(dtype).itemsize // 64) * 64
    if descriptor is None:
        descriptor = os.memfd_create("dppo_fast")
        os.ftruncate(descriptor, end)
    memory = mmap.mmap(descriptor, end)
    return descriptor, {name: np.ndarray(*field, memory, starts[name]) for name, field in fields.items()}


def _raised(answer: Any) -> Any:
    if isinstance(answer, UserError):
        raise answer
    return answer


def _end(workers: Sequence[Worker]) -> None:
    for _, connection in workers:
        connection.close()
    deadline = time.monotonic() + PATIENCE
    for process, _ in workers:
        process.join(max(deadline - time.monotonic(), 0))
        if process.exitcode is None:
            process.kill()
            process.join()
