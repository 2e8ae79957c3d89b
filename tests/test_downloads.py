"""Published files, from a server on this machine that plays Google Drive."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from dppo_fast import downloads
from dppo_fast.config import resolve_path
from dppo_fast.types import UserError
from tests.runs import train

CONTENT = bytes(range(256)) * 4096
"""A megabyte."""

PLACES = {"data/task/train.npz": "folders/FOLDER", "data/task/normalization.npz": "file/FILE", "log/x.pt": "file/FILE"}
FOLDER = """<div class="flip-entry" id="entry-OTHER"><div class="flip-entry-title">notes.txt</div></div>
<div class="flip-entry" id="entry-FILE" role="link"><a><div class="flip-entry-title">train.npz</div></a></div>"""
CONFIRM = """<form id="download-form" action="/download" method="get"><input type="hidden" name="id" value="FILE">
<input type="hidden" name="export" value="download"><input type="hidden" name="uuid" value="a&amp;b"></form>"""
QUOTA = "<title>Google Drive - Quota exceeded</title>Too many users have viewed or downloaded this file recently."


class Host:
    """Answers with `CONTENT`, but for what a test changes; ``requests`` are what it was asked, with the Range."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None]] = []
        self.confirm = False
        self.page: str | None = None
        self.status = 200
        self.ranges = True
        self.cut: list[int] = []
        """After how many bytes each of the next answers breaks off."""
        self.delay = 0.0
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.answer(self)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        url, wanted = urlparse(to.path), to.headers.get("Range")
        query = parse_qs(url.query)
        self.requests.append((to.path, wanted))
        time.sleep(self.delay)
        if self.status != 200:
            to.send_error(self.status)
        elif url.path == "/embeddedfolderview":
            self._page(to, FOLDER if query["id"] == ["FOLDER"] else "")
        elif self.page is not None:
            self._page(to, self.page)
        elif self.confirm and query.get("uuid") != ["a&b"]:
            self._page(to, CONFIRM)
        else:
            self._content(to, wanted if self.ranges else None)

    def _page(self, to: BaseHTTPRequestHandler, text: str) -> None:
        to.send_response(200)
        to.send_header("Content-Type", "text/html; charset=utf-8")
        to.end_headers()
        to.wfile.write(text.encode())

    def _content(self, to: BaseHTTPRequestHandler, wanted: str | None) -> None:
        start = 0 if wanted is None else int(wanted.removeprefix("bytes=").rstrip("-"))
        if wanted is not None and start >= len(CONTENT):
            to.send_response(416)
            to.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            to.send_header("Content-Length", "0")
            to.end_headers()
            return
        to.send_response(200 if wanted is None else 206)
        to.send_header("Content-Type", "application/octet-stream")
        to.send_header("Content-Length", str(len(CONTENT) - start))
        to.end_headers()
        length = self.cut.pop(0) if self.cut else len(CONTENT)
        to.wfile.write(CONTENT[start : start + length])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    host = Host()
    monkeypatch.setattr(downloads, "PAGES", host.url)
    monkeypatch.setattr(downloads, "CONTENT", host.url)
    monkeypatch.setattr(downloads, "_places", lambda: PLACES)
    for variable in downloads.ROOTS.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    yield host
    host.server.shutdown()
    host.server.server_close()


FILE, PART, NOTE = (Path(f"data/task/normalization.npz{suffix}") for suffix in ("", ".part", ".sha256"))


def fetch_file() -> None:
    assert resolve_path(str(FILE)) == str(FILE)
    assert FILE.read_bytes() == CONTENT
    assert not PART.exists()


