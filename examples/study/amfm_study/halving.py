"""Successive halving: all settings train to a rung, those with the lowest training loss continue, the others end there.

How it works: a rung is `train.stop_after_steps` of the same run, so a run that is kept continues from its checkpoint, and nothing is
kept but run directories: which settings ended is read from their logged losses, the same in every call. Source: Jamieson and
Talwalkar 2016 (arXiv 1502.07943).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean

from amfm_study.grid import Cell
from amfm_study.study import HalvingConfig
from amfm_study.table import read_record

NEWEST = 0.2  # of the steps until a rung, whose losses are averaged


def rung_step(cell: Cell, rung: float) -> int:
    """The step at which a run reaches a rung."""
    return max(1, round(cell.config.train.steps * rung))


def until_rung(cell: Cell, rung: float) -> Cell:
    """The run as it goes to a rung, and saves there."""
    train = cell.config.train.model_copy(update={"stop_after_steps": rung_step(cell, rung)})
    return replace(cell, config=cell.config.model_copy(update={"train": train}))


def loss_at(cell: Cell, step: int) -> float | None:
    """Mean training loss of the newest steps until this one; None while the run has not come so far.

    A run without a finite loss there has an infinite one.
    """
    record = read_record(cell)
    if record is None or record.last_step() < step:
        return None
    losses = [loss for at, loss in zip(*record.series("loss")) if step * (1 - NEWEST) < at <= step]
    return mean(losses) if losses else math.inf


def halve(
    cells: Sequence[Cell], halving: HalvingConfig, train: Callable[[Sequence[Cell]], None]
) -> tuple[list[Cell], dict[str, tuple[int, float]]]:
    """The runs that go to their end, and of each other setting and task the step and training loss at which it ended.

    `train` takes runs to where their configurations stop. Settings are judged by task, over the seeds.
    """
    going, ended = list(cells), dict[str, tuple[int, float]]()
    for rung in halving.rungs:
        missing = [cell for cell in going if loss_at(cell, rung_step(cell, rung)) is None]
        if missing:
            train([until_rung(cell, rung) for cell in missing])
        losses: dict[tuple[str, str], list[float]] = {}
        for cell in going:
            found = loss_at(cell, rung_step(cell, rung))
            losses.setdefault((cell.task, cell.mixer), []).append(math.inf if found is None else found)
        kept: set[tuple[str, str]] = set()
        for task in {task for task, _ in losses}:
            ranked = sorted((mean(found), key) for key, found in losses.items() if key[0] == task)
            kept |= {key for _, key in ranked[: max(1, math.ceil(len(ranked) * halving.keep))]}
        for cell in going:
            if (cell.task, cell.mixer) not in kept:
                ended[f"{cell.mixer}-{cell.task}"] = rung_step(cell, rung), mean(losses[cell.task, cell.mixer])
        going = [cell for cell in going if (cell.task, cell.mixer) in kept]
    return going, ended
