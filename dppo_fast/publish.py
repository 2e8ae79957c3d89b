"""python -m dppo_fast.publish checkpoint=<file or run> out=<file>: a checkpoint's policy without its training state."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from dppo_fast.cli import command_main
from dppo_fast.types import UserError


@dataclass
class PublishConfig:
    checkpoint: str = MISSING
    out: str = MISSING


def publish(config: PublishConfig) -> None:
    from dppo_fast.checkpoint import Checkpoint, find

    policy = Checkpoint.load(find(config.checkpoint)).policy_only()
    with writing(config.out) as out:
        policy.save(out)


@contextmanager
def writing(out: str) -> Iterator[Path]:
    """Where a main writes the file that ``out=`` names: prints its size, or raises UserError where that fails."""
    path = Path(out)
    try:
        yield path
    except OSError as error:
        raise UserError(f"out={out} is not writable ({error.strerror}); choose another file") from error
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
    return command_main(PublishConfig, publish, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
