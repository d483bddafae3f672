"""The report page in a real browser, which may reach nothing: chromium, without a window.

The page stands in a frame of the wanted width, since windows have a least width. A script at the end of a copy of it measures
and sends what it found to the page around the frame, which chromium prints.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.report_examples import empty_report, full_report
from training.report import render_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on the PATH")

MEASURE = """
<script>
(async () => {
  const images = [...document.images];
  for (const image of images) image.loading = "eager";
  await Promise.allSettled(images.map((image) => image.decode()));
  const sorted = CLICKS.map((column) => {
    const table = document.querySelector("table");
    const heading = table.tHead.rows[0].cells[column];
    heading.querySelector("button").click();
    return [heading.getAttribute("aria-sort"), [...table.tBodies[0].rows].map((row) => row.cells[1].innerText)];
  });
  const frames = [...document.querySelectorAll(".scroll")];
  const found = {
    width: window.innerWidth,
    content: document.documentElement.scrollWidth,
    visible: document.documentElement.clientWidth,
    images: images.map((image) => image.naturalWidth),
    ground: getComputedStyle(document.body).backgroundColor,
    sorted,
    sortable: document.querySelectorAll("th button").length,
    highest: Math.max(0, ...frames.map((frame) => frame.clientHeight)),
    requests: performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => !name.startsWith("data:")),
  };
  parent.postMessage(JSON.stringify(found), "*");
})();
</script>
</body>
</html>
"""
FRAME = """<!DOCTYPE html>
<meta charset="utf-8"><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>frame</title>
<pre id="found"></pre>
<script>addEventListener("message", (event) => { document.getElementById("found").textContent = event.data; });</script>
<iframe src="page.html" width="WIDTH" height="900" style="border: 0"></iframe>
"""


class Visit(NamedTuple):
    """What the script at the end of the page found, and what the browser complained about."""

    found: dict[str, Any]
    complaints: list[str]


def visit(page: str, folder: Path, *, width: int = 1280, dark: bool = False, clicks: tuple[int, ...] = ()) -> Visit:
    """Open a page and measure it; `clicks` are the columns of the first table whose headings are clicked in turn."""
    before, _ = page.rsplit("</body>", 1)
    (folder / "page.html").write_text(before + MEASURE.replace("CLICKS", json.dumps(clicks)), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    outcome = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1400,1000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    match = re.search(r'<pre id="found">(.+?)</pre>', outcome.stdout, flags=re.DOTALL)
    assert match, f"chromium ended with {outcome.returncode} and no measurement:\n{outcome.stderr[-3000:]}"
    complaints = [line for line in outcome.stderr.splitlines() if "CONSOLE" in line]
    return Visit(json.loads(html.unescape(match[1])), complaints)


@pytest.fixture(scope="module")
def page() -> str:
    """All parts, and more classes than fit on a screen."""
    return render_report(full_report(num_classes=60))


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True)])
def test_page_renders_without_complaints_and_without_scrolling_sideways(page, tmp_path, width, dark):
    found, complaints = visit(page, tmp_path, width=width, dark=dark)
    assert complaints == []
    assert found["width"] == width
    assert found["content"] <= found["visible"]
    assert found["images"] == [60, 60, 60, 60, 40, 50]
    assert found["requests"] == []
    assert found["ground"] == ("rgb(23, 23, 22)" if dark else "rgb(247, 246, 243)")
    assert 300 < found["highest"] < 800, "long tables scroll inside their frame"


def test_a_click_on_a_heading_sorts_its_table_and_another_turns_it_round(page, tmp_path):
    # The first four classes have PQ 25.0, undefined, 100.0 and 0.0, all others 50.0.
    found, complaints = visit(page, tmp_path, clicks=(3, 3, 0))
    (falling, high_first), (rising, low_first), (by_name, names) = found["sorted"]
    others = [str(class_id) for class_id in range(4, 60)]
    assert complaints == []
    assert (falling, high_first) == ("descending", ["2", *others, "0", "3", "1"])
    assert (rising, low_first) == ("ascending", ["3", "0", *others, "2", "1"])
    # Numbers within names sort as numbers: "<script>...", "class 4" to "class 59", "person", "sky", "ueberlanger Name".
    assert (by_name, names) == ("ascending", ["1", *others, "0", "3", "2"])
    assert found["sortable"] == 5 + 9 + 5  # scores; errors without the column of bars; thresholds


def test_empty_page_renders_and_a_request_to_another_machine_is_refused_and_seen(tmp_path):
    empty = render_report(empty_report())
    found, complaints = visit(empty, tmp_path, width=360)
    assert (complaints, found["images"], found["content"]) == ([], [], found["visible"])
    # The same page with a foreign picture: its own policy refuses it, which also shows that complaints are seen here.
    spoiled = empty.replace("</main>", '<img src="https://example.invalid/x.png" alt=""></main>')
    found, complaints = visit(spoiled, tmp_path)
    assert found["images"] == [0]
    assert any("Content Security Policy" in line for line in complaints)
