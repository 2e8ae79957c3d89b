"""Mutation testing: python -m benchmarks.mutation [share=0.2] tells how many small faults the tests notice.

Every comparison, operator, number and condition of the modules below is changed, one at a time, in a copy of the
repository; a mutant is killed when the tests beside it fail. Of the kernels that is the reference, their specification.
"""

from __future__ import annotations

import ast
import copy
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
MODULES: dict[str, tuple[tuple[str, ...], str]] = {
    "kernels/ppo_loss.py": (
        ("exp_minus_one_minus", "ppo_loss_reference", "chain_ppo_loss_reference", "value_loss_reference"),
        "tests/kernels/test_ppo_loss.py -k 'not triton'",
    ),
    "kernels/gae.py": (("gae_reference",), "tests/kernels/test_gae.py -k 'not triton'"),
    "dppo_fast/diffusion/schedule.py": ((), "tests/diffusion"),
    "dppo_fast/advantage.py": ((), "tests/test_advantage.py"),
}
"""File -> its functions to change (none: all) and what tests them."""
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
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
    """Line and text of every mutant; annotations, docstrings and error messages stay as they are."""
    tree = ast.parse(source)
    for number, node in enumerate(_changeable(tree, functions)):
        changed = copy.deepcopy(tree)
        _change(list(_changeable(changed, functions))[number])
        yield node.lineno, ast.unparse(changed)


def _changeable(tree: ast.Module, functions: tuple[str, ...]) -> Iterator[ast.expr]:
    defs = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and (not functions or n.name in functions)]
    for node in (node for function in defs for statement in function.body for node in _expressions(statement)):
        operator = node.ops[0] if isinstance(node, ast.Compare) else getattr(node, "op", None)
        number = isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float)
        if type(operator) in SWAPS or isinstance(operator, ast.USub | ast.Not) or number:
            yield node


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Raise | ast.FunctionDef):
        return
    if isinstance(node, ast.expr):
        yield node
    for name, child in ast.iter_fields(node):
        if name != "annotation":
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST):
                    yield from _expressions(part)


def _change(node: ast.expr) -> None:
    if isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.UnaryOp):
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Constant):
        assert isinstance(node.value, bool | int | float)
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    else:
        node.op = SWAPS[type(node.op)]()  # type: ignore[attr-defined]


def survives(copied: Path, tests: str) -> bool:
    command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"
    environment = os.environ | {"PYTHONPATH": str(copied), "OMP_NUM_THREADS": "1", "DPPO_FAST_BACKEND": ""}
    try:
        done = subprocess.run(command, shell=True, cwd=copied, env=environment, capture_output=True, timeout=300)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in arguments)
    share = float(options.get("share", "1"))
    total = killed = 0
    with TemporaryDirectory() as folder:
        copied = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, copied, symlinks=True, ignore=ignored)
        for name, (functions, tests) in MODULES.items():
            if options.get("module", name) != name:
                continue
            file = copied / name
            original = file.read_text()
            if not survives(copied, tests):
                print(f"{name}: its tests fail without a fault")
                return 1
            found = list(mutants(original, functions))
            picked = random.Random(0).sample(found, round(share * len(found)))
            alive = []
            for line, text in picked:
                file.write_text(text)
                if survives(copied, tests):
                    alive.append(line)
                    print(f"  {name}:{line} survived: {_difference(original, text)}", flush=True)
            file.write_text(original)
            total, killed = total + len(picked), killed + len(picked) - len(alive)
            print(f"{name}: {len(picked) - len(alive)} of {len(picked)} killed ({len(found)} in all)", flush=True)
    print(f"{killed} of {total} killed, {killed / max(total, 1):.1%}")
    return 0


def _difference(original: str, mutant: str) -> str:
    before = ast.unparse(ast.parse(original)).splitlines()
    return next((new.strip() for old, new in zip(before, mutant.splitlines(), strict=True) if old != new), "nothing")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
