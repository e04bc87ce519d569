"""Results of a study: what finished runs measured, cell by cell and as one table of mixers and ratios.

How it works: run directories are the only source. A cell is finished if its report data say so and its configuration
is the one that the study gives it. Numbers of a run with other settings are rejected rather than mixed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from amfm.model.flops import count_parameters
from amfm.model.state_size import state_bytes
from amfm.pretrain.config.file import diff_configs
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.report.data import RunRecord, read_run
from amfm_study.equal import flops_of_run
from amfm_study.grid import NO_ATTENTION, ONLY_ATTENTION, Cell


@dataclass(frozen=True)
class Measure:
    """Quantity that a task is judged by: key in metrics.jsonl, name and unit."""

    key: str
    name: str
    unit: str


# Names and folders, and where a rung of successive halving stops.
NOT_COMPARED = ("run.", "train.stop_after_steps")
LOSS = Measure("validation_loss", "validation loss", "nats per token")
ACCURACY = Measure("validation_accuracy", "accuracy", "of labelled tokens")


@dataclass(frozen=True)
class CellResult:
    """Numbers of a finished run from its metrics.jsonl; tokens_per_second is the median of its newer half."""

    name: str
    mixer: str
    ratio: str
    task: str
    seed: int
    run_dir: str
    value: float
    training_loss: float | None
    tokens: int
    tokens_per_second: float
    seconds: float
    hardware: str


@dataclass(frozen=True)
class TaskSummary:
    """One task at one point of the grid: mean, lowest and highest over its seeds."""

    mean: float
    low: float
    high: float
    tokens_per_second: float
    seeds: int


@dataclass(frozen=True)
class Row:
    """One mixer at one ratio. Parameters and bytes are those of the first task's model, tokens and FLOPs those of a run of it."""

    mixer: str
    ratio: str
    attention_share: float
    parameters: int
    active_parameters: int
    tokens: int
    flops: float
    state_bytes: int
    tasks: dict[str, TaskSummary]


def measure_of(config: RunConfig) -> Measure:
    """Measure of a run: accuracy for a synthetic task (`data.synthetic`), validation loss for text."""
    return LOSS if config.data.synthetic is None else ACCURACY


def read_record(cell: Cell) -> RunRecord | None:
    """What a cell's run has logged so far; None before its first step.

    Raises ValueError for a run directory that was trained with other settings, because its numbers belong to another
    study.
    """
    folder = Path(cell.config.run.dir)
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        return None
    try:
        record = read_run(folder)
    except ValueError:
        return None  # started, and no step yet
    # Any other setting makes it another experiment.
    changed = [item for item in diff_configs(record.config, cell.config) if not item.key.startswith(NOT_COMPARED)]
    if changed:
        raise ValueError(
            f"{folder} was trained with other settings than the study now gives it ({changed[0]}); name another `dir` for "
            "this study, or remove that folder to train it again"
        )
    return record


def read_result(cell: Cell) -> CellResult | None:
    """Result of a cell's run; None while it is not finished. Raises as `read_record`."""
    record = read_record(cell)
    if record is None:
        return None
    measure = measure_of(cell.config)
    value, speed, tokens = record.last(measure.key), record.typical("tokens_per_second"), record.last("tokens")
    if not record.is_finished() or value is None or speed is None or tokens is None:
        return None
    return CellResult(
        name=cell.name,
        mixer=cell.mixer,
        ratio=cell.ratio,
        task=cell.task,
        seed=cell.seed,
        run_dir=cell.config.run.dir,
        value=value,
        training_loss=record.last("loss"),
        tokens=int(tokens),
        tokens_per_second=speed,
        seconds=record.seconds(),
        hardware=describe_machine(record.environment),
    )


def describe_machine(environment: dict[str, Any]) -> str:
    """Device and threads that a run was trained with, from its environment.json."""
    device = environment.get("device_name") or f"{environment.get('processor')}, {environment.get('cores')} cores"
    return f"{device}, {environment.get('threads_per_rank')} thread(s) a run"


