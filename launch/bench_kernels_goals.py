"""How many times as fast as transformers' defaults an operation of ours is to be on a CPU, and what a run says of it."""

from __future__ import annotations

from typing import Any

from launch.freed_memory import KEPT, RETURNED

# Times as long as ours, both passes, by dtype.
GOALS = {
    "decay_scan": {"float32": 4.0, "bf16": 6.0},
    "gated_rms_norm": {"float32": 3.0, "bf16": 3.0},
    "causal_conv1d": {"float32": 3.0, "bf16": 3.0},
    "moe": {"bf16": 4.0},
}


def compare_with_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of `bench_cpu`: for each goal among their operations, how many times as long transformers takes.

    `op`, `dtype`, `limit`, `as_trained` (transformers with freed memory returned over ours with it kept), `compiled` (the
    same over ours as `train.compile` makes it, None where that was not timed), `returned` and `kept` (both sides alike),
    and `holds`, which is said of `as_trained`. Empty where memory could be treated in one way alone.
    """
    times = {
        (row["op"], row["dtype"], row["backend"], row["memory"]): row["milliseconds"]
        for row in rows
        if row["pass"] == "both"
    }
    if {memory for *_, memory in times} != {RETURNED, KEPT}:
        return []
    named = {row["op"] for row in rows}
    return [_compare(op, dtype, limit, times) for op in GOALS if op in named for dtype, limit in GOALS[op].items()]


def _compare(op: str, dtype: str, limit: float, times: dict[tuple[str, str, str, str], float]) -> dict[str, Any]:
    def ratio(theirs: str, backend: str, ours: str) -> float | None:
        time = times.get((op, dtype, backend, ours))
        return None if time is None else times[op, dtype, "transformers", theirs] / time

    as_trained = ratio(RETURNED, "ours_torch", KEPT)
    assert as_trained is not None, "ours is timed in every run"
    return {
        "op": op,
        "dtype": dtype,
        "limit": limit,
        "as_trained": as_trained,
        "compiled": ratio(RETURNED, "ours_compiled", KEPT),
        "returned": ratio(RETURNED, "ours_torch", RETURNED),
        "kept": ratio(KEPT, "ours_torch", KEPT),
        "holds": as_trained >= limit,
    }
