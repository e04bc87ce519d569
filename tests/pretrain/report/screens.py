"""Pictures of what people see, of synthetic runs: `python -m tests.pretrain.report.screens docs/images [NAME...]`.

The page of a staged, a sick and a young run and of two runs: desktop, dark, as deuteranopes see it, on a phone of 390 pixels
and on paper, in one sheet each; and terminals of 80 and 200 columns. Needs Chromium, Ghostscript and tmux.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

from amfm.pretrain.report.report import write_report
from tests.pretrain.report.synthetic import one_step, sick, staged
from tests.pretrain.report.test_page_in_a_browser import BROWSER, FLAGS

ROOT = Path(__file__).parents[3]
SCALE, QUALITY, GAP = 0.5, 45, 16
PHONE = 390
# Of Machado, Oliveira and Fernandes (2009), deuteranopia, on linear RGB.
DEUTERANOPIA = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
WATCH = "amfm watch sick/run"
COMMANDS = {
    80: ("amfm runs .", WATCH, f"LC_ALL=C PYTHONUTF8=0 NO_COLOR=1 {WATCH}", "amfm watch sick/run 2>&1 | cat"),
    200: ("amfm runs .", WATCH),
}  # fmt: skip


def photograph(page: Path, width: int, height: int) -> Image.Image:
    """What Chromium shows of a page; a narrow one in a frame, because its windows are at least 500 pixels wide."""
    shown = page
    if width < 500:
        shown = page.with_name(f"framed-{page.name}")
        frame = f'<iframe src="{page.name}" style="border:0;width:{width}px;height:{height}px">'
        shown.write_text(f'<body style="margin:0">{frame}')
    with tempfile.TemporaryDirectory() as profile:
        flags = [flag for flag in FLAGS if not flag.startswith("--window")]
        picture = Path(profile) / "picture.png"
        window = f"--window-size={max(width, 500)},{height}"
        command = [str(BROWSER), *flags, window, "--hide-scrollbars", f"--user-data-dir={profile}"]
        subprocess.run([*command, f"--screenshot={picture}", shown.as_uri()], check=True, capture_output=True)
        return Image.open(picture).convert("RGB").crop((0, 0, width, height))


def as_deuteranopes_see(picture: Image.Image) -> Image.Image:
    """A picture in the colours that are left without one of three receptors."""
    encoded = np.asarray(picture) / 255.0
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ DEUTERANOPIA.T, 0, 1)
    shown = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    return Image.fromarray(np.round(255 * shown).astype(np.uint8))


def photograph_print(page: Path) -> list[Image.Image]:
    """The sheets of paper that a page prints on."""
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "page.pdf"
        command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder}/profile", f"--print-to-pdf={printed}"]
        subprocess.run([*command, page.as_uri()], check=True, capture_output=True)
        draw = [
            "gs",
            "-q",
            "-dBATCH",
            "-dNOPAUSE",
            "-dTextAlphaBits=4",
            "-dGraphicsAlphaBits=4",
            "-sDEVICE=png16m",
            "-r100",
        ]
        subprocess.run([*draw, f"-sOutputFile={folder}/sheet-%d.png", str(printed)], check=True, capture_output=True)
        return [Image.open(path).convert("RGB") for path in sorted(Path(folder).glob("sheet-*.png"))]


def join(pictures: Sequence[Image.Image], out: Path, *, scale: float = SCALE) -> None:
    """Write pictures next to each other, on grey."""
    small = [
        each.resize((round(scale * each.width), round(scale * each.height)), Image.Resampling.LANCZOS)
        for each in pictures
    ]
    width, height = sum(each.width + GAP for each in small) + GAP, max(each.height for each in small) + 2 * GAP
    sheet, left = Image.new("RGB", (width, height), "#8a8f98"), GAP
    for each in small:
        sheet.paste(each, (left, GAP))
        left += each.width + GAP
    sheet.save(out, quality=QUALITY, method=6)


def draw_page(runs: Sequence[Path], out: Path, height: int = 2300) -> None:
    """Write the sheet of the page of a run, or of several."""
    page = write_report(runs, Path("page.html")).resolve()
    dark = page.with_name("dark.html")
    dark.write_text(page.read_text().replace("(prefers-color-scheme: dark)", "all"))
    light, phone = photograph(page, 1180, height), photograph(page, PHONE, height)
    join([light, photograph(dark, 1180, height), as_deuteranopes_see(light), phone, *photograph_print(page)], out)


def draw_terminals(width: int, out: Path) -> None:
    """Write what a terminal of so many columns shows of commands, one below the other."""
    session = f"screens-{os.getpid()}-{width}"
    tmux = ["tmux", "-L", session]
    bin_folder = Path(sys.executable).parent
    subprocess.run([*tmux, "new-session", "-d", "-x", str(width), "-y", "200", "sh"], check=True)
    try:
        shown = []
        for number, command in enumerate(COMMANDS[width]):
            marker = Path(f"done-{width}-{number}")
            line = f"clear; PATH={bin_folder}:$PATH; {command}; touch {marker.name}"
            subprocess.run([*tmux, "send-keys", line, "Enter"], check=True)
            while not marker.exists():
                time.sleep(0.5)
            time.sleep(1)
            text = subprocess.run(
                [*tmux, "capture-pane", "-e", "-p"], check=True, capture_output=True, text=True
            ).stdout
            lines = [each for each in text.splitlines() if "touch done-" not in each]
            shown.append("\n".join([f"$ {command}", *lines]).replace("\n# \n", "\n").rstrip("# \n"))
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    console = Console(record=True, width=width, file=Path(os.devnull).open("w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi("\n\n".join(shown)))
    rows = sum(each.count("\n") + 2 for each in shown)
    page = Path(f"terminal-{width}.html").resolve()
    style = "background:#15181d;color:#d7dae0;margin:10px;font:13px/17px 'DejaVu Sans Mono',monospace"
    page.write_text(
        console.export_html(
            theme=DIMMED_MONOKAI,
            inline_styles=True,
            code_format=f'<meta charset="utf-8"><body style="{style}"><pre>{{code}}</pre>',
        )
    )
    join([photograph(page, round(7.83 * width) + 30, min(3800, 17 * rows + 40))], out, scale=0.75)


SHEETS: dict[str, Callable[[Path], None]] = {
    "report_staged": lambda out: draw_page([Path("staged/run")], out),
    "report_sick": lambda out: draw_page([Path("sick/run")], out),
    "report_first_step": lambda out: draw_page([Path("first/run")], out, 1500),
    "report_two_runs": lambda out: draw_page([Path("staged/run"), Path("sick/run")], out),
    "terminal_80": lambda out: draw_terminals(80, out),
    "terminal_200": lambda out: draw_terminals(200, out),
}


def main(folder: Path, names: Sequence[str]) -> None:
    """Write the sheets."""
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # pages show paths as they were given
        for name, make in (("staged", staged), ("sick", sick), ("first", one_step)):
            Path(name).mkdir()
            make(Path(name))
        for name in names or SHEETS:
            SHEETS[name](folder / f"{name}.webp")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
