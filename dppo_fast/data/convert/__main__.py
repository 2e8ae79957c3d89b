"""python -m dppo_fast.data.convert <format> source=<file or folder> out=<folder> [key=value ...]: bring your own data.

Writes ``train.npz`` and ``normalization.npz``, from which ``data.path`` and ``env.normalization`` pre-train a policy.
<format> --help explains a format and its keys.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dppo_fast.cli import HELP, command_main, guarded
from dppo_fast.config import choose
from dppo_fast.data.convert import FORMATS, convert


def main(arguments: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in HELP:
        print(__doc__, "Formats:", *FORMATS, sep="\n  ")
        return 0
    return guarded(lambda: choose(FORMATS, name, "format")) or command_main(
        FORMATS[name], convert, rest, FORMATS[name].usage
    )


if __name__ == "__main__":
    sys.exit(main())