def make_rows(cells: Sequence[Cell], results: Iterable[CellResult], state_tokens: int) -> list[Row]:
    """A row for each mixer and ratio with a finished run, in the order of the cells."""
    by_place: dict[tuple[str, str], dict[str, list[CellResult]]] = {}
    for result in results:
        by_place.setdefault((result.mixer, result.ratio), {}).setdefault(result.task, []).append(result)
    rows = []
    # Reversed, so that of equal keys the first cell (first task, first seed) is the one that remains.
    for cell in {(cell.mixer, cell.ratio): cell for cell in reversed(cells)}.values():
        found = by_place.get((cell.mixer, cell.ratio))
        if not found:
            continue
        counts, tokens = count_parameters(cell.config.model), next(iter(found.values()))[0].tokens
        rows.append(
            Row(
                mixer=cell.mixer,
                ratio=cell.ratio,
                attention_share=cell.attention_share,
                parameters=counts.total,
                active_parameters=counts.active,
                tokens=tokens,
                flops=flops_of_run(cell.config, tokens),
                state_bytes=count_state(cell.config, state_tokens),
                tasks={task: summarize(entries) for task, entries in found.items()},
            )
        )
    order = list(dict.fromkeys((cell.mixer, cell.ratio) for cell in cells))
    return sorted(rows, key=lambda row: order.index((row.mixer, row.ratio)))


def count_state(config: RunConfig, num_tokens: int) -> int:
    """Bytes of a decode state after `num_tokens` tokens of one sequence, in the dtype of training."""
    return state_bytes(config.model, num_tokens, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)


def summarize(results: Sequence[CellResult]) -> TaskSummary:
    """One task's seeds summed up: mean, lowest, highest, and mean speed."""
    values = [result.value for result in results]
    speed = mean(result.tokens_per_second for result in results)
    return TaskSummary(mean(values), min(values), max(values), speed, len(values))


def study_json(
    cells: Sequence[Cell], results: Sequence[CellResult], rows: Sequence[Row], *, state_tokens: int, slots: int
) -> dict[str, Any]:
    """The study as JSON values: everything that table and plots show, and each run."""
    return {
        "planned": len(cells),
        "finished": len(results),
        "runs_at_once": slots,
        "state_tokens": state_tokens,
        "tasks": {cell.task: asdict(measure_of(cell.config)) for cell in cells},
        "table": [asdict(row) for row in rows],
        "runs": [asdict(result) for result in results],
    }


def study_markdown(
    cells: Sequence[Cell], results: Sequence[CellResult], rows: Sequence[Row], *, state_tokens: int, slots: int
) -> str:
    """The table as Markdown, followed by the facts it rests on: tokens per run, runs, hardware, seeds."""
    measures = {cell.task: measure_of(cell.config) for cell in cells}
    header = [
        "mixer",
        "linear : attention",
        "parameters",
        "active",
        "tokens",
        "FLOPs",
        f"state at {state_tokens:,} tokens",
    ]
    for task, measure in measures.items():
        header += [f"{task}: {measure.name}", f"{task}: tokens/s"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        columns = [row.mixer, show_ratio(row.ratio), f"{row.parameters:,}", f"{row.active_parameters:,}"]
        columns += [f"{row.tokens:,}", f"{row.flops:.3g}", f"{row.state_bytes / 1024:,.0f} KiB"]
        for task in measures:
            columns += show_summary(row.tasks.get(task))
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n\n" + state_facts(cells, results, slots)


def state_facts(cells: Sequence[Cell], results: Sequence[CellResult], slots: int) -> str:
    """What a table rests on, as one sentence: tokens per run, runs, hardware, seeds."""
    tasks = dict.fromkeys(cell.task for cell in cells)
    tokens = {task: {result.tokens for result in results if result.task == task} for task in tasks}
    facts = [
        f"{task}: {', '.join(f'{n:,}' for n in sorted(found))} tokens per run"
        for task, found in tokens.items()
        if found
    ]
    facts.append(f"{len(results)} of {len(cells)} runs are finished, {slots} at once")
    facts += dict.fromkeys(result.hardware for result in results)
    facts.append("if there are several seeds, the mean and (lowest to highest)")
    return "; ".join(facts) + ".\n"


def show_summary(summary: TaskSummary | None) -> list[str]:
    """Two columns of the table, value and speed; dashes if nothing is measured yet."""
    if summary is None:
        return ["-", "-"]
    spread = f" ({summary.low:.3f} to {summary.high:.3f})" if summary.seeds > 1 else ""
    return [f"{summary.mean:.3f}{spread}", f"{summary.tokens_per_second:,.0f}"]


def show_ratio(ratio: str) -> str:
    """A ratio in words."""
    return {NO_ATTENTION: "no attention", ONLY_ATTENTION: "attention only"}.get(ratio, ratio)
