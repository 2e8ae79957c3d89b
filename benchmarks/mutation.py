"""Do the tests notice small faults?  python -m benchmarks.mutation [share=0.2] [module=kernels/gae.py]

Every operator, comparison, number and condition in the functions of `MODULES` is made wrong, one at a time, in a copy
of the repository, where the tests beside it should fail then. Of the kernels that is the reference, their
specification. A ``share`` is drawn with a fixed seed; without one all are tried and `results/mutation.csv` is written.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import random
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed.tensor
from hypothesis import Phase, settings

from benchmarks.report import environment, write_csv

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mutation.csv"

MODULES: dict[str, tuple[tuple[str, ...], str]] = {
    "kernels/ppo_loss.py": (
        ("exp_minus_one_minus", "ppo_loss_reference", "chain_ppo_loss_reference", "value_loss_reference"),
        "tests/kernels/test_ppo_loss.py -k 'not triton'",
    ),
    "kernels/gae.py": (("gae_reference",), "tests/kernels/test_gae.py -k 'reference and not both_kernels'"),
    "dppo_fast/diffusion/schedule.py": (
        (),
        "tests/diffusion/test_schedule.py tests/diffusion/test_golden_diffusion.py tests/diffusion/test_sampler.py",
    ),
    "dppo_fast/optim.py": ((), "tests/test_optim.py tests/test_golden_optim.py"),
    "dppo_fast/advantage.py": ((), "tests/test_advantage.py"),
}
"""File -> its functions with faults (none: all) and what tests them."""

NOTHING_CLIPPED = "the quantiles 0 and 1 clip nothing"
EQUIVALENT: dict[str, str] = {
    "return torch.where(x.abs() <= 0.05, series, torch.expm1(x) - x)": "at 0.05 both are as exact",
    "return torch.zeros_like(self.table[:, 5])": "every column is as long",
    "if eta.dim() > 1:": "it has no dims or three",
    "nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm, foreach=False)": "the same, slower",
    "if lower_quantile >= 0 or upper_quantile < 1:": NOTHING_CLIPPED,
    "if lower_quantile > 0 or upper_quantile <= 1:": NOTHING_CLIPPED,
    "if lower_quantile > 0 or upper_quantile < 2:": NOTHING_CLIPPED,
}
"""Faults that change nothing, as the line reads with them, and why."""

SWAPS: dict[type[ast.AST], type[Any]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mutants(source: str, functions: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and text of every mutant; annotations, error messages and zip's strict, an assertion, stay as they are."""
    for number, (line, _) in enumerate(_faults(ast.parse(source), functions)):
        changed = ast.parse(source)
        list(_faults(changed, functions))[number][1]()
        yield line, ast.unparse(changed)


def _faults(tree: ast.Module, functions: tuple[str, ...]) -> Iterator[tuple[int, Callable[[], None]]]:
    """The line of every fault, and what puts it there."""
    defs = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and (not functions or n.name in functions)]
    for node in (node for function in defs for statement in function.body for node in _nodes(statement)):
        match node:
            case ast.Compare():
                for i, operator in enumerate(node.ops):
                    if type(operator) in SWAPS:
                        yield node.lineno, partial(node.ops.__setitem__, i, SWAPS[type(operator)]())
            case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in SWAPS:
                yield node.lineno, partial(setattr, node, "op", SWAPS[type(node.op)]())
            case ast.UnaryOp(op=ast.USub()):
                yield node.lineno, partial(setattr, node, "op", ast.UAdd())
            case ast.Constant(value=bool(value)):
                yield node.lineno, partial(setattr, node, "value", not value)
            case ast.Constant(value=int(value) | float(value)):
                yield node.lineno, partial(setattr, node, "value", value + 1)
            case ast.If() | ast.IfExp():
                yield node.lineno, partial(setattr, node, "test", ast.UnaryOp(ast.Not(), node.test))


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Raise | ast.FunctionDef) or (isinstance(node, ast.keyword) and node.arg == "strict"):
        return
    yield node
    for name, child in ast.iter_fields(node):
        if name != "annotation":
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST):
                    yield from _nodes(part)


def survives(copied: Path, tests: str, write_bytecode: bool = False) -> bool:
    """Whether the tests pass, in a process that starts with everything slow imported and nothing of the repository."""
    process = multiprocessing.get_context("fork").Process(target=_test, args=(copied, tests, write_bytecode))
    process.start()
    process.join(timeout=300)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


def _test(copied: Path, tests: str, write_bytecode: bool) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.dont_write_bytecode = not write_bytecode  # it could be taken for the next fault's
    for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", "dppo_fast")]:
        del sys.modules[name]
    os.chdir(copied)
    sys.path.insert(0, str(copied))
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copied)}
    os.environ.pop("DPPO_FAST_BACKEND", None)
    settings.register_profile("mutation", deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutation"]
    os._exit(pytest.main([*options, *shlex.split(tests)]))


def results(share: float, module: str | None) -> Iterator[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        copied = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "runs", "data", "log", "build", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, copied, symlinks=True, ignore=ignored)
        for name, (functions, tests) in MODULES.items():
            if module not in (None, name):
                continue
            file, start = copied / name, perf_counter()
            original = file.read_text()
            if not survives(copied, tests, write_bytecode=True):
                raise SystemExit(f"{name}: its tests fail without a fault")
            found = list(mutants(original, functions))
            killed = equivalent = 0
            for line, text in random.Random(0).sample(found, round(share * len(found))):
                file.write_text(text)
                changed = _difference(original, text)
                if changed in EQUIVALENT:
                    equivalent += 1
                elif not survives(copied, tests):
                    killed += 1
                else:
                    print(f"  {name}:{line} survived: {changed}", flush=True)
            file.write_text(original)
            tried = round(share * len(found))
            yield {
                "module": name,
                "faults": len(found),
                "tried": tried,
                "equivalent": equivalent,
                "killed": killed,
                "score": killed / max(tried - equivalent, 1),
                "seconds": perf_counter() - start,
            }


def _difference(original: str, mutant: str) -> str:
    before = ast.unparse(ast.parse(original)).splitlines()
    return next((new.strip() for old, new in zip(before, mutant.splitlines(), strict=True) if old != new), "nothing")


def main(arguments: list[str]) -> int:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    options = dict(argument.split("=", 1) for argument in arguments)
    share, module = float(options.get("share", "1")), options.get("module")
    rows: list[dict[str, Any]] = []

    def kept() -> Iterator[dict[str, Any]]:
        for row in results(share, module):
            rows.append(row)
            yield row

    whole = share == 1 and module is None
    write_csv(kept(), environment(torch.device("cpu")), RESULT if whole else None)
    killed, counted = (sum(row[key] for row in rows) for key in ("killed", "tried"))
    counted -= sum(row["equivalent"] for row in rows)
    print(f"{killed} of {counted} killed, {killed / max(counted, 1):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
