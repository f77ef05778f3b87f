"""The page in a browser: it renders from disk, fetches nothing, and its script has no error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eval.report import main
from tests.panel_runs import write_sweep

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
POINTER = """<script>
const plot = document.querySelector("[data-panel=loss]"), box = plot.getBoundingClientRect();
const at = (x) => new PointerEvent("pointermove", { clientX: box.left + x * box.width, clientY: box.top + box.height / 2 });
document.getElementById("show-2").click();
plot.dispatchEvent(at(0.98));
document.title = [...document.querySelectorAll('[data-run="2"]')].map((part) => getComputedStyle(part).display).join(" ");
</script></body>"""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium, or make test-cluster"),
]


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def asked_for(net_log: Path) -> list[str]:
    """Return the addresses that pages requested; the browser's own requests have no origin."""
    events = [event.get("params", {}) for event in json.loads(net_log.read_text())["events"]]
    requests = [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
    return list(dict.fromkeys(requests))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    write_sweep(folder / "sweep")
    main([f"runs={folder}/sweep", f"page={folder}/page.html"])
    return folder / "page.html"


def test_the_page_renders_from_disk_and_asks_for_nothing_else(page, tmp_path):
    log = tmp_path / "net.json"
    done = browse(page, tmp_path / "profile", f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom")
    assert asked_for(log) == []
    dom = done.stdout
    assert dom.count('<th scope="row">') == 5
    assert dom.count("<figure ") == 13
    assert len(re.findall(r'<div class="plot".*?<svg', dom, re.S)) == 13
    # The script has added to each plot the group in which it draws the values under the pointer.
    assert dom.count("<g></g></svg>") == 9
    assert not re.findall(r".*CONSOLE.*", done.stderr)


def test_a_page_that_did_fetch_something_would_be_seen(page, tmp_path):
    leaky, log = page.with_name("leaky.html"), tmp_path / "net.json"
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    leaky.write_text(free.replace("</body>", '<img src="http://example.invalid/x.png"></body>'))
    browse(leaky, tmp_path / "profile", f"--log-net-log={log}", "--dump-dom")
    assert asked_for(log) == ["http://example.invalid/x.png"]


def test_the_pointer_reads_the_runs_in_view_and_a_box_hides_its_run_everywhere(page, tmp_path):
    poked = page.with_name("poked.html")
    poked.write_text(page.read_text().replace("</body>", POINTER))
    dom = browse(poked, tmp_path / "profile", "--dump-dom").stdout
    reading = re.search(r'<output class="reading"[^>]*>(.*?)</output>', dom)[1]
    words = re.sub(r"<[^>]+>", " ", reading).split()
    assert words[:2] == ["5,120", "tokens"]
    assert set(words[2::2]) == {"dense", "most", "most-twin"}
    assert all(2 < float(value) < 3 for value in words[3::2])
    assert set(re.search(r"<title>(.*?)</title>", dom)[1].split()) == {"none"}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_sticks_out_in_either_theme_and_the_text_stands_out_from_the_page(page, tmp_path, theme, width):
    measured = page.with_name(f"{theme}-{width}.html")
    script = """<script>document.title = JSON.stringify([document.documentElement.scrollWidth, innerWidth,
      getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor])</script></body>"""
    measured.write_text(page.read_text().replace("</body>", script))
    scheme = {"dark": 0, "light": 1}[theme]
    flags = (f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},900", "--dump-dom")
    dom = browse(measured, tmp_path / "profile", *flags).stdout
    scroll, inner, ink, paper = re.search(r"<title>\[(\d+),(\d+),\"(.*?)\",\"(.*?)\"\]</title>", dom).groups()
    assert int(scroll) <= int(inner)
    light, dark = (ink, paper) if theme == "dark" else (paper, ink)
    assert min(map(int, re.findall(r"\d+", light))) - max(map(int, re.findall(r"\d+", dark))) > 180
