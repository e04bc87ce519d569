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

from amfm.pretrain.report.goodput import USES
from amfm.pretrain.report.report import write_report
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.report.synthetic import KINDS, long
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
    assert all(70 < int(tick) < 140 for tick in seen["zoomed"]) and len(seen["zoomed"]) >= 3


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


SEEN = """
  seen.state = document.querySelector(".state").textContent;
  seen.verdict = document.querySelector(".verdict").innerText;
  seen.stages = [...host.querySelectorAll("text.stage-name")].map((text) => text.textContent);
  seen.ends = [...host.querySelectorAll("text.end")].map((text) => text.textContent);
  seen.uses = [...document.querySelectorAll(".clock path > title")].map((title) => title.textContent);
  seen.failures = document.querySelectorAll(".when .failure").length;
  seen.samples = document.querySelectorAll(".samples tr").length;
  seen.marks = host.querySelectorAll(".happened").length;
  seen.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  seen.empty = [...document.querySelectorAll(".plots .plot")].filter((plot) => plot.clientWidth && !plot.querySelector("svg")).length;
  const bad = (text) => /NaN|undefined|Infinity/.test(text);
  seen.bad = [...document.querySelectorAll("svg *")].filter((each) => bad(each.outerHTML)).length + bad(document.body.innerText);
  document.querySelector("details.others").open = true;
"""


@needs_browser
@pytest.mark.parametrize("kind", ["sick", "one step", "staged"])
def test_a_page_shows_how_a_run_is_where_its_time_went_and_no_number_that_is_none(kind, tmp_path):
    page = write_report([KINDS[kind](tmp_path)])
    seen = run_in_browser(page, SEEN, tmp_path / "profile")
    assert not seen["wide"] and not seen["empty"] and not seen["bad"]
    if kind == "sick":
        assert seen["state"] == "stopped: step 185 of 240, SIGTERM"
        for words in ("2 of 185 steps were skipped", "1 rollback", "1 failure", "block 9", "above its lowest"):
            assert words in seen["verdict"], words
        assert set(seen["uses"]) == set(USES.values()) and seen["failures"] == 1
        assert seen["samples"] == 4 and seen["marks"] > 5 and set(seen["ends"]) == {"training", "validation"}
    elif kind == "one step":
        assert seen["state"].startswith(("running: step 1 of", "lost: step 1 of")) and seen["marks"] == 0
        assert "needs a look" not in seen["verdict"] or "lost" in seen["verdict"]
    else:
        assert seen["state"] == "finished" and seen["stages"] == ["warm", "main", "anneal"]
        assert seen["failures"] == 1 and "1 failure" in seen["verdict"] and USES["again"] in seen["uses"]


@needs_browser
def test_a_long_run_is_drawn_in_few_points_smoothed_as_asked_and_printed_on_two_pages(tmp_path):
    page = write_report([long(tmp_path, 3000, 4)])
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
    page = write_report([long(tmp_path, 60_000, 24)])
    assert page.stat().st_size < 1_000_000
    seen = run_in_browser(page, "seen.seconds = performance.now() / 1000; seen.plots = figures()", tmp_path / "profile")
    print(f"opened and drawn in {seen['seconds']:.3f} s")
    assert seen["plots"] == 9
