"""Pictures of the report of a synthetic run: `python -m tests.pretrain.report.screens docs/images`; needs Chromium.

Desktop, dark, and a phone of 390 pixels, of a run of 6,000 steps in three stages with skips, a failure and a restart.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from amfm.pretrain.report.report import write_report
from tests.pretrain.report.test_page_in_a_browser import BROWSER, FLAGS
from tests.pretrain.report.test_report import line, make_run

STEPS = 6000
MOE = "model.moe={num_experts: 8, top_k: 2, expert_hidden_size: 8}"
STAGES = ", ".join(f'{{"name": "{name}", "tokens": {512 * STEPS // 3}}}' for name in ("warm", "main", "anneal"))
COLOURS = 255  # of a picture, so that it stays small


def make_synthetic(folder: Path) -> Path:
    """A run that trains well for the most part."""
    draw = random.Random(0)
    lines = [
        line(
            step,
            loss=2.45 + 8 * step**-0.35 + draw.gauss(0, 0.05) + (step in (1500, 1502, 4100)),
            grad_norm=0.3 * 2 ** draw.gauss(0, 0.4),
            lr=1e-3 * min(1, step / 300) * (1 - 0.9 * step / STEPS),
            tokens_per_second=1e6 * (1 + draw.gauss(0, 0.03)) * (0.5 if 2000 < step < 2200 else 1),
            expert_load={
                str(block): 1.2 + draw.random() / 5 + (block == 9) * step / STEPS for block in range(1, 24, 2)
            },
            **({"validation_loss": 2.46 + 8 * step**-0.35} if step % 250 == 0 else {}),
        )
        for step in range(1, STEPS + 1)
    ]
    run = make_run(
        folder, lines, "run.name=hybrid_8b", MOE, "model.pattern=MEME", "train.steps=null", f"stages=[{STAGES}]"
    )
    events = [{"event": "skipped_step", "step": step} for step in (1500, 1502, 3333, 4100)]
    events += [{"event": "failed", "step": 4150}, {"event": "start", "step": 4100}, {"event": "end", "step": STEPS}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """Write what Chromium shows of a page, in few colours."""
    with tempfile.TemporaryDirectory() as profile:
        window = f"--window-size={max(width, 500)},{height}"
        flags = [flag for flag in FLAGS if not flag.startswith("--window")]
        command = [str(BROWSER), *flags, window, "--hide-scrollbars", f"--user-data-dir={profile}"]
        subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True)
    Image.open(picture).convert("RGB").crop((0, 0, width, height)).quantize(COLOURS, dither=Image.Dither.NONE).save(
        picture, optimize=True
    )


def main(folder: Path) -> None:
    """Write the pictures."""
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # the page shows the path as it was given
        page = write_report([make_synthetic(Path())]).resolve()
        dark, phone = page.with_name("dark.html"), page.with_name("phone.html")
        dark.write_text(page.read_text().replace("(prefers-color-scheme: dark)", "all"))
        phone.write_text(
            f'<body style="margin:0"><iframe src="{page.name}" style="border:0;width:390px;height:1600px">'
        )
        for name, shown, size in (
            ("desktop", page, (1180, 1500)),
            ("dark", dark, (1180, 1500)),
            ("phone", phone, (390, 1600)),
        ):
            photograph(shown, folder / f"report_{name}.png", *size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