def test_a_missing_file_is_downloaded_once(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    fetch_file()
    fetch_file()
    assert len(host.requests) == 1
    assert capsys.readouterr().err == f"downloading {FILE} from {host.url}/file/d/FILE/view\n"
    assert NOTE.read_text() == f"{hashlib.sha256(CONTENT).hexdigest()}  normalization.npz\n"


def test_a_file_in_a_folder(host: Host) -> None:
    resolve_path("data/task/train.npz")
    assert Path("data/task/train.npz").read_bytes() == CONTENT
    assert [path.partition("&")[0] for path, _ in host.requests] == [
        "/embeddedfolderview?id=FOLDER",
        "/download?id=FILE",
    ]


def test_the_page_that_asks_to_confirm(host: Host) -> None:
    host.confirm = True
    fetch_file()
    assert host.requests[1][0] == "/download?id=FILE&export=download&uuid=a%26b"


def test_what_broke_off_goes_on_where_it_stopped(host: Host) -> None:
    host.confirm, host.cut = True, [300_000, 400_000]
    fetch_file()
    assert [wanted for path, wanted in host.requests if "uuid" in path] == [None, "bytes=300000-", "bytes=700000-"]


def test_a_run_that_was_stopped_goes_on_in_the_next(host: Host) -> None:
    host.cut = [300_000, 0]
    with pytest.raises(UserError, match=r"broke off after 300,000 bytes .* run again to continue .*/file/d/FILE/view"):
        resolve_path(str(FILE))
    assert not FILE.exists()
    fetch_file()
    assert host.requests[-1][1] == "bytes=300000-"


def test_a_host_without_ranges_sends_it_all_again(host: Host) -> None:
    host.ranges, host.cut = False, [300_000]
    fetch_file()


@pytest.mark.parametrize("arrived", [len(CONTENT), len(CONTENT) + 7])
def test_a_part_that_is_complete_or_too_long(arrived: int, host: Host) -> None:
    FILE.parent.mkdir(parents=True)
    PART.write_bytes((CONTENT + bytes(7))[:arrived])
    fetch_file()
    assert len(host.requests) == (1 if arrived == len(CONTENT) else 2)


def test_a_changed_file_is_noticed(host: Host) -> None:
    fetch_file()
    FILE.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(UserError, match=r"normalization.npz has changed since its first use.* delete it to download"):
        resolve_path(str(FILE))
    FILE.unlink()
    fetch_file()


def test_a_file_of_one_s_own_is_left_alone(host: Host) -> None:
    FILE.parent.mkdir(parents=True)
    for content in (b"mine", b"mine, too"):
        FILE.write_bytes(content)
        resolve_path(str(FILE))
    assert not NOTE.exists()
    assert host.requests == []


def test_other_folders(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DPPO_DATA_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DPPO_LOG_DIR", "logs")
    for path in (f"{tmp_path}/elsewhere/task/normalization.npz", "logs/x.pt"):
        resolve_path(path)
        assert Path(path).read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["data/task/other.npz", "elsewhere/task/train.npz", "none", "runs/x"])
def test_what_is_not_published_is_left_alone(path: str, host: Host) -> None:
    assert resolve_path(path) == path
    assert host.requests == []


def off(host: Host) -> None:
    host.server.shutdown()
    host.server.server_close()


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (off, "Connection refused"),
        (lambda host: setattr(host, "status", 404), "HTTP 404 Not Found"),
        (lambda host: setattr(host, "status", 503), "HTTP 503 Service Unavailable"),
        (lambda host: setattr(host, "page", QUOTA), "quota for it is used up for now, try again in a day"),
        (lambda host: setattr(host, "page", "<h1>Sign in</h1>"), "the host sent a web page"),
        (lambda host: setattr(host, "page", CONFIRM), "asks to confirm again and again"),
    ],
)
def test_what_cannot_be_had_says_where_to_get_it(trouble: Callable[[Host], None], reason: str, host: Host) -> None:
    trouble(host)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        resolve_path(str(FILE))
    assert time.monotonic() - start < 5
    assert str(error.value).endswith(
        f"{reason}): get normalization.npz from {host.url}/file/d/FILE/view and put it at {FILE}"
    )
    assert not Path("data").exists()


def test_a_folder_without_the_file(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_places", lambda: {"data/task/other.npz": "folders/FOLDER"})
    with pytest.raises(UserError, match=r"its folder lists notes.txt, train.npz\): get other.npz from"):
        resolve_path("data/task/other.npz")


def test_a_folder_that_cannot_be_written(host: Host) -> None:
    Path("data").write_text("a file")
    with pytest.raises(UserError, match=r"missing and could not be downloaded \(Not a directory\)"):
        resolve_path(str(FILE))


def test_two_at_once_download_it_once(host: Host) -> None:
    host.delay = 0.2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(resolve_path, [str(FILE)] * 2))
    assert FILE.read_bytes() == CONTENT
    assert len(host.requests) == 1


def test_a_run_offline_says_what_it_lacks(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    off(host)
    assert train("cfg=quickstart", f"env.normalization={FILE}", "device=cpu") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: env.normalization: {FILE} is missing and could not be downloaded (")
    assert not Path("runs").exists()
