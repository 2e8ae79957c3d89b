"""The reference's published files, downloaded when a run needs one that is missing.

`assets/published.json` tells which are: path under DPPO_DATA_DIR (``data/``) or DPPO_LOG_DIR (``log/``) -> where it
lies on Google Drive, ``file/<id>``, or ``folders/<id>`` for a folder that holds a file of that name. Downloads resume
where they stopped, appear whole or not at all, and leave a ``.sha256`` beside them, to which every later use is held.
"""

from __future__ import annotations

import hashlib
import html
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dppo_fast.runtime.files import atomic_write
from dppo_fast.types import UserError

PAGES = "https://drive.google.com"
CONTENT = "https://drive.usercontent.google.com"
ROOTS = {"data": "DPPO_DATA_DIR", "log": "DPPO_LOG_DIR"}
"""Default folder -> the environment variable that names another."""

TIMEOUT = 20.0
"""Seconds of silence after which a connection counts as broken."""

ATTEMPTS = 5
BLOCK = 1 << 20


class Published(NamedTuple):
    """A file that belongs at ``path`` and lies at ``place``."""

    path: Path
    place: str

    @property
    def link(self) -> str:
        """What a browser opens."""
        kind, _, key = self.place.partition("/")
        return f"{PAGES}/drive/folders/{key}" if kind == "folders" else f"{PAGES}/file/d/{key}/view"

    def error(self, reason: object) -> UserError:
        return UserError(
            f"{self.path} is missing and could not be downloaded ({reason}): get {self.path.name} from {self.link} and "
            f"put it at {self.path}"
        )


class _Interrupted(Exception):
    """The connection broke; what has arrived is kept."""


def fetch(path: str) -> str:
    """``path``; where that is a published file it is downloaded if missing, and what was downloaded is checked.

    Raises UserError where it cannot be had, or is no longer what it was at first.
    """
    published = _published(Path(path))
    if published is None:
        return path
    new = not published.path.exists()
    if new:
        _download(published)
    _check(published.path, new)
    return path


def _published(path: Path) -> Published | None:
    for folder, variable in ROOTS.items():
        root = Path(os.environ.get(variable, folder))
        if path.is_relative_to(root) and (place := _places().get(f"{folder}/{path.relative_to(root).as_posix()}")):
            return Published(path, place)
    return None


@cache
def _places() -> dict[str, str]:
    file = resources.files("dppo_fast") / "assets" / "published.json"
    places: dict[str, str] = json.loads(file.read_text())
    return places


def _check(path: Path, new: bool) -> None:
    """Note the checksum of a ``new`` file, and hold it to that later; files from elsewhere have none."""
    note = path.with_name(f"{path.name}.sha256")
    if not new and not note.exists():
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if new:
        with atomic_write(note) as out:
            out.write(f"{digest}  {path.name}\n".encode())
    elif note.read_text().split()[:1] != [digest]:
        raise UserError(
            f"{path} has changed since its first use, it does not have the checksum in {note.name}; delete it to "
            f"download it again, or {note.name} if it is meant to be another"
        )


def _download(file: Published) -> None:
    print(f"downloading {file.path} from {file.link}", file=sys.stderr)
    part = file.path.with_name(f"{file.path.name}.part")
    new = [folder for folder in file.path.parents if not folder.exists()]
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as out, _alone(out):
            if not file.path.exists():  # else another process was faster
                _complete(file, out)
                part.replace(file.path)
    except urllib.error.HTTPError as error:
        raise file.error(f"HTTP {error.code} {error.reason}") from error
    except OSError as error:  # among them no network, a full disk
        reason = getattr(error, "reason", error)
        raise file.error(getattr(reason, "strerror", None) or reason) from error
    finally:
        with suppress(OSError):  # leave nothing where nothing came
            if part.stat().st_size == 0:
                part.unlink()
                for folder in new:
                    folder.rmdir()


def _complete(file: Published, out: BinaryIO) -> None:
    """Append what is left of ``file`` to ``out``, also across broken connections."""
    url = _address(file)
    for attempt in range(ATTEMPTS):
        before = out.tell()
        try:
            _receive(file, url, out)
            break
        except _Interrupted as error:
            if attempt == ATTEMPTS - 1 or out.tell() == before:
                raise UserError(
                    f"{file.path}: the download broke off after {out.tell():,} bytes ({error}); run again to continue "
                    f"it, or put {file.path.name} from {file.link} there"
                ) from error
    out.flush()
    os.fsync(out.fileno())


@contextmanager
def _alone(file: BinaryIO) -> Iterator[None]:
    """Let other processes that want the same file wait."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _address(file: Published) -> str:
    """Where the content of ``file`` comes from, its folder searched."""
    kind, _, key = file.place.partition("/")
    if kind == "folders":
        with _open(f"{PAGES}/embeddedfolderview?id={key}") as page:
            text = page.read().decode(errors="replace")
        entries = re.findall(r'id="entry-([\w-]+)".*?flip-entry-title">([^<]*)<', text, re.DOTALL)
        keys = {html.unescape(name).strip(): entry for entry, name in entries}
        if file.path.name not in keys:
            raise file.error(f"its folder lists {', '.join(keys) or 'nothing'}")
        key = keys[file.path.name]
    return f"{CONTENT}/download?id={key}&export=download&confirm=t"


def _receive(file: Published, url: str, out: BinaryIO) -> None:
    """Append what is left of ``file`` to ``out``."""
    try:
        response = _content(file, url, out.tell())
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(out.tell()):
            return  # it had all arrived
        response = _content(file, url, 0)
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            out.truncate(0)
            out.seek(0)
        length = response.headers.get("Content-Length")
        total = None if length is None else out.tell() + int(length)
        with _progress(file.path.name, out.tell(), total) as advance:
            try:
                while block := response.read(BLOCK):
                    out.write(block)
                    advance(len(block))
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                raise _Interrupted(str(error) or type(error).__name__) from error
            finally:
                out.flush()
        if total is not None and out.tell() != total:
            raise _Interrupted(f"{total:,} were announced")


def _content(file: Published, url: str, start: int) -> Any:
    """The response that holds the file's bytes from ``start`` on, past the page that asks to confirm."""
    response = _open(url, start)
    if response.headers.get_content_type() != "text/html":
        return response
    with response:
        page = response.read().decode(errors="replace")
    form = re.search(r'<form[^>]*action="([^"]*)"', page)
    if form is None:
        quota = re.search(r"quota|too many users", page, re.IGNORECASE)
        raise file.error(
            "the host's quota for it is used up for now, try again in a day" if quota else "the host sent a web page"
        )
    fields = re.findall(r'<input[^>]*name="([^"]*)"[^>]*value="([^"]*)"', page)
    query = urllib.parse.urlencode([(name, html.unescape(value)) for name, value in fields])
    response = _open(f"{urllib.parse.urljoin(url, html.unescape(form[1]))}?{query}", start)
    if response.headers.get_content_type() == "text/html":
        response.close()
        raise file.error("the host asks to confirm again and again")
    return response


def _open(url: str, start: int = 0) -> Any:
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0", **headers})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


@contextmanager
def _progress(name: str, done: int, total: int | None) -> Iterator[Any]:
    """A bar where there is a terminal; gives what advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, completed=done, total=total)
        yield lambda count: bar.advance(task, count)
