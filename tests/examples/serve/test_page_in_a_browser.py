"""The page in a real browser, where one is installed: what is typed is continued, as text and never as markup."""

import json
import re
import subprocess
from html import unescape

from amfm_serve.server import ModelServer

from tests.examples.serve.conftest import serving
from tests.helpers.patience import PATIENCE_SECONDS
from tests.pretrain.report.test_page_in_a_browser import BROWSER, FLAGS, needs_browser

ACT = """<script>
const form_ = document.querySelector("form");
form_.elements.text.value = "a <b>word</b>";
form_.elements.max_tokens.value = "8";
form_.requestSubmit();
const wait = setInterval(() => {
  if (document.querySelector(".go").textContent === "Stop") return;
  clearInterval(wait);
  const log = document.querySelector("main");
  document.body.dataset.seen = JSON.stringify({ text: log.textContent, bold: log.querySelectorAll("b").length });
}, 50);
</script>"""


class ActingServer(ModelServer):
    """Its page acts as a reader would."""

    def page(self) -> str:
        return super().page().replace("</body>", f"{ACT}</body>")


@needs_browser
def test_what_is_typed_is_continued(imported, tmp_path):
    with serving(imported, ActingServer) as server:
        flags = [*FLAGS, f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000000", "--dump-dom"]
        shown = subprocess.run(
            [BROWSER, *flags, f"{server.url}/"], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
        )
    found = re.search(r'data-seen="([^"]*)"', shown.stdout)
    assert found is not None, shown.stdout[-2000:]
    seen = json.loads(unescape(found[1]))
    assert seen["text"].startswith("a <b>word</b>") and len(seen["text"]) > len("a <b>word</b>")
    assert seen["bold"] == 0
