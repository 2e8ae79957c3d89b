"""Builds the optional C++ extension with CMake. Everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

REQUIRED = os.environ.get("DPPO_FAST_REQUIRE_NATIVE") == "1"
HELP = (
    "dppo_fast's C++ extension was not built ({error}). It needs CMake, pybind11, a C++17 compiler and Python's "
    "headers (Debian, Ubuntu: apt install g++ python3-dev). Without it plain PyTorch does the same, more slowly."
)


class CMakeBuild(build_ext):
    """Compiles with CMake. A failure is a warning, or an error where DPPO_FAST_REQUIRE_NATIVE=1."""

    def build_extension(self, ext: Extension) -> None:
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "PATH": path}
        if shutil.which("ninja", path=path):
            environment.setdefault("CMAKE_GENERATOR", "Ninja")
        source = Path(__file__).resolve().parent
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.unlink(missing_ok=True)
        configure = ["cmake", "--fresh", "-S", str(source), "-B", self.build_temp]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}"]
        try:
            for command in (configure, ["cmake", "--build", self.build_temp]):
                subprocess.run(command, env=environment, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(HELP.format(error=error)) from error


setup(
    ext_modules=[Extension("dppo_fast._native", sources=[], optional=not REQUIRED)],
    cmdclass={"build_ext": CMakeBuild},
)
