"""Builds the sdist and from it the wheel, and looks at what a user gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dppo_fast.runtime.native import native

ROOT = Path(__file__).parent.parent
FOLDERS = ["benchmarks", "cfg", "csrc", "docs", "dppo_fast", "kernels", "tests"]
FILES = ["CMakeLists.txt", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt"]
FILES += ["pyproject.toml", "setup.py"]
BUILT = native() is not None


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DPPO_FAST_")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def build(source: Path, out: Path, *what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ["--no-isolation", "--skip-dependency-check", "--outdir", out]
    return run("-m", "build", *options, *what, source, cwd=source, **environment)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        unwanted = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def dist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    result = build(source, out, DPPO_FAST_REQUIRE_NATIVE=str(int(BUILT)))
    assert result.returncode == 0, result.stdout
    return out


def files(folder: Path) -> set[str]:
    """Relative paths of what has to be shipped from ``folder``, symlinked folders included."""
    found = set()
    for parent, _, names in os.walk(folder, followlinks=True):
        found |= {os.path.relpath(os.path.join(parent, name), folder.parent) for name in names}
    return {path for path in found if not path.endswith(".pyc")}


def wheel_names(out: Path) -> set[str]:
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return set(wheel.namelist())


def test_sdist_holds_the_whole_tree(source: Path, dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert set.union(set(FILES), *(files(source / folder) for folder in FOLDERS)) <= names


def test_wheel_holds_the_package_and_what_builds_the_extension(source: Path, dist: Path) -> None:
    names = wheel_names(dist)
    package = files(source / "dppo_fast")
    assert any(name.startswith("dppo_fast/kernels/") for name in package)
    assert package <= names
    data = {name.partition(".data/data/")[2] for name in names}
    assert {"share/dppo_fast/CMakeLists.txt", *(f"share/dppo_fast/{name}" for name in files(source / "csrc"))} <= data
    assert any(name.startswith("dppo_fast/_native.") for name in names) == BUILT
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)


def test_wheel_works_outside_the_repository(dist: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    installed = run(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, next(dist.glob("*.whl"))), cwd=tmp_path
    )
    assert installed.returncode == 0, installed.stdout
    script = (
        "import sys, torch, dppo_fast; from dppo_fast.kernels.gae import gae; x = torch.ones(3, 2); no = x < 0;"
        "print(dppo_fast.__file__, gae(x, x, x, x[0], no, no, 0.5, 0.5, backend=sys.argv[1])[0][0].tolist())"
    )
    result = run("-c", script, "native" if BUILT else "reference", cwd=tmp_path, PYTHONPATH=str(site))
    assert result.stdout.strip() == f"{site}/dppo_fast/__init__.py [0.65625, 0.65625]"


def test_a_missing_compiler_is_a_warning(source: Path, tmp_path: Path) -> None:
    result = build(source, tmp_path, "--wheel", CXX=shutil.which("false") or "false")
    assert result.returncode == 0, result.stdout
    assert "dppo_fast's C++ extension was not built" in result.stdout
    names = wheel_names(tmp_path)
    assert files(source / "dppo_fast") <= names
    assert not any("_native" in name for name in names)


def test_a_missing_compiler_is_an_error_where_the_extension_is_required(source: Path, tmp_path: Path) -> None:
    result = build(source, tmp_path, "--wheel", CXX=shutil.which("false") or "false", DPPO_FAST_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "dppo_fast's C++ extension was not built" in result.stdout
    assert not list(tmp_path.iterdir())
