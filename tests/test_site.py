"""The built site as a reader sees it: `make site` builds it, headless Chromium opens it.

Skipped where the extra `site` or Chromium is not installed.
"""

import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 300


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="make site installs it")
    if not (ROOT / "build" / "site" / "package").is_dir():
        pytest.skip("make site unpacks the script that draws diagrams")
    printed = subprocess.run(
        [sys.executable, "docs/site/stage_pages.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    variables = dict(pair.split("=", 1) for pair in printed.split())
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/site/mkdocs.yml"]
    environment = os.environ | variables | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        [*command, "--site-dir", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return out


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Without a line per request."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser(site):
    webdriver = pytest.importorskip("selenium.webdriver", reason="make site installs it")
    if shutil.which("chromedriver") is None:
        pytest.skip("Debian's chromium-driver is not installed")
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--window-size=1300,1200",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    driver.root = f"http://127.0.0.1:{server.server_address[1]}"
    yield driver
    driver.quit()
    server.shutdown()


def keep_picture(browser, name):
    """A screenshot in the folder of `SITE_PICTURES`, where it is named."""
    if folder := os.environ.get("SITE_PICTURES"):
        browser.save_screenshot(Path(folder, f"{name}.png"))


def wait_for(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, PATIENCE_SECONDS).until(lambda driver: driver.execute_script(f"return {script}"))


def test_every_page_of_the_repository_is_in_the_navigation():
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pages = [name for name in tracked.split() if not name.startswith((".github/", "tests/"))]
    navigation = (ROOT / "docs/site/mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"[\w./-]+\.md", navigation)
    assert sorted(listed) == sorted(pages)


def test_code_in_tables_shows_a_bar_without_its_backslash():
    path = ROOT / "docs/site/stage_pages.py"
    stage = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("stage_pages", path))
    spec.loader.exec_module(stage)
    assert stage.escape_bars("| `a \\| <b>` | `c` or d \\| e |\n`f \\| g`") == (
        "| <code>a &#124; &lt;b&gt;</code> | `c` or d \\| e |\n`f \\| g`"
    )


@pytest.mark.slow
def test_no_page_shows_a_backslash_before_a_bar(site):
    shown = [
        f"{page.relative_to(site)}: {code}"
        for page in site.rglob("*.html")
        for code in re.findall(r"<td[^>]*>.*?</td>", page.read_text())
        if "\\|" in code
    ]
    assert shown == []


@pytest.mark.slow
def test_figures_turn_dark_with_the_page(browser):
    browser.get(f"{browser.root}/")
    filtered = "getComputedStyle(document.querySelector('img[src$=\".svg\"]')).filter"
    assert wait_for(browser, filtered) == "none"
    browser.execute_script("document.body.setAttribute('data-md-color-scheme', 'slate')")
    assert "invert" in wait_for(browser, filtered)
    keep_picture(browser, "dark")


@pytest.mark.slow
def test_diagrams_are_drawn(browser):
    browser.get(f"{browser.root}/docs/architecture/")
    sources = (ROOT / "docs/architecture.md").read_text().count("```mermaid")
    drawn = "[...document.querySelectorAll('div.mermaid')].filter(found => found.offsetHeight > 100).length"
    assert wait_for(browser, f"{drawn} === {sources}")
    keep_picture(browser, "diagrams")


@pytest.mark.slow
def test_typed_search_finds_the_page_of_a_term_of_the_field(browser):
    for term, page in (("gradient accumulation", "batch_sizes"), ("long context", "long_context")):
        browser.get(f"{browser.root}/docs/notation/")
        field = browser.find_element("css selector", "input[name=query]")
        browser.execute_script("arguments[0].focus()", field)
        field.send_keys(term)
        assert wait_for(browser, f"document.querySelector('.md-search-result__link[href*=\"docs/{page}/\"]') !== null")
        keep_picture(browser, f"search_{page}")


@pytest.mark.slow
def test_the_api_page_has_types_and_fields(site):
    text = re.sub(r"<[^>]+>", "", (site / "docs/api/index.html").read_text())
    assert re.search(r"load\(\s*path:\s*str", text) and "tokens" in text and "events" in text
    assert ":::" not in text


@pytest.mark.slow
def test_pages_link_to_the_repository_and_show_the_version(site):
    page = (site / "docs/data/index.html").read_text()
    assert "edit/main/docs/data.md" in page and "0." in re.search(r'md-copyright__highlight">\s*([^<]*)', page)[1]


@pytest.mark.slow
def test_the_front_page_shows_where_to_begin_and_a_report_that_works(browser):
    browser.get(f"{browser.root}/")
    assert wait_for(browser, "document.querySelectorAll('article table td a').length >= 3")
    assert wait_for(
        browser, "document.querySelector('iframe').contentDocument.querySelectorAll('.plot > svg').length > 5"
    )
    keep_picture(browser, "front")
    for page in ("configuration", "api"):
        browser.get(f"{browser.root}/docs/{page}/")
        keep_picture(browser, page)
