"""Copy the pages of the site to build/site/pages: every tracked page, and the files and folders that pages link to.

The copy has the repository's paths, so that links between pages, to recipes, examples and sources work as they stand. A link
to a folder becomes one to its README.md, or to a list of what it holds. The word REPOSITORY in `git clone` lines becomes the
address under [project.urls] in pyproject.toml. Prints the variables that mkdocs.yml reads.
"""

from __future__ import annotations

import contextlib
import html
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "build" / "site" / "pages"
BAR = "\\|"
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)
VERSION = re.compile(r'^__version__ = "(.+)"', re.MULTILINE)
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"  # what was measured on a day is not what readers look for
MERMAID = ROOT / "build" / "site" / "package" / "dist" / "mermaid.min.js"  # unpacked by `make site`
# Of the front page, before its first section: where to begin, and what a run looks like.
FRONT = """| On a laptop | On a node | On a cluster |
|---|---|---|
| [Four questions, your text, two cores](docs/getting_started.md) | [One command for all GPUs of a host](docs/launching.md) | [Plan](docs/planning.md), launch, [watch](docs/tracking.md) |

<iframe src="report.html" title="The report of a synthetic run" style="width:100%;height:560px;border:1px solid #8886"></iframe>

The page above is what `amfm report` writes, of a synthetic run: point at curves, drag to zoom.

"""
# Comments of commands are not cut at the edge, and figures, which are drawn on white, turn dark with the page.
STYLE = """.md-typeset pre > code { white-space: pre-wrap; }
[data-md-color-scheme="slate"] img:is([src$=".svg"], [src$=".png"]) { filter: invert(0.88) hue-rotate(180deg); }
"""


def stage() -> None:
    """Write the folder again from the start."""
    shutil.rmtree(PAGES, ignore_errors=True)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    version = VERSION.search((ROOT / "src" / "amfm" / "__init__.py").read_text())
    assert version, "src/amfm/__init__.py has no version"
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if not name.startswith((".github/", "tests/")):
            parts = FENCE.split((ROOT / name).read_text().replace("git clone REPOSITORY", f"git clone {repository}"))
            if name == "README.md":
                parts[0] = parts[0].replace("\n## ", f"\n{FRONT}## ", 1)
            head = UNSEARCHED if name.startswith("docs/log/") else ""
            pages = (part if part.startswith("```") else escape_bars(resolve_links(part, name)) for part in parts)
            write(name, head + "".join(pages))
    write("stylesheets/site.css", STYLE)
    draw_report(PAGES / "report.html")
    (PAGES / "javascripts").mkdir()
    shutil.copyfile(MERMAID, PAGES / "javascripts" / MERMAID.name)
    print(f"AMFM_REPOSITORY={repository} AMFM_VERSION={version[1]}")


def draw_report(out: Path) -> None:
    """Write the page of a synthetic run."""
    sys.path.insert(0, str(ROOT))
    from amfm.pretrain.report.report import write_report
    from tests.pretrain.report.synthetic import staged

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_report([staged(Path(), 1200)], out)


def escape_bars(text: str) -> str:
    """Code in tables, whose `\\|` GitHub shows as a bar and Markdown in Python with its backslash."""

    def escape(span: re.Match[str]) -> str:
        return f"<code>{html.escape(span[1]).replace(BAR, '&#124;')}</code>" if BAR in span[1] else span[0]

    lines = text.split("\n")
    return "\n".join(CODE.sub(escape, line) if line.startswith("|") and BAR in line else line for line in lines)


def resolve_links(text: str, page: str) -> str:
    """Copy what a page links to, and let its links to folders lead to a page."""

    def resolve(link: re.Match[str]) -> str:
        before, target, anchor, after = link.groups()
        path = (ROOT / page).parent / target
        if "://" in target or target.startswith("mailto:") or not path.exists():
            return link[0]
        name = str(path.resolve().relative_to(ROOT))
        if path.is_dir():
            target = f"{target.rstrip('/')}/README.md"
            if not (path / "README.md").exists():
                listed = "".join(f"- {entry.name}\n" for entry in sorted(path.iterdir()) if entry.name != "__pycache__")
                write(f"{name}/README.md", f"# {name}\n\n{listed}")
        elif path.suffix != ".md":
            (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, PAGES / name)
        return f"{before}{target}{anchor or ''}{after}"

    return LINK.sub(resolve, text)


def write(name: str, text: str) -> None:
    """Write one page."""
    (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
    (PAGES / name).write_text(text)


if __name__ == "__main__":
    stage()
