"""The report on runs: what is grouped, what is drawn, and, where there is a Chromium, that it works in a browser."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dppo_fast.report.__main__ import main
from dppo_fast.report.charts import DRAWN_POINTS, Axis, bar_chart, short
from dppo_fast.report.page import render
from dppo_fast.report.runs import Run, group_runs, read_run

Row = dict[str, Any]


def rows(seed: int = 0, count: int = 5, **more: float) -> list[Row]:
    """Fine-tuning that evaluates in every second iteration, an iteration taking 10 s and 1000 env steps."""
    evaluation = {"eval/return": 100.0 + 2 * seed, "eval/return_std": 50.0, "eval/episodes": 25.0}
    made: list[Row] = [{"iteration": 0, "env_steps": 0, **evaluation, "time/evaluate": 5.0}]
    for i in range(1, count):
        row = {"iteration": i, "env_steps": 1000 * i, "train/return": 90.0 * i + seed, "train/nan_count": 0.0}
        row |= {"ppo/approx_kl": 1e-5 * (i + 1), "ppo/clip_fraction": 0.1 / i, "critic/explained_variance": 1 - 1 / i}
        row |= {
            "loss/value": 1.0 / i,
            "lr/actor": 1e-4,
            "steps_per_second": 100.0,
            "time/collect": 2.0,
            "time/update": 8.0,
        }
        if i % 2 == 0:
            row |= evaluation | {"eval/return": 100.0 * i + 2 * seed}
        made.append(row | more)
    return made


def write(folder: Path, seed: int = 0, metrics: list[Row] | None = None, **settings: Any) -> Path:
    """A run directory."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "logdir": str(folder), "env": {"id": "Hopper-v4"}, "algorithm": {"name": "dppo"}}
    config["algorithm"] |= {"gamma": 0.99, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = (json.dumps(row) + "\n" for row in (rows(seed) if metrics is None else metrics))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def groups_of(*folders: Path) -> dict[str, list[str]]:
    """Label -> names of the runs' directories."""
    return {group.label: [run.path.name for run in group.runs] for group in group_runs([read_run(f) for f in folders])}


def test_runs_that_differ_only_by_their_seed_are_one(tmp_path: Path) -> None:
    a = [write(tmp_path / f"a{seed}", seed) for seed in range(2)]
    b = [write(tmp_path / f"b{seed}", seed, gamma=0.9) for seed in range(2)]
    assert groups_of(a[0], b[0], a[1], b[1]) == {"gamma 0.99": ["a0", "a1"], "gamma 0.9": ["b0", "b1"]}


def test_a_repeated_seed_is_not_another_sample(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1), ("fault", 0))]
    assert groups_of(*folders) == {"a, b": ["a", "b"], "fault": ["fault"]}


def test_many_differences_leave_the_directories_as_names(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"{i}" / "run", 0, gamma=0.1 * i, x=i, y=i) for i in range(2)]
    assert list(groups_of(*folders)) == ["0/run", "1/run"]
    assert list(groups_of(folders[0])) == ["run"]


def made(metrics: list[Row], seed: int = 0) -> Run:
    return Run(Path(f"/runs/{seed}"), metrics, {"seed": seed})


def test_the_band_of_seeds() -> None:
    """The mean over the steps that all cover, interpolated, from the lowest to the highest."""
    x = [[0, 2, 4], [1, 3]]
    y = [[0.0, 2.0, 8.0], [20.0, 40.0]]
    runs = [
        made([{"iteration": i, "env_steps": s, "eval/return": r} for i, (s, r) in enumerate(zip(*xy, strict=True))], n)
        for n, xy in enumerate(zip(x, y, strict=True))
    ]
    (group,) = group_runs(runs)
    band = group.band("env_steps", "eval/return")
    assert band is not None
    np.testing.assert_array_equal(band.x, [1, 2, 3])
    np.testing.assert_array_equal(band.low, [1, 2, 5])
    np.testing.assert_array_equal(band.high, [20, 30, 40])
    np.testing.assert_array_equal(band.mean, [10.5, 16, 22.5])
    assert group.band("env_steps", "train/return") is None


