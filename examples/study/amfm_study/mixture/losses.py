"""Held-out loss of every source under every finished run: on the same text, whatever the run's mixture is.

Validation in a run draws its rows by the run's own mixture, so that runs would be judged by different text. What was measured
is kept in the run's folder for the next call, so that it goes where the run goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.data_pipeline.durable.json_files import read_object
from amfm.pretrain.inference.evaluate import evaluate_checkpoint
from amfm_study.grid import Cell
from amfm_study.mixture.cells import Search

Array = NDArray[np.float64]


def measure_losses(
    cells: Sequence[Cell],
    search: Search,
    max_tokens: int,
    *,
    device: str,
    progress: Callable[[int, int, str], None],
) -> Array:
    """Losses [n, S] of finished runs, nats per token. Raises ValueError for a source without held-out text."""
    rows = []
    for number, cell in enumerate(cells):
        progress(number, len(cells), cell.name)
        found = losses_of_cell(cell, max_tokens, device)
        missing = [name for name in search.sources if name not in found]
        if missing:
            raise ValueError(
                f"{cell.config.data.store} holds out no text of {missing[0]}, so its loss cannot be measured; raise "
                "data.validation_fraction and run `amfm prepare` again"
            )
        rows.append([found[name] for name in search.sources])
    progress(len(cells), len(cells), "")
    return np.array(rows)


def losses_of_cell(cell: Cell, max_tokens: int, device: str) -> dict[str, float]:
    """Loss by source of one run, measured now or by an earlier call with as many tokens."""
    path = Path(cell.config.run.dir, "held_out.json")
    if path.is_file():
        kept = read_object(path)
        if kept.get("max_tokens") == max_tokens:
            return dict(kept["losses"])
    by_source = evaluate_checkpoint(cell.config.run.dir, max_tokens=max_tokens, device=device).by_source
    losses = {name: source.loss for name, source in by_source.items()}
    write_file_atomically(path, json.dumps({"max_tokens": max_tokens, "losses": losses}).encode() + b"\n")
    return losses
