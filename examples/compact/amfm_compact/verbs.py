"""The verb compact: what pruning set to zero is removed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import CheckpointArgument, JsonOption
from amfm.launch.console import print_json, print_pairs


def compact(
    checkpoint: CheckpointArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output folder for the weights; must be missing or empty.")
    ],
    *,
    as_json: JsonOption = False,
) -> None:
    """The verb `compact`.

    OUT is a weights folder: for export, generation, evaluation, or run.initial_weights of a run that trains on.
    """
    from amfm_compact.shrink import shrink_checkpoint

    with Waiting("amfm compact") as waiting:
        report = shrink_checkpoint(checkpoint, out, waiting)
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "parameters": [report.parameters_before, report.parameters_after],
                "groups": {place: list(counts) for place, counts in report.counts.items()},
                "max_logit_difference": report.max_logit_difference,
                "compared": report.compared,
                "model": report.model.model_dump(mode="json"),
            }
        )
        return
    share = report.parameters_after / report.parameters_before
    pairs: list[tuple[str, Any]] = [
        ("folder", report.path),
        ("parameters", f"{report.parameters_before:,} -> {report.parameters_after:,} ({share:.1%})"),
        *((place, f"{before:,} -> {after:,}") for place, (before, after) in report.counts.items()),
        ("verification", f"largest logit difference {report.max_logit_difference:.1e} on {report.compared}"),
    ]
    print_pairs("Compacted", pairs)