def test_the_band_of_one_run_is_its_evaluations_interval() -> None:
    metrics: list[Row] = [
        {"iteration": i, "eval/return": 10.0, "eval/return_std": 5.0, "eval/episodes": 25.0} for i in range(2)
    ]
    (group,) = group_runs([made(metrics)])
    band = group.band("iteration", "eval/return")
    assert band is not None
    np.testing.assert_allclose([band.low, band.high], [[8.04] * 2, [11.96] * 2])
    unevaluated = made([{"iteration": 0}], seed=1)
    (both,) = group_runs([unevaluated, made(metrics)])
    band = both.band("iteration", "eval/return")
    assert band is not None
    np.testing.assert_allclose([band.low, band.high], [[8.04] * 2, [11.96] * 2])
    (without,) = group_runs([made([{**metrics[0], "eval/episodes": None or np.nan}])])
    band = without.band("iteration", "eval/return")
    assert band is not None
    assert band.low == band.high == 10


def test_the_clocks_add_up_the_phases() -> None:
    run = made(rows())
    np.testing.assert_allclose(run.column("minutes"), np.array([5, 15, 25, 35, 45]) / 60)
    np.testing.assert_allclose(run.column("hours"), run.column("minutes") / 60)
    assert run.phases() == {"evaluate": 5 / 4, "collect": 2.0, "update": 8.0}


