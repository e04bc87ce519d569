"""A study of ten small cells, and what a run leaves in the folder of one."""

from __future__ import annotations

import json
from pathlib import Path

from amfm_study.grid import Cell

from amfm.pretrain.config.file import resolved_yaml
from tests.helpers.tiny_store import make_tiny_store
from tests.pretrain.report.test_report import line
from tests.pretrain.tiny_run import tiny_config

STUDY = """\
dir: {folder}/study
tasks:
  - {{name: text, config: text.yaml}}
mixers:
  - {{mixer: M}}
  - {{mixer: M, label: wide, overrides: [model.mamba.state_size=32]}}
ratios: [none, 1:1, all]
num_mixers: 2
seeds: [0, 1]
runs_at_once: 1
"""


def write_small_study(folder: Path) -> Path:
    """The file of a study next to the run configuration of its task."""
    config = tiny_config(make_tiny_store(folder / "data", num_documents=20), folder / "unused")
    (folder / "text.yaml").write_text(resolved_yaml(config))
    (folder / "study.yaml").write_text(STUDY.format(folder=folder))
    return folder / "study.yaml"


def finish(cell: Cell, number: int, *, steps: int = 4) -> None:
    """What a run of four steps leaves, each cell with its own numbers."""
    folder = Path(cell.config.run.dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(resolved_yaml(cell.config))
    speeds = (10.0, 20.0 + number, 90.0 + number, 110.0 + number)
    lines = [line(step, tokens_per_second=speeds[step - 1]) for step in range(1, steps + 1)]
    if steps == 4:
        lines[-1]["validation_loss"] = 3.0 + number / 7
    (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
