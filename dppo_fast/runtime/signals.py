"""Signals that ask a run to end: it comes to a place from which it can be continued."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, the end of a SLURM job, and the warning before that end (``--signal=USR1@60``)."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; its main exits with ``code``, as shells have it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.code = 128 + number


class StopRequest:
    """Within its block the first of `SIGNALS` is noted in ``number``, not obeyed; a SIGINT after it interrupts at once.

    A signal that the process was started to ignore stays ignored.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether the run should stop."""
        return self.number is not None

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            name = signal.Signals(number).name
            # not print, which must not be entered twice
            os.write(2, f"{name}: saving after this iteration; Ctrl-C stops at once\n".encode())
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
