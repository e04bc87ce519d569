"""The page's script in a real browser, where one is installed: pointing gives values, dragging zooms, runs can be hidden.

The page itself drives the test: a script is appended that points and drags as a reader would, and writes down what it
then sees; the browser prints the document when it is done.
"""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from amfm.pretrain.report.report import write_report
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.report.test_overlay import make_runs
from tests.pretrain.report.test_report import line, make_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--window-size=1280,900",
)
HELPERS = """
const seen = {};
const host = document.getElementById("plot-loss"), box = host.getBoundingClientRect();
const send = (kind, share) => host.dispatchEvent(new PointerEvent(kind, {bubbles: true, pointerId: 1, pointerType: "mouse",
  button: 0, clientX: box.left + share * box.width, clientY: box.top + 100}));
host.setPointerCapture = () => {};
const ticks = () => [...document.querySelectorAll("#plot-throughput svg text.tick")].map((text) => text.textContent);
"""

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; the page's data are tested without one")


def run_in_browser(page: Path, script: str, profile: Path) -> dict[str, object]:
    acting = page.with_name("acting.html")
    tail = f"<script>{HELPERS}{script};document.body.dataset.seen = JSON.stringify(seen);</script>"
    acting.write_text(page.read_text().replace("</body>", f"{tail}</body>"))
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", acting.as_uri()]
    document = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True).stdout
    found = re.search(r'data-seen="([^"]*)"', document)
    assert found is not None, document[-2000:]
    return json.loads(unescape(found[1]))


@needs_browser
def test_pointing_shows_values_and_dragging_zooms_every_plot(tmp_path):
    page = write_report([make_run(tmp_path, [line(step, validation_loss=3.0) for step in range(1, 201)])])
    script = """
      send("pointermove", 0.5);
      seen.tip = host.querySelector(".tip").innerText;
      seen.before = ticks();
      send("pointerdown", 0.4); send("pointermove", 0.5); send("pointerup", 0.6);
      seen.zoomed = ticks();
      host.dispatchEvent(new MouseEvent("dblclick"));
      seen.after = ticks();
    """
    seen = run_in_browser(page, script, tmp_path / "profile")
    step = int(re.search(r"step (\d+)", seen["tip"])[1])
    assert 80 < step < 120
    assert f"{8.0 / step:.5g}".rstrip("0") in seen["tip"]
    assert "validation" in seen["tip"]
    assert seen["before"] == seen["after"] == ["50", "100", "150", "200"]
    assert all(70 < int(tick) < 130 for tick in seen["zoomed"]) and len(seen["zoomed"]) >= 3


@needs_browser
def test_a_click_on_a_run_hides_its_curves_everywhere(tmp_path):
    page = write_report(make_runs(tmp_path, "1e-3", "2e-3"))
    script = """
      const curves = () => [...document.querySelectorAll(".plot")].map((plot) => plot.querySelectorAll("path.curve").length);
      seen.both = curves();
      document.querySelector("button[data-run='1']").click();
      seen.one = curves();
    """
    seen = run_in_browser(page, script, tmp_path / "profile")
    assert set(seen["both"]) == {2}
    assert set(seen["one"]) == {1}
