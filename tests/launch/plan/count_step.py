"""What ranks hand to collectives in a real step of a small model, vs. what the plan's formulas say.

Two steps are trained under a dispatch mode that counts each collective; the second one counts, as the first sets things up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from amfm_simulate.count_collectives import CommunicationCounter, Traffic
from amfm_simulate.step_traffic import check_exact, expected_bytes

from amfm.launch.plan.layout import Layout
from amfm.pretrain.config.schema import RunConfig
from benchmarks.small_steps import begin_ranks, build_for_steps, load_small, take_step
from tests.helpers.shards import sum_traffic


def load_layout(overrides: Sequence[str], world_size: int) -> RunConfig:
    """Load the benchmark's configuration with overrides.

    Raises ConfigError with every problem, ValueError for settings whose bytes have no formula.
    """
    config = load_small(overrides, world_size)
    check_exact(config, Layout.of(config, world_size))
    return config


def compare_bytes(config: RunConfig) -> dict[str, Any]:
    """Collectives of a step by axis, kind and dtype: bytes counted and by formula, and whether all agree.

    Every rank must call this; all get the same.
    """
    counted, world_size = count_step(config), torch.distributed.get_world_size()
    expected = expected_bytes(config, world_size)
    found = {(row.axis, row.collective, row.dtype): row for row in counted}
    rows = []
    for key in sorted(found.keys() | expected.keys()):
        row = found.get(key, Traffic(*key, 0, 0, 0))
        rows.append({**asdict(row), "formula_bytes": expected.get(key, 0)})
    return {
        "ranks": world_size,
        "rows": rows,
        "equal": all(row["handed_bytes"] == row["formula_bytes"] for row in rows),
    }


def count_step(config: RunConfig) -> list[Traffic]:
    """Train two steps and count what all ranks together send in the second. Every rank must call this."""
    parallel = begin_ranks(config)
    engine, pipeline = build_for_steps(config, parallel)
    take_step(config, parallel, engine, pipeline)
    # Of the second step: what only the first one sends is not what training costs.
    with CommunicationCounter(parallel.groups) as counter:
        take_step(config, parallel, engine, pipeline)
    return sum_traffic(parallel.gather_objects(counter.traffic()))
