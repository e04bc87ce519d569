"""Train the settings of a study: pilots where time is equal, then rungs, then all that is left; and what is written of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amfm.model.flops import count_parameters
from amfm.pretrain.stages import total_steps
from amfm_study.equal import flops_of_run, tokens_per_step
from amfm_study.grid import Cell
from amfm_study.halving import halve, loss_at, rung_step
from amfm_study.plots import draw_settings
from amfm_study.settings import PILOT, expand_settings, pilot_cells
from amfm_study.settings_table import setting_rows, settings_json, settings_markdown
from amfm_study.study import SettingsStudyConfig, Study
from amfm_study.table import measure_of, read_record, read_result
from amfm_study.verbs import print_table, replace_files, run_study, train_all

SettingsStudy = Study[SettingsStudyConfig]


@dataclass(frozen=True)
class Found:
    """The runs of a study, those that go to their end, and at which step and training loss each other setting ended."""

    cells: list[Cell]
    going: list[Cell]
    ended: Mapping[str, tuple[int, float]]


def step_seconds(plan: SettingsStudy, *, trains: bool) -> dict[str, float] | None:
    """Seconds of a step by setting and task, from pilots; None where time is not what is equal, or a pilot has not run."""
    if plan.config.equal != "time":
        return None
    pilots = pilot_cells(plan)
    if trains:
        train_all(plan, pilots, is_done=reached)
    records = {cell.name.removeprefix(PILOT): read_record(cell) for cell in pilots}
    speeds = {name: record.typical("tokens_per_second") for name, record in records.items() if record is not None}
    if len(speeds) < len(pilots):
        return None
    return {
        name: tokens_per_step(record.config) / speed
        for name, record in records.items()
        if record is not None and (speed := speeds[name]) is not None
    }


def open_settings(plan: SettingsStudy, *, trains: bool) -> Found:
    """The runs of a study; `trains`: pilots and rungs too, else only what has been trained of them is read."""
    cells = expand_settings(plan, step_seconds(plan, trains=trains))
    if plan.config.halving is None:
        return Found(cells, cells, {})
    if trains:
        return Found(cells, *halve(cells, plan.config.halving, lambda chosen: train_all(plan, chosen, is_done=reached)))
    whole = [
        rung for rung in plan.config.halving.rungs if all(loss_at(c, rung_step(c, rung)) is not None for c in cells)
    ]
    seen = plan.config.halving.model_copy(update={"rungs": tuple(whole[:1])})
    return Found(cells, *halve(cells, seen, lambda chosen: None))


def reached(cell: Cell) -> bool:
    """Whether a run has come to where its configuration stops."""
    step, record = cell.config.train.stop_after_steps, read_record(cell)
    return step is not None and record is not None and record.last_step() >= step


def run_settings(plan: SettingsStudy, *, as_json: bool) -> None:
    """Train what is missing and write table, JSON and picture; exits as the runs ended."""
    found = open_settings(plan, trains=True)
    run_study(plan, found.going, lambda slots: write_settings(plan, found, slots), as_json=as_json)


def write_settings(plan: SettingsStudy, found: Found, slots: int) -> dict[str, Any]:
    """Write study.json, study.md and study.png of the finished runs; returns what study.json holds."""
    folder = Path(plan.config.dir)
    results = [result for cell in found.going if (result := read_result(cell)) is not None]
    summary = settings_json(found.cells, results, slots, found.ended)
    texts = {
        "study.json": json.dumps(summary, indent=2) + "\n",
        "study.md": settings_markdown(found.cells, results, slots, found.ended),
    }
    replace_files(folder, texts)
    rows = setting_rows(found.cells, results, found.ended)
    if any(row.summary for row in rows):
        measures = {cell.task: measure_of(cell.config) for cell in found.cells}
        draw_settings(rows, measures, found.cells, folder / "study.png")
    return summary


def print_settings(plan: SettingsStudy, *, as_json: bool) -> None:
    """The runs of a study before they run, each with what is its own and what it will cost."""
    found = open_settings(plan, trains=False)
    rows = []
    for cell in found.cells:
        counts, steps = count_parameters(cell.config.model), total_steps(cell.config)
        tokens = steps * tokens_per_step(cell.config)
        rows.append(
            {
                "run": cell.name,
                "overrides": " ".join(cell.overrides),
                "parameters": counts.total,
                "active_parameters": counts.active,
                "steps": steps,
                "tokens": tokens,
                "flops": flops_of_run(cell.config, tokens),
                "done": read_result(cell) is not None,
            }
        )
    print_table(rows, as_json=as_json)
