"""The metrics files of a run directory: ``metrics.jsonl``, the truth, and ``metrics.csv``, made from it."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import TypeAlias

from dppo_fast.runtime.files import atomic_write
from dppo_fast.types import UserError

Row: TypeAlias = dict[str, float]
"""One iteration. The files hold no NaN and no Inf: either is written as null or an empty cell, and read as NaN."""


class MetricsFiles:
    """Writes both files; ``resumed`` are the rows that were there and stay.

    Raises:
        UserError: ``directory`` is not writable, or holds rows and ``resume_iteration`` is None, or they are corrupt.
    """

    def __init__(self, directory: Path, resume_iteration: int | None) -> None:
        self._jsonl_path, self._csv_path = directory / "metrics.jsonl", directory / "metrics.csv"
        self.resumed: list[Row] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if resume_iteration is not None:
                self._cut(resume_iteration)
            elif self._jsonl_path.exists() and self._jsonl_path.stat().st_size > 0:
                raise UserError(
                    f"logdir={directory}: already holds the metrics of a run; choose another directory, "
                    f"or continue that run with resume={directory}"
                )
            self._jsonl = self._jsonl_path.open("ab")
            self._rewrite_csv(self.resumed)
        except OSError as error:
            raise UserError(f"logdir={directory}: cannot write there ({error.strerror}); choose another") from error
        self._last_iteration = self.resumed[-1]["iteration"] if self.resumed else -1

    def append(self, row: Row) -> None:
        """Write a row to both files."""
        assert row["iteration"] > self._last_iteration, "iterations must increase"
        self._last_iteration = row["iteration"]
        self._jsonl.write(_json_line(row))
        self._jsonl.flush()
        if row.keys() <= set(self._columns):
            self._csv.write(self._csv_lines([row]))
            self._csv.flush()
        else:
            self._csv.close()
            self._rewrite_csv(_read_jsonl(self._jsonl_path))

    def close(self) -> None:
        self._jsonl.close()
        self._csv.close()

    def _cut(self, resume_iteration: int) -> None:
        rows = _read_jsonl(self._jsonl_path) if self._jsonl_path.exists() else []
        self.resumed = [row for row in rows if row["iteration"] < resume_iteration]
        with atomic_write(self._jsonl_path) as file:
            file.writelines(map(_json_line, self.resumed))

    def _rewrite_csv(self, rows: list[Row]) -> None:
        self._columns = list(dict.fromkeys(key for row in rows for key in row))
        with atomic_write(self._csv_path) as file:
            if rows:
                file.write(_csv_line(self._columns))
                file.write(self._csv_lines(rows))
        self._csv = self._csv_path.open("ab")

    def _csv_lines(self, rows: list[Row]) -> bytes:
        return b"".join(_csv_line([_finite(row.get(key)) for key in self._columns]) for row in rows)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl`` or ``metrics.csv``; a last line cut short by a crash does not count.

    Raises:
        UserError: the file cannot be read, or a line of it is not a row of metrics.
    """
    try:
        return _read_csv(path) if path.suffix == ".csv" else _read_jsonl(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read these metrics ({error.strerror})") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            row = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
            int(row["iteration"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _corrupt(path, number) from error
        if not all(isinstance(value, int | float) for value in row.values()):
            raise _corrupt(path, number)
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    rows = []
    for number, cells in enumerate(csv.DictReader(_whole_lines(path)), start=2):
        try:
            row = {key: float(cell or "nan") for key, cell in cells.items()}
            int(row["iteration"])
        except (ValueError, TypeError, KeyError) as error:
            raise _corrupt(path, number) from error
        rows.append(row)
    return rows


def _whole_lines(path: Path) -> list[str]:
    text = path.read_text(errors="replace")
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _corrupt(path: Path, number: int) -> UserError:
    return UserError(f"{path}, line {number}: not a row of metrics; remove that line, or restore the file")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _json_line(row: Row) -> bytes:
    return json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False).encode() + b"\n"


def _csv_line(cells: list[str] | list[float | None]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
