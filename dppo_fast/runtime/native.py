"""The optional C++ extension ``dppo_fast._native``."""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from types import ModuleType

log = logging.getLogger(__name__)

BUILD_HINT = (
    "build it with `python setup.py build_ext --inplace` in the source folder (or `make native`); "
    "it needs a C++17 compiler and Python's headers"
)


@cache
def native() -> ModuleType | None:
    """The extension, or None, with one warning, where it is not built.

    Raises ImportError instead of giving None where the environment variable DPPO_FAST_REQUIRE_NATIVE is 1.
    """
    try:
        return importlib.import_module("dppo_fast._native")
    except ImportError as error:
        if os.environ.get("DPPO_FAST_REQUIRE_NATIVE") == "1":
            raise ImportError(
                f"DPPO_FAST_REQUIRE_NATIVE=1, but the C++ extension cannot be loaded ({error}); {BUILD_HINT}"
            ) from error
        log.warning("no C++ extension (%s), plain PyTorch takes its place; %s", error, BUILD_HINT)
        return None
