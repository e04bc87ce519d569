"""Speed goals of our CPU operations over transformers' defaults, and whether a run of `bench_cpu` meets them."""

from __future__ import annotations

from typing import Any

from benchmarks.freed_memory import KEPT, RETURNED

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
    same over ours as `train.compile` makes it, None if that was not timed), `returned` and `kept` (both sides alike),
    and `holds`, which is said of `as_trained`. Empty where memory could be treated in only one way.
    """
    both = {(row["op"], row["dtype"], row["backend"], row["memory"]): row for row in rows if row["pass"] == "both"}
    found = []
    for op, dtype, limit in ((op, dtype, limit) for op, limits in GOALS.items() for dtype, limit in limits.items()):
        returned, kept = (both.get((op, dtype, "transformers", memory)) for memory in (RETURNED, KEPT))
        if returned is None or kept is None:
            continue
        compiled = both.get((op, dtype, "ours_compiled", KEPT))
        found.append(
            {
                "op": op,
                "dtype": dtype,
                "limit": limit,
                "as_trained": returned["ratio_as_trained"],
                "compiled": returned["milliseconds"] / compiled["milliseconds"] if compiled else None,
                "returned": returned["ratio"],
                "kept": kept["ratio"],
                "holds": returned["ratio_as_trained"] >= limit,
            }
        )
    return found