@given(low=st.floats(-1e6, 1e6), spread=st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_inside(low: float, spread: float) -> None:
    axis = Axis(np.array([low, low + spread]), 0.0, 100.0)
    assert 1 <= len(axis.ticks) <= 8
    positions = axis(axis.ticks)
    assert (positions >= -0.1).all()
    assert (positions <= 100.1).all()
    if len(axis.ticks) > 1:
        step = axis.ticks[1] - axis.ticks[0]
        assert np.allclose(np.array(axis.ticks) / step, np.round(np.array(axis.ticks) / step), atol=1e-3)


def test_a_log_axis_has_powers_of_ten() -> None:
    axis = Axis(np.array([2e-5, 0.3]), 0.0, 100.0, log=True)
    assert axis.ticks == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert np.diff(axis(axis.ticks)) == pytest.approx(100 / np.log10(0.3 / 2e-5))
    assert 7 in Axis(np.array([7.0]), 0.0, 1.0).ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (80_000, "80 k"), (1_280_000, "1.28 M"), (-0.5, "-0.5"), (2.5e-4, "2.5e-4"), (3e-11, "3e-11")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_bars_are_as_long_as_their_share() -> None:
    figure = bar_chart("Seconds", {"a": {"collect": 1.0, "update": 3.0}, "b": {"update": 2.0}}, "s")
    bars = re.findall(r'<rect class="(c\d)" x="([\d.]+)" .*?width="([\d.]+)"', figure)
    assert bars == [("c4", "0.0", "140.0"), ("c5", "140.0", "420.0"), ("c5", "0.0", "280.0")]


def test_a_long_curve_keeps_its_extremes(tmp_path: Path) -> None:
    metrics = rows(count=5000)
    metrics[1234]["train/return"] = 1e7
    page = render(group_runs([read_run(write(tmp_path / "run", metrics=metrics))]), 0)
    shown = [data["lines"][0]["points"] for data in charts(page)]
    assert max(map(len, shown)) <= DRAWN_POINTS
    assert ["1.234 M", "1.00e+07"] in [point[2:] for points in shown for point in points]


def charts(page: str) -> list[Any]:
    """What the page's script reads of each chart."""
    return [json.loads(data) for data in re.findall(r'<script type="application/json">(.*?)</script>', page)]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Of two settings, the first one with two seeds and a video."""
    folders = [write(tmp_path / f"a{seed}", seed) for seed in range(2)]
    folders.append(write(tmp_path / "b", 0, gamma=0.9, extra="</script><script>alert(1)</script>"))
    (folders[0] / "videos").mkdir()
    for i in range(3):
        (folders[0] / "videos" / f"film{i}.mp4").write_bytes(b"film" + bytes([i]))
        os.utime(folders[0] / "videos" / f"film{i}.mp4", (i, i))
    page = tmp_path / "report.html"
    assert main([*map(str, folders), f"out={page}", "videos=2"]) == 0
    return page


def test_the_page_needs_nothing_else(report: Path) -> None:
    page = report.read_text()
    assert "default-src 'none'" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    targets = {link[1:] for link in links if link.startswith("#")}
    assert targets == set(re.findall(r'<section id="([^"]+)"', page))
    assert targets == {"results", "learning", "time", "health", "settings", "videos", "more-metrics"}


def test_the_page_says_it_all(report: Path) -> None:
    page = report.read_text()
    captions = re.findall(r"<figcaption>(.*?) <small>(.*?)</small>", page)
    for title in ("Evaluation return", "Training return"):
        assert (title, "over environment steps") in captions
        assert (title, "over minutes") in captions
    for title in ("KL divergence", "Clip fraction", "Explained variance"):
        assert (title, "over environment steps") in captions
    assert "NaN counter is 0 throughout." in page
    (evaluation, *_) = charts(page)
    assert [line["label"] for line in evaluation["lines"]] == ["a0, a1", "b"]
    assert [point[2:] for point in evaluation["lines"][0]["points"]] == [
        ["0", "101 (100 to 102)"], ["2 k", "201 (200 to 202)"], ["4 k", "401 (400 to 402)"]
    ]  # fmt: skip
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"Hopper-v4, dppo\s+3 runs in 2 curves", text)
    assert re.search(r"algorithm.gamma\s+0.99\s+0.9\s", text), "what the settings differ in"
    assert re.search(r"algorithm.name\s+dppo\s", text), "and what they share"
    assert page.count(">algorithm.gamma<") == 1
    assert "<script>alert" not in page
    films = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    assert [base64.b64decode(film) for film in films] == [b"film\x01", b"film\x02"], "the newest two"


def test_pretraining_has_a_page_as_well(tmp_path: Path) -> None:
    metrics = [{"iteration": i, "loss/bc": 0.5**i, "time/update": 3600.0} for i in range(9)]
    page = render(group_runs([read_run(write(tmp_path / "run", metrics=metrics))]), 4)
    captions = re.findall(r"<figcaption>(.*?) <small>(.*?)</small>", page)
    assert ("Behaviour-cloning loss", "over iteration, log scale") in captions
    assert ("Behaviour-cloning loss", "over hours, log scale") in captions
    assert "Not logged by these runs: KL divergence, Clip fraction, Explained variance, NaN counter." in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "runs is missing"),
        ("/nope", "/nope: not a run directory, it holds no config.yaml"),
        ("{good} {bare}", "bare: not a run directory"),
        ("{empty}", "empty: metrics.jsonl is empty; the run has not logged anything yet"),
        ("{gone}", "gone/metrics.jsonl: cannot read these metrics"),
        ("{torn}", "torn/metrics.jsonl, line 1: not a row of metrics"),
        ("{broken}", "broken/config.yaml: not readable"),
        ("{listed}", "listed/config.yaml: not a configuration"),
        ("{good} out={good}/no/report.html", "out=.*report.html is not writable"),
        ("{good} videos=-1", r"videos=-1 must lie in \[0, inf\)"),
        ("{good} --dark", "--dark: not of the form key=value"),
    ],
)
def test_mistakes(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("good", "bare", "empty", "gone", "torn", "broken", "listed")
    folders = {name: write(tmp_path / name) for name in names}
    (folders["bare"] / "config.yaml").unlink()
    (folders["empty"] / "metrics.jsonl").write_text("")
    (folders["gone"] / "metrics.jsonl").unlink()
    (folders["torn"] / "metrics.jsonl").write_text("nonsense\n")
    (folders["broken"] / "config.yaml").write_text("a: [1")
    (folders["listed"] / "config.yaml").write_text("- 1")
    out = [] if "out=" in arguments else [f"out={tmp_path}/report.html"]
    assert main([*arguments.format(**folders).split(), *out]) == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.html"))


def chromium() -> str | None:
    """A headless Chromium: DPPO_FAST_CHROMIUM, one that is installed, or Playwright's."""
    names = (
        "chromium",
        "chromium-headless-shell",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
        "chrome",
    )
    downloaded = Path.home().glob(".cache/ms-playwright/chromium*/*/*")
    found = [os.environ.get("DPPO_FAST_CHROMIUM"), *map(shutil.which, names)]
    found += [str(file) for file in downloaded if file.name in ("chrome", "headless_shell", "chrome-headless-shell")]
    return next(filter(None, found), None)


LOOK = """
<script>
const visible = element => { const box = element.getBoundingClientRect(); return box.width > 100 && box.height > 50; };
const figures = [...document.querySelectorAll("section:not(#more-metrics) figure")];
const chart = document.querySelector("figure.chart"), svg = chart.querySelector("svg");
const box = svg.getBoundingClientRect();
const point = {clientX: box.left + .95 * box.width, clientY: box.top + 50, bubbles: true};
svg.dispatchEvent(new PointerEvent("pointermove", point));
const reading = chart.querySelector(".reading").innerText;
svg.dispatchEvent(new PointerEvent("pointerleave", point));
document.querySelector("button[data-group='0']").click();
const curves = [...document.querySelectorAll("g.curve")];
document.body.dataset.seen = JSON.stringify({
  figures: figures.filter(visible).length,
  drawn: curves.filter(curve => curve.querySelector(".line").getTotalLength() > 50).length,
  curves: curves.length,
  reading,
  left: chart.querySelector(".reading").getBoundingClientRect().width,
  hidden: curves.filter(curve => getComputedStyle(curve).display === "none").map(curve => curve.dataset.group),
  pressed: [...document.querySelectorAll("button[data-group]")].map(button => button.getAttribute("aria-pressed")),
  overflow: document.documentElement.scrollWidth - innerWidth,
  requests: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
  background: getComputedStyle(document.body).backgroundColor,
  colours: new Set(curves.map(curve => getComputedStyle(curve.querySelector(".line")).stroke)).size,
});
</script>
"""


def browse(browser: str, page: Path, width: int, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """What the page looks like in a window of this width, and what the browser's console says."""
    page.with_name("looked_at.html").write_text(page.read_text().replace("</body>", LOOK + "</body>"))
    command: Sequence[str] = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", *flags),
        *("--dump-dom", f"--window-size={width},900", page.with_name("looked_at.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return json.loads(html.unescape(seen[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(chromium() is None, reason="no Chromium found; install one or set DPPO_FAST_CHROMIUM to its path")
@pytest.mark.parametrize(
    ("width", "dark", "background"), [(1280, False, "rgb(255, 255, 255)"), (500, True, "rgb(20, 22, 26)")]
)
def test_in_a_browser(report: Path, width: int, dark: bool, background: str) -> None:
    browser = chromium()
    assert browser is not None
    seen, console = browse(browser, report, width, *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    films = [line for line in console if "video" in line.lower()]
    assert console == films, "no errors, but for the films, which are none"
    assert seen["figures"] == 4 + 1 + 3 + 2, "learning, time, health, videos"
    assert seen["drawn"] > 12
    assert re.fullmatch(r"4 k environment steps\n■ a0, a1 401 \(400 to 402\)\n■ b 400 \(380 to 420\)", seen["reading"])
    assert seen["left"] == 0, "the reading goes when the pointer does"
    assert set(seen["hidden"]) == {"0"}
    assert seen["pressed"] == ["false", "true"]
    assert seen["overflow"] <= 0
    assert seen["requests"] == 0
    assert seen["background"] == background
    assert seen["colours"] == 2
