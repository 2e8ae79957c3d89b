"""Which faults are put into a module, and that the tests beside it decide."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from benchmarks.mutation import EQUIVALENT, MODULES, ROOT, mutants

SOURCE = '''
LIMIT = 3

def f(x: int = 1) -> int:
    """1 + 1"""
    y: list[int | None] = [*zip(x, strict=True)]
    if not 0 <= x < y:
        raise ValueError(1 + 1)
    return -x
'''


def lines(source: str, functions: tuple[str, ...] = ()) -> set[str]:
    before = ast.unparse(ast.parse(source)).splitlines()
    changed = (text.splitlines() for _, text in mutants(source, functions))
    return {new.strip() for text in changed for old, new in zip(before, text, strict=True) if old != new}


def test_every_fault_once() -> None:
    assert lines(SOURCE) == {
        "if not not 0 <= x < y:",
        "if not 0 < x < y:",
        "if not 0 <= x <= y:",
        "if not 1 <= x < y:",
        "return +x",
    }
    assert len(list(mutants(SOURCE, ()))) == 5
    assert not lines(SOURCE, ("g",))


def test_what_is_called_equivalent_is_there() -> None:
    found = set().union(*(lines((ROOT / name).read_text(), functions) for name, (functions, _) in MODULES.items()))
    assert found >= EQUIVALENT.keys()


def test_tests_that_fail_kill(tmp_path: Path) -> None:
    """In an interpreter of its own, because `survives` forks: a child of this one inherits what earlier tests left."""
    for name, holds in {"good": True, "bad": False}.items():
        (tmp_path / f"test_{name}.py").write_text(f"def test() -> None:\n    assert {holds}\n")
    asked = "import sys; from pathlib import Path; from benchmarks.mutation import survives"
    told = "print([survives(Path(sys.argv[1]), name) for name in sys.argv[2:]])"
    command = [sys.executable, "-c", f"{asked}; {told}", str(tmp_path), "test_good.py", "test_bad.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[True, False]\n"
