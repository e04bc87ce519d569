"""Steps with gradients that are not finite: skipped on every rank, written down, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_pipeline.batch import Batch
from pretrain.grads import GradientFault
from pretrain.parallel import Parallel


def describe_skip(
    parallel: Parallel, batches: Sequence[Batch], losses: Sequence[float], fault: GradientFault | None
) -> dict[str, Any]:
    """What is known about a skipped step: its samples, and per rank the first bad parameter and the bad micro-batches.

    Every rank must call this; the answer is the same on all.
    """
    own = {
        "rank": parallel.rank,
        "sample_ids": [list(batch.sample_ids) for batch in batches],
        "losses": [repr(loss) for loss in losses],
        "fault": None if fault is None else asdict(fault),
    }
    reports = parallel.gather_objects(own)
    bad_samples = [
        ids
        for report in reports
        for ids, loss in zip(report["sample_ids"], report["losses"])
        if loss in ("nan", "inf", "-inf")
    ]
    return {
        "sample_ids": sorted({sample for report in reports for ids in report["sample_ids"] for sample in ids}),
        "samples_with_bad_loss": bad_samples,
        "faults": [{"rank": report["rank"], **report["fault"]} for report in reports if report["fault"] is not None],
    }


def is_hopeless(skipped_in_row: int, max_skipped_steps: int) -> bool:
    """Whether the run must stop: `max_skipped_steps` in a row were skipped (the first one already if that is 0)."""
    return skipped_in_row > 0 and skipped_in_row >= max_skipped_steps
