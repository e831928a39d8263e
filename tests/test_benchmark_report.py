"""The report: its charts, and the page in a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess

import pytest

from benchmark_harness import figures, peer, result, row
from benchmarks import charts, peers, report
from benchmarks.peers import EAGER, OURS

PNG = b"\x89PNG\r\n"
CHARTS = {"speed_up", "against_floor", "memory", "launches", "history"}


def _op_row():
    op = row("a-b-b1-fp32", {OURS: figures(2e-3), EAGER: peer(4e-3, 2.0)}, suite="bn_act")
    facts = {"op": "bn_act+residual", "direction": "both", "shape": "8", "dtype": "fp32"}
    floor = {"seconds": 1e-3, "of": "bytes at copy bandwidth"}
    return op | {"id": "bn_act+residual-both-8x64x56x56-fp32", "facts": facts, "floor": floor}


def _recorded(**more):
    competitors = {
        OURS: figures(1.0, saved=60 * 2**20, launches=20),
        EAGER: peer(1.4, 1.4, saved=100 * 2**20, launches=70),
        peers.COMPILE: peer(1.05, 1.05, halves=[1.2, 0.9], tie=True),
        "a peer <nobody> knows": peer(0.9, 0.9, note="a note & more"),
    }
    network = row("resnet50-training-b8-fp32", competitors, missing={"apex": "not installed"})
    return result(network, _op_row(), **more)


def _write(path, found):
    path.write_text(json.dumps(found))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page and its charts, of two runs of one machine and an older one of another."""
    folder = tmp_path_factory.mktemp("report")
    elsewhere = _recorded(date="2026-11-01T10:00:00+00:00")
    elsewhere["machine"] = elsewhere["machine"] | {"cpu": "another CPU"}
    runs = [
        _write(folder / "b.json", _recorded(date="2026-11-22T10:00:00+00:00", commit="beef" * 10)),
        _write(folder / "a.json", _recorded()),
        _write(folder / "c.json", elsewhere),
    ]
    page, published = folder / "out" / "page.html", folder / "published"
    assert report.main([*runs, "--html", str(page), "--publish", str(published)]) == 0
    return page, published / "charts"


def test_page_holds_everything_and_refers_to_nothing(made):
    page, images = made
    text = page.read_text()
    assert {p.stem for p in images.iterdir()} == CHARTS
    assert all(p.read_bytes().startswith(PNG) for p in images.iterdir())
    assert re.findall(r'<figure id="(\w+)"', text) == [
        "speed_up", "against_floor", "memory", "launches", "history",
    ]  # fmt: skip
    for outside in ('src="http', 'href="', "@import", "url("):
        assert outside not in text
    assert "a CPU, AVX2, 2 threads" in text
    assert "beefbeefbeef" in text  # the newest is the one shown
    assert "a peer &lt;nobody&gt; knows" in text
    assert "a note &amp; more" in text
    assert "missing: not installed" in text
    assert "resnet50-training-b8-fp32, memory kept" in text


def test_the_same_result_gives_the_same_charts(made, tmp_path):
    page, images = made
    runs = [str(page.parents[1] / f"{name}.json") for name in "abc"]
    again = ["--html", str(tmp_path / "p.html"), "--publish", str(tmp_path)]
    assert report.main([*runs, *again]) == 0
    for chart in images.iterdir():
        assert (tmp_path / "charts" / chart.name).read_bytes() == chart.read_bytes()


def test_published_tables(made):
    text = (made[1].parent / "README.md").read_text()
    assert {f"![{c.replace('_', ' ')}](charts/{c}.png)" for c in CHARTS} <= set(text.splitlines())
    assert "a CPU, AVX2, 2 threads" in text
    times = (
        "| resnet50-training-b8-fp32 | 1000 | 1400 (1.40x) | 1050 (1.05x ~) "
        "| 900 (0.90x) |  | 0.0 |"
    )
    assert times in text.splitlines()
    goal = (
        "| resnet50-training-b8-fp32 | eager channels_last | 1.05x | 1.25x | 1.40x | aim reached |"
    )
    assert goal in text.splitlines()
    assert "| resnet50-training-b8-fp32 | 60 | 100 (-40%) |" in text.splitlines()
    assert "| apex | missing: not installed | resnet50-training-b8-fp32 |" in text.splitlines()


