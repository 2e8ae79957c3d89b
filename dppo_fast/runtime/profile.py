"""Where the time goes: seconds by phase for the log, NVTX ranges for Nsight Systems."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from dppo_fast.types import UserError

_OFF = nullcontext()
_nvtx = False


def set_profile(profile: str | None) -> None:
    """Turn the ranges of ``annotate`` on (``"nvtx"``) or off (None) for the whole process.

    Raises:
        UserError: another value, or NVTX asked of a PyTorch without CUDA.
    """
    global _nvtx
    if profile not in (None, "nvtx"):
        raise UserError(f"profile={profile}: choose nvtx, or null for none")
    if profile == "nvtx" and torch.version.cuda is None:
        raise UserError(f"profile=nvtx: needs a CUDA build of PyTorch, and this one is {torch.__version__}")
    _nvtx = profile == "nvtx"


def annotate(name: str) -> AbstractContextManager[None]:
    """A named range on the timeline of Nsight Systems; a shared null context unless ``set_profile("nvtx")`` is on."""
    return torch.cuda.nvtx.range(name) if _nvtx else _OFF


class PhaseTimer:
    """Wall-clock seconds by phase, each phase also an NVTX range.

    ``with timer("collect"): ...`` adds to its phase. A phase inside a phase counts for the inner one only, so that the
    phases add up. On CUDA pass ``synchronize=torch.cuda.synchronize``: kernels run behind the host, and a phase must
    wait for those it launched, else the next one pays for them.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
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
        return lap
