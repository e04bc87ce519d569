"""The page's script in a real browser, where one is installed: pointing gives values, dragging zooms, runs can be hidden.

The page itself drives the test: a script is appended that points and drags as a reader would, and writes down what it
then sees; the browser prints the document when it is done.
"""

import json
import math
import random
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
const figures = () => document.querySelectorAll(".plot > svg").length;
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


def long_run(folder: Path, num_steps: int, num_blocks: int) -> Path:
    draw = random.Random(0)
    lines = [
        line(
            step,
            loss=2.45 + 8 * step**-0.35 + draw.gauss(0, 0.04),
            grad_norm=0.3 * math.exp(draw.gauss(0, 0.4)),
            expert_load={str(block): 1.3 + draw.random() / 5 for block in range(num_blocks)},
            auxiliary={"balance": draw.random()},
            memory_bytes=7e10,
        )
        for step in range(1, num_steps + 1)
    ]
    run = make_run(folder, lines, f"train.steps={num_steps}")
    events = [{"event": "skipped_step", "step": draw.randrange(1, num_steps)} for _ in range(149)]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


@needs_browser
def test_a_long_run_is_drawn_in_few_points_smoothed_as_asked_and_printed_on_two_pages(tmp_path):
    page = write_report([long_run(tmp_path, 3000, 4)])
    script = """
      const path = () => host.querySelector("path.curve").getAttribute("d");
      seen.points = Math.max(...[...document.querySelectorAll("path")].map((each) => each.getAttribute("d").length / 11));
      seen.elements = document.querySelectorAll("svg *").length;
      seen.events = host.querySelectorAll(".happened.trouble").length;
      seen.smooth = path();
      const slider = document.getElementById("smoothing");
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      seen.raw = path();
      const axis = () => [...host.querySelectorAll("svg text.tick")].map((text) => text.textContent);
      seen.linear = axis();
      document.querySelector("button.logX").click();
      seen.log = axis();
      seen.cut = host.querySelectorAll("text.cut").length;
      document.querySelector("button.all").click();
      seen.whole = host.querySelectorAll("text.cut").length;
      const began = performance.now();
      host.dispatchEvent(new MouseEvent("dblclick"));
      host.getBoundingClientRect();
      seen.seconds = (performance.now() - began) / 1000;
    """
    seen = run_in_browser(page, script, tmp_path / "profile")
    print(f"all plots are drawn in {seen['seconds']:.3f} s")
    assert seen["points"] < 4 * 1280 and seen["elements"] < 3000
    assert 20 < seen["events"] < 149 and seen["raw"] != seen["smooth"]
    assert "1k" in seen["linear"] and {"10", "100", "1k"} <= set(seen["log"])
    assert (seen["cut"], seen["whole"]) == (1, 0)
    printed = tmp_path / "page.pdf"
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={printed}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=PATIENCE_SECONDS, check=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes())) == 2


@pytest.mark.slow
@needs_browser
def test_a_page_of_60_000_steps_and_24_blocks_is_below_1_mb(tmp_path):
    page = write_report([long_run(tmp_path, 60_000, 24)])
    assert page.stat().st_size < 1_000_000
    seen = run_in_browser(page, "seen.seconds = performance.now() / 1000; seen.plots = figures()", tmp_path / "profile")
    print(f"opened and drawn in {seen['seconds']:.3f} s")
    assert seen["plots"] == 8
