"""The architecture: who may import whom."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dppo_fast

PACKAGE = Path(dppo_fast.__file__).parent

ALLOWED = {
    "types": "torch",
    "runtime": "types torch",
    "runtime.progress": "rich",
    "kernels": "runtime.native torch triton",
    "diffusion": "kernels runtime types torch",
    "networks": "kernels types torch",
    "policies": "diffusion kernels networks runtime types torch",
    "buffer": "types torch",
    "advantage": "buffer kernels types torch",
    "optim": "kernels types torch",
    "envs": "runtime types torch numpy",
    "envs.envpool": "envs runtime types envpool numpy",
    "envs.gymnasium": "envs runtime types gymnasium numpy",
    "envs.workers": "envs types numpy",
    "envs.robomimic": "envs runtime types",
    "envs.furniture_server": "torch numpy furniture_bench",
    "envs.robosuite": "envs types gymnasium mujoco numpy robosuite",
    "envs.avoid": "envs runtime types mujoco numpy torch",
    "replay": "buffer types torch",
    "journal": "checkpoint replay",
    "data": "envs.normalize runtime types torch numpy",
    "data.transitions": "data.trajectories replay types torch numpy",
    "data.convert": "cli config data.pickles data.trajectories envs.normalize runtime types numpy omegaconf PIL",
    "data.convert.hdf5": "data.convert types numpy",
    "data.inspect": "cli data.trajectories runtime types matplotlib numpy omegaconf",
    "data.scripted.avoid": "envs.avoid_task types numpy",
    "algorithms": "advantage algorithms.base algorithms.parts buffer data kernels optim policies runtime types torch",
    "algorithms.bc": "algorithms.base buffer data networks.vision optim policies runtime types torch",
    "algorithms.ppo": (
        "advantage algorithms.base algorithms.parts buffer kernels networks.vision optim policies runtime types torch"
    ),
    "algorithms.parts": "data policies runtime torch",
    "algorithms.base": "algorithms.parts buffer policies replay types torch",
    "algorithms.off_policy": "algorithms.base algorithms.parts buffer data optim policies replay runtime types torch",
    "algorithms.calql": "algorithms.off_policy algorithms.parts algorithms.sac kernels optim replay types torch",
    "algorithms.ibrl": "algorithms.off_policy algorithms.parts networks policies replay types torch",
    "algorithms.weighted": "policies types torch",
    "algorithms.rwr": "algorithms.base algorithms.parts algorithms.weighted buffer kernels optim runtime types torch",
    "algorithms.awr": "advantage algorithms.off_policy algorithms.parts algorithms.weighted kernels replay types torch",
    "algorithms.diffusion_q": "algorithms.off_policy algorithms.parts algorithms.weighted policies replay types torch",
    "algorithms.dipo": "algorithms.diffusion_q algorithms.parts replay types torch",
    "algorithms.idql": "algorithms.diffusion_q algorithms.parts policies replay types torch",
    "algorithms.dql": "algorithms.diffusion_q algorithms.parts replay types torch",
    "algorithms.qsm": "algorithms.diffusion_q algorithms.parts replay types torch",
    "algorithms.exact_ppo": "algorithms.base algorithms.ppo policies types",
    "algorithms.sac": "algorithms.off_policy algorithms.parts optim policies replay types torch",
    "algorithms.rlpd": "algorithms.parts algorithms.sac networks types torch",
    "algorithms.dppo": "algorithms.base algorithms.parts algorithms.ppo buffer kernels optim policies types torch",
    "algorithms.__init__": "algorithms",
    "rollout": "buffer types torch numpy",
    "evaluator": "types torch numpy",
    "video": "types torch numpy imageio_ffmpeg",
    "checkpoint": "runtime types torch numpy safetensors",
    "log": "runtime types rich",
    "plot": "log runtime types matplotlib numpy",
    "plot_avoid": "envs.avoid_task runtime matplotlib numpy",
    "report": "cli log publish runtime types numpy omegaconf yaml",
    "trainer": "algorithms.base checkpoint evaluator journal log rollout runtime types torch",
    "accelerated": "advantage algorithms.dppo diffusion kernels networks policies runtime types torch",
    "deploy": "build envs.normalize policies types torch numpy",
    "config": "downloads types omegaconf",
    "downloads": "runtime types rich",
    "dry_run": "algorithms.bc buffer rollout runtime trainer torch",
    "cli": "config types hydra omegaconf rich yaml",
}
"""Module or package -> the modules, packages and libraries that it may import, besides Python's own. The longest name
that fits holds. The modules of a package may import each other, but for the algorithms.
"""

TOP = {"__init__", "build", "train", "evaluate", "collect", "publish", "convert", "latency", "export"}
"""May import everything."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package by its name inside it, those behind symbolic links (`kernels`) included."""
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py":
                name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
                yield name, ast.parse(path.read_text())


MODULES = dict(modules())


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What the import statements among ``nodes`` name: our modules by their names inside, libraries, Python's own."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (inside(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0, "imports are absolute"
            modules = (inside(f"{node.module}.{alias.name}") for alias in node.names)
            yield from (name if name in MODULES else inside(node.module) for name in modules)


def inside(name: str) -> str:
    """``dppo_fast.a.b`` -> ``a.b``, a package's name that of its ``__init__``; libraries without their submodules."""
    library, _, rest = name.partition(".")
    if library != "dppo_fast":
        return library
    return rest if rest in MODULES else f"{rest}.__init__".removeprefix(".")


def fits(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")


@pytest.mark.parametrize("module", sorted(MODULES.keys() - TOP))
def test_imports_only_what_lies_below(module: str) -> None:
    row = max((key for key in ALLOWED if fits(module, key)), key=len, default=None)
    assert row is not None, "every module needs a row in the table"
    own = [] if row.startswith("algorithms") else [row]
    for name in set(imports(ast.walk(MODULES[module]))) - sys.stdlib_module_names:
        assert any(fits(name, allowed) for allowed in ALLOWED[row].split() + own), f"{module} imports {name}"


def test_the_table_names_what_is_there() -> None:
    assert {key for key in ALLOWED if not any(fits(module, key) for module in MODULES)} == set()


def test_no_cycles() -> None:
    graph = {name: set(imports(tree.body)) & MODULES.keys() for name, tree in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("types") < order.index("trainer") < order.index("build")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("dppo_fast", {"torch", "numpy", "triton", "envpool", "gymnasium", "mujoco"}),
        ("dppo_fast.build", {"envpool", "gymnasium", "mujoco", "matplotlib"}),
    ],
)
def test_importing_is_light(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; found = {absent!r} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
