"""OpenGL without a screen, for pictures: EGL, on a GPU or in software, or else OSMesa."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from dppo_fast.types import UserError

DRAW = "import mujoco; mujoco.GLContext(8, 8).make_current()"
PACKAGES = {"egl": "EGL (Debian: libegl1 libopengl0)", "osmesa": "OSMesa (Debian: libosmesa6)"}


@cache
def headless_gl() -> str | None:
    """What MuJoCo can draw with here: MUJOCO_GL where it is set, else the first of egl and osmesa that works, which is
    then written to MUJOCO_GL; None where neither does. MuJoCo reads that variable when it is imported.
    """
    if "MUJOCO_GL" not in os.environ:
        for name in ("egl", "osmesa"):
            environment = {**os.environ, "MUJOCO_GL": name, "PYOPENGL_PLATFORM": name}
            if subprocess.run([sys.executable, "-c", DRAW], env=environment, capture_output=True).returncode == 0:
                os.environ["MUJOCO_GL"] = name
                break
    if find_spec("triton"):
        import_module("triton")  # it crashes when it comes after software OpenGL, whose LLVM is another
    return os.environ.get("MUJOCO_GL")


def require_gl(what: str, *kinds: str) -> None:
    """Raise UserError, which says that ``what`` cannot be drawn, where there is none of ``kinds`` (any will do)."""
    found = headless_gl()
    if found is None or (kinds and found not in kinds):
        tried = f"found only {found}" if found else "found neither EGL nor OSMesa"
        install = " or ".join(PACKAGES[kind] for kind in kinds or PACKAGES)
        raise UserError(f"{what} cannot be drawn without a screen: {tried}; install {install}")


def expose_egl() -> None:
    """Make EGL's symbols visible to libraries that look them up in the process, where it is installed."""
    for name in ("libOpenGL.so.0", "libEGL.so.1"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            return
