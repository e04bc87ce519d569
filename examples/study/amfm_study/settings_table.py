"""Results of a study of settings: a row for each, with what it cost, and what its difference to the first is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from amfm.model.flops import count_parameters
from amfm_study.equal import flops_of_run
from amfm_study.grid import Cell
from amfm_study.paired import Difference, compare
from amfm_study.table import ACCURACY, CellResult, TaskSummary, measure_of, show_summary, state_facts, summarize


@dataclass(frozen=True)
class SettingRow:
    """One setting of one task: what it was trained with, what it measured over its seeds, and against the first setting.

    flops: of a run. ended_at: the step at which successive halving ended it, None for one that went to its end.
    """

    label: str
    task: str
    values: dict[str, Any]
    parameters: int
    active_parameters: int
    tokens: int
    flops: float
    summary: TaskSummary | None
    training_loss: float | None
    difference: Difference | None
    ended_at: int | None = None


def setting_rows(
    cells: Sequence[Cell], results: Sequence[CellResult], ended: Mapping[str, tuple[int, float]] = {}
) -> list[SettingRow]:
    """A row for each task and setting with a finished run, or one that ended at a rung: label -> step and training loss."""
    rows = []
    for task in dict.fromkeys(cell.task for cell in cells):
        own = {cell.mixer: cell for cell in reversed(cells) if cell.task == task}
        found = {label: [each for each in results if (each.mixer, each.task) == (label, task)] for label in own}
        labels = list(dict.fromkeys(cell.mixer for cell in cells if cell.task == task))
        first = next((label for label in labels if found[label]), labels[0])
        values = {label: {each.seed: each.value for each in runs} for label, runs in found.items()}
        lower = measure_of(own[first].config) is not ACCURACY
        for label in labels:
            config, runs = own[label].config, found[label]
            step, loss = ended.get(f"{label}-{task}", (None, None))
            if not runs and step is None:
                continue
            counts = count_parameters(config.model)
            losses = [each.training_loss for each in runs if each.training_loss is not None]
            each_step = config.train.global_batch_size * config.train.sequence_length
            tokens = runs[0].tokens if runs else (step or 0) * each_step
            difference = (
                None if label == first else compare(label, first, values[label], values[first], lower_is_better=lower)
            )
            rows.append(
                SettingRow(
                    label,
                    task,
                    dict(own[label].values),
                    counts.total,
                    counts.active,
                    tokens,
                    flops_of_run(config, tokens),
                    summarize(runs) if runs else None,
                    mean(losses) if losses else loss if loss is not None and math.isfinite(loss) else None,
                    difference,
                    step,
                )
            )
    return rows


def settings_json(
    cells: Sequence[Cell], results: Sequence[CellResult], slots: int, ended: Mapping[str, tuple[int, float]] = {}
) -> dict[str, Any]:
    """The study as JSON values: a row for each setting and task, and each run."""
    return {
        "planned": len(cells),
        "finished": len(results),
        "runs_at_once": slots,
        "tasks": {cell.task: asdict(measure_of(cell.config)) for cell in cells},
        "table": [asdict(row) for row in setting_rows(cells, results, ended)],
        "runs": [asdict(result) for result in results],
    }


def settings_markdown(
    cells: Sequence[Cell], results: Sequence[CellResult], slots: int, ended: Mapping[str, tuple[int, float]] = {}
) -> str:
    """A table for each task, differences by seed where there are any, and the facts that both rest on."""
    rows, parts = setting_rows(cells, results, ended), []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        measure = next(measure_of(cell.config) for cell in cells if cell.task == task)
        header = [
            "setting",
            "parameters",
            "active",
            "tokens",
            "FLOPs",
            f"{task}: {measure.name}",
            "tokens/s",
            "training loss",
        ]
        against = next((row.difference.against for row in own if row.difference is not None), own[0].label)
        lines = [_line([*header, f"against {against}"]), "|" + "---|" * (len(header) + 1)]
        lines += [_line(_columns(row)) for row in own]
        parts.append("\n".join(lines))
        compared = [row.difference for row in own if row.difference is not None and row.difference.interval is not None]
        if compared:
            parts.append(
                "\n".join(["Differences by seed, with a 95% interval of the mean (t):", "", *map(_words, compared)])
            )
    return "\n\n".join([*parts, state_facts(cells, results, slots)])


def _columns(row: SettingRow) -> list[str]:
    sizes = [f"{row.parameters:,}", f"{row.active_parameters:,}", f"{row.tokens:,}", f"{row.flops:.3g}"]
    value, speed = show_summary(row.summary)
    if row.ended_at is not None:
        value = f"ended at step {row.ended_at:,}"
    loss = "-" if row.training_loss is None else f"{row.training_loss:.3f}"
    verdict = "" if row.difference is None else f"{row.difference.mean:+.3f}, {row.difference.verdict}"
    return [row.label, *sizes, value, speed, loss, verdict]


def _line(columns: Sequence[str]) -> str:
    return "| " + " | ".join(columns) + " |"


def _words(difference: Difference) -> str:
    assert difference.interval is not None, "only those with an interval are listed"
    low, high = difference.interval
    seeds = ", ".join(f"{value:+.3f}" for value in difference.by_seed.values())
    return f"- {difference.label} - {difference.against}: {seeds}; mean {difference.mean:+.3f} [{low:+.3f}, {high:+.3f}]: {difference.verdict}"
