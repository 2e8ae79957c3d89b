"""python -m dppo_fast.export checkpoint=<file or run> out=<file>: a diffusion policy as one graph, without our code.

out=<name>.onnx writes ONNX, out=<name>.pt2 a `torch.export` program, and with aot=true one that AOTInductor compiled
for this machine. The graph holds the normalisation and the whole chain: from ``noise`` [S + 1, B, Th, Da], standard
normal, and raw observations to the raw actions [B, Ta, Da] that they lead to, without exploration. B is free.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeAlias
from unittest.mock import patch

from omegaconf import MISSING

from dppo_fast.cli import command_main
from dppo_fast.types import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    Run: TypeAlias = Callable[..., Tensor]

EXAMPLES = 3
"""The batch that is traced and compared; 1 would be taken for a constant."""


@dataclass
class ExportConfig:
    """``device``: where a ``.pt2`` program will run."""

    checkpoint: str = MISSING
    out: str = MISSING
    aot: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        suffix = Path(self.out).suffix
        if suffix not in (".onnx", ".pt2"):
            raise UserError(f"out={self.out}: the name must end with .onnx or .pt2")
        if self.aot and suffix == ".onnx":
            raise UserError(f"aot=true compiles a .pt2 program, out={self.out} is none")


def export(config: ExportConfig) -> float:
    """Write the file, run it, and return by how much its actions are off the policy's, relative to the largest.

    Raises UserError where the policy is no diffusion policy, or a package, a compiler or the right to write is missing.
    """
    import torch

    from dppo_fast.config import naming
    from dppo_fast.deploy import WholeChain, load_policy

    out = Path(config.out)
    _require_tools(out, config.aot)
    with naming("checkpoint"):
        chain = WholeChain(load_policy(config.checkpoint, config.device))
    inputs = chain.example(EXAMPLES)
    batch = torch.export.Dim("batch")
    free = ({1: batch}, tuple({0: batch} for _ in chain.names[1:]))
    with patch.dict(os.environ, DPPO_FAST_BACKEND="reference"), torch.no_grad():
        expected = chain(*inputs)
        program = torch.export.export(chain, inputs, dynamic_shapes=free)
    write = _write_onnx if out.suffix == ".onnx" else _compile if config.aot else _write_program
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent) as scratch:
            draft = Path(scratch, out.name)
            write(program, inputs, chain.names, draft)
            actions = _open(draft, config.aot)(*inputs)
            os.replace(draft, out)
    except OSError as error:
        raise UserError(f"out={out} is not writable ({error.strerror}); choose another file") from error
    off = float((actions - expected).abs().max() / expected.abs().max())
    for name, value in zip((*chain.names, "action"), (*inputs, expected), strict=True):
        print(f"  {name}: {str(value.dtype).removeprefix('torch.')} {list(value.shape)} where B = {EXAMPLES}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; its actions are the policy's to {off:.1g}")
    return off


def _require_tools(out: Path, aot: bool) -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
    if out.suffix == ".onnx" and missing:
        raise UserError(f"out={out}: ONNX needs {', '.join(missing)}: pip install 'dppo-fast[export]'")
    if aot and not (which(os.environ.get("CXX", "g++")) or which("clang++")):
        raise UserError("aot=true: AOTInductor needs a C++ compiler; install g++, or leave it out")


def _write_program(program: ExportedProgram, inputs: tuple[Tensor, ...], names: Sequence[str], path: Path) -> None:
    import torch

    torch.export.save(program, path)


def _compile(program: ExportedProgram, inputs: tuple[Tensor, ...], names: Sequence[str], path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path))


def _write_onnx(program: ExportedProgram, inputs: tuple[Tensor, ...], names: Sequence[str], path: Path) -> None:
    import torch

    graph = torch.onnx.export(  # its optimizer drops factors that are only almost 1
        program, inputs, input_names=list(names), output_names=["action"], dynamo=True, optimize=False, verbose=False
    )
    assert graph is not None
    graph.save(path)


def _open(path: Path, aot: bool) -> Run:
    """What runs the file."""
    import torch

    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; it warns of every constant that it does not fold
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]

        def run(*inputs: Tensor) -> Tensor:
            feeds = {name: value.numpy(force=True) for name, value in zip(names, inputs, strict=True)}
            return torch.from_numpy(session.run(None, feeds)[0]).to(inputs[0].device)

        return run
    if aot:
        from torch._inductor import aoti_load_package

        package: Run = aoti_load_package(str(path))
        return package
    return torch.export.load(path).module()


def main(arguments: Sequence[str] | None = None) -> int:
    return command_main(ExportConfig, export, sys.argv[1:] if arguments is None else arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