def test_a_result_without_data_has_no_chart(tmp_path):
    empty = result()
    assert all(draw(empty) is None for draw in charts.CHARTS.values())
    assert charts.history([empty]) is None
    path = _write(tmp_path / "empty.json", empty)
    assert report.main([path, "--html", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize("slowest,fastest", [(0.9, 1.1), (0.56, 14.7)])
def test_labels_stay_inside_of_the_axes(slowest, fastest):
    competitors = {OURS: figures(1.0), EAGER: peer(1.0, fastest), "other": peer(1.0, slowest)}
    figure = charts.speed_up(result(row("resnet50-training-b8-fp32", competitors)))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    inside = axes.get_window_extent()
    labels = [text.get_window_extent() for text in axes.texts]
    assert len(labels) == 2
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in labels)


def test_history_is_of_one_machine():
    other = _recorded()
    other["machine"] = other["machine"] | {"threads": 64}
    assert report._same_machine(_recorded(), _recorded(date="2026-11-22T10:00:00+00:00"))
    assert not report._same_machine(_recorded(), other)
    figure = charts.history([_recorded(), _recorded(date="2026-11-22T10:00:00+00:00")])
    (line,) = [a for a in figure.axes[0].lines if a.get_label().startswith("resnet50")]
    assert list(line.get_ydata()) == [1.4, 1.4]


def test_a_corrupt_result_is_refused(tmp_path, capsys):
    path = _write(tmp_path / "bad.json", {"schema": 2})
    assert report.main([path, "--html", str(tmp_path / "page.html")]) == 2
    assert f"{path}: machine: is missing" in capsys.readouterr().err


# --- in a browser

# Runs after the page's own script: what it finds goes into the document, which Chromium prints.
_LISTEN = """<script>
window.faults = [];
window.addEventListener("error", (event) => window.faults.push(String(event.message)), true);
</script>"""
_PROBE = """<script>
addEventListener("load", () => {
  const filter = document.getElementById("filter"), rows = [...document.querySelectorAll("tbody tr")];
  filter.value = "bn_act+residual";
  filter.dispatchEvent(new Event("input"));
  const shown = rows.filter((row) => !row.hidden).length;
  const heads = document.querySelectorAll("section:nth-of-type(2) th");
  heads[3].click(); heads[3].click();
  const first = document.querySelector("section:nth-of-type(2) tbody td").textContent;
  const found = {
    charts: [...document.images].map((i) => [i.naturalWidth, i.naturalHeight]),
    shown, rows: rows.length, first, faults: window.faults,
  };
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        reason = "no Chromium: `apt-get install chromium` (Debian); .ci/run does it as root"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    return found


def _open(browser, page, folder):
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder}", "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert probe, done.stdout[-2000:]
    return json.loads(html.unescape(probe[1]))


def test_the_page_in_a_browser_shows_its_charts_without_a_script_error(made, browser, tmp_path):
    text = made[0].read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(_LISTEN + text.replace("</html>", _PROBE + "</html>"))
    seen = _open(browser, probed, tmp_path / "profile")
    assert seen["faults"] == []
    assert len(seen["charts"]) == len(CHARTS)
    assert all(width > 500 and height > 150 for width, height in seen["charts"])
    assert 0 < seen["shown"] < seen["rows"]
    assert seen["first"].startswith("resnet50")  # sorted by time, the longest first


def test_the_probe_hears_a_broken_script_and_a_broken_chart(made, browser, tmp_path):
    text = made[0].read_text().replace('"use strict";', '"use strict"; noSuchThing();')
    text = text.replace("data:image/png;base64,", "data:image/png;base64,AAAA", 1)
    probed = tmp_path / "broken.html"
    probed.write_text(_LISTEN + text.replace("</html>", _PROBE + "</html>"))
    seen = _open(browser, probed, tmp_path / "profile")
    assert any("noSuchThing" in fault for fault in seen["faults"])
    assert [0, 0] in seen["charts"]
