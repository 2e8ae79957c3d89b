"""Where the time goes: seconds by phase for the log, named ranges for Nsight Systems and for Chrome traces."""

from __future__ import annotations

import inspect
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerAction, record_function

from dppo_fast.types import UserError

_OFF = nullcontext()
_range: Callable[[str], AbstractContextManager[Any]] | None = None
_plain_ops: list[tuple[ModuleType, str, Any]] = []


def set_profile(profile: str | None) -> None:
    """Turn the ranges of ``annotate`` on for the whole process, in NVTX (``"nvtx"``) or in PyTorch's profiler
    (``"torch"``), or off (None).

    While they are on, every op of ``dppo_fast.kernels`` is a range, too, wherever a loaded module of the package calls
    it; while they are off, nothing is wrapped.

    Raises:
        UserError: another value, or NVTX asked of a PyTorch without CUDA.
    """
    global _range
    if profile not in (None, "nvtx", "torch"):
        raise UserError(f"profile={profile}: choose nvtx or torch, or null for none")
    if profile == "nvtx" and torch.version.cuda is None:
        raise UserError(f"profile=nvtx: needs a CUDA build of PyTorch, and this one is {torch.__version__}")
    while _plain_ops:
        setattr(*_plain_ops.pop())
    _range = {None: None, "nvtx": torch.cuda.nvtx.range, "torch": record_function}[profile]
    if _range is not None:
        _annotate_ops()


def annotate(name: str) -> AbstractContextManager[Any]:
    """A named range on the profiler's timeline; a shared null context unless ``set_profile`` turned ranges on."""
    return _OFF if _range is None else _range(name)


def _annotate_ops() -> None:
    """Put an annotated op in the place of every op that a loaded module of the package calls."""
    annotated: dict[Any, Any] = {}
    for module in [module for name, module in sys.modules.items() if name.startswith("dppo_fast.")]:
        for name, value in list(vars(module).items()):
            if _is_op(value):
                _plain_ops.append((module, name, value))
                setattr(module, name, annotated.setdefault(value, _annotated(value)))


def _is_op(value: Any) -> bool:
    """Whether ``value`` is a public function of the kernels that takes ``backend=``."""
    return (
        inspect.isfunction(value)
        and value.__module__.startswith("dppo_fast.kernels.")
        and not value.__name__.startswith("_")
        and "backend" in inspect.signature(value).parameters
    )


def _annotated(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with annotate(function.__name__):
            return function(*args, **kwargs)

    return call


class PhaseTimer:
    """Wall-clock seconds by phase, each phase also a range of the profiler.

    ``with timer("collect"): ...`` adds to its phase. A phase inside a phase counts for the inner one only, so that the
    phases add up. On CUDA pass ``synchronize=torch.cuda.synchronize``: kernels run behind the host, and a phase must
    wait for those it launched, else the next one pays for them. ``on_lap``, if set, is called at the end of every lap.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self.on_lap: Callable[[], object] | None = None
        self._synchronize = synchronize
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer_inner, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            with annotate(phase):
                yield
                if self._synchronize is not None:
                    self._synchronize()
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[phase] += elapsed - self._inner
            self._inner = outer_inner + elapsed

    def lap(self) -> dict[str, float]:
        """Seconds of the phases ended since the last lap, as ``time/<phase>``; starts the next lap."""
        lap = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds.clear()
        if self.on_lap is not None:
            self.on_lap()
        return lap


@contextmanager
def tracing(timer: PhaseTimer, folder: Path, laps: Collection[int], first: int) -> Iterator[None]:
    """Write a Chrome trace ``folder/iteration_<lap>.json.gz`` of each lap of ``timer`` whose number is in ``laps``.

    ``first`` is the number of the lap that runs now. A lap that an exception cuts short is written as far as it came.
    Without ``laps`` nothing happens at all.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    if not laps:
        yield
        return
    lap = first

    def action(step: int) -> ProfilerAction:
        if first + step in laps:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.WARMUP if first + step + 1 in laps else ProfilerAction.NONE

    def save(profiler: torch.profiler.profile) -> None:
        path = folder / f"iteration_{lap}.json.gz"
        unfinished = path.with_name(f".{path.name}")
        profiler.export_chrome_trace(str(unfinished))
        unfinished.replace(path)

    def advance() -> None:
        nonlocal lap
        profiler.step()
        lap += 1

    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(schedule=action, on_trace_ready=save) as profiler:
        timer.on_lap = advance
        try:
            yield
        finally:
            timer.on_lap = None
