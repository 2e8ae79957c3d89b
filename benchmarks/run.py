"""Time ops against their references, one CSV row per op, backend and shape; plots are made from the file alone.

    python -m benchmarks.run --op gae --device cpu
    python -m benchmarks.run --device cuda --shape hopper furniture --out benchmarks/results/ops.csv

An op whose tests fail on this machine gets no number. ``ceiling_percent`` compares the median with the time that the
op's bytes and operations need at the rates that a copy and a matrix product reached when the run started; on a CPU,
whose caches are warm, it can exceed 100.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.inputs import SHAPES
from benchmarks.registry import BACKENDS, COMPILED, OPS, tensors
from benchmarks.report import ROOT, environment, write_csv
from benchmarks.timing import Ceiling, measure, measure_ceiling

DEFAULT_BACKENDS = {"cpu": ("reference", "native"), "cuda": ("reference", COMPILED, "triton")}


@dataclass(frozen=True)
class Row:
    """What is measured of one op, backend and shape; with `environment` these are the CSV's columns."""

    op: str
    backend: str
    shape: str
    dtype: str
    verified: bool
    p20_us: float
    p50_us: float
    p80_us: float
    bytes: int
    flops: int
    gb_s: float
    tflop_s: float
    ceiling_percent: float


def run_tests(tests: str) -> bool:
    """Whether the pytest nodes ``tests`` pass; what they print goes to stderr where they do not."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        print(result.stdout, file=sys.stderr)
    return result.returncode == 0


def measure_op(
    name: str, backend: str, shape: str, device: torch.device, ceiling: Ceiling, seconds: float, verified: bool
) -> Row:
    op, sizes = OPS[name], SHAPES[shape]
    torch.manual_seed(0)
    arguments = op.arguments(sizes, device)
    call = op.call(arguments, backend)
    result = call()
    traffic, flops = op.traffic(arguments, result), op.flops(sizes)
    timing = measure(call, device, seconds)
    median = timing.p50_us * 1e-6
    return Row(
        op=name,
        backend=backend,
        shape=shape,
        dtype=str(next(tensors(result)).dtype).removeprefix("torch."),
        verified=verified,
        **timing._asdict(),
        bytes=traffic,
        flops=flops,
        gb_s=traffic / median / 1e9,
        tflop_s=flops / median / 1e12,
        ceiling_percent=100 * ceiling.seconds(traffic, flops) / median,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 if an op got no number because its tests fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["hopper"])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: those for the device")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed per row")
    parser.add_argument("--no-verify", action="store_true", help="for development; the rows say so")
    parser.add_argument("--out", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    backends = options.backend or DEFAULT_BACKENDS[options.device.type]
    untrusted = [name for name in options.op if not options.no_verify and not run_tests(OPS[name].tests)]
    for name in untrusted:
        print(f"{name}: no number, because its tests fail: pytest {OPS[name].tests}", file=sys.stderr)

    def rows() -> Iterator[dict[str, object]]:
        ceiling = measure_ceiling(options.device, options.seconds)
        for name, backend in itertools.product(options.op, backends):
            if name in untrusted or backend not in OPS[name].backends:
                continue
            if obstacle := OPS[name].obstacle(backend, options.device):
                print(f"{name}: {obstacle}", file=sys.stderr)
                continue
            for shape in options.shape:
                row = measure_op(name, backend, shape, options.device, ceiling, options.seconds, not options.no_verify)
                yield asdict(row)

    write_csv(rows(), environment(options.device), options.out)
    return 1 if untrusted else 0


if __name__ == "__main__":
    sys.exit(main())
