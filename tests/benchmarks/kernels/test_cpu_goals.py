"""Goals of the kernels on a CPU: what holds and what is missed."""

from __future__ import annotations

import pytest

from benchmarks.kernels.__main__ import print_goals
from benchmarks.kernels.cpu_goals import compare_with_goals


def test_a_goal_is_missed_by_a_hair_and_held_at_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    def row(dtype: str, backend: str, memory: str, milliseconds: float, ratio: float) -> dict[str, object]:
        return {
            "op": "gated_rms_norm", "pass": "both", "dtype": dtype, "memory": memory, "backend": backend,
            "milliseconds": milliseconds, "ratio": ratio, "ratio_as_trained": milliseconds / 2.0,
        }  # fmt: skip

    rows = [
        each
        for dtype, theirs in (("float32", 6.0), ("bf16", 5.99))
        for each in (
            row(dtype, "transformers", "returned", theirs, 1.7),
            row(dtype, "transformers", "kept", 3.0, 1.5),
            row(dtype, "ours_compiled", "kept", 1.0, 0.5),
        )
    ]
    held, missed = compare_with_goals(rows)
    assert held["holds"] and not missed["holds"]
    assert [held[name] for name in ("as_trained", "compiled", "returned", "kept")] == [3.0, 6.0, 1.7, 1.5]
    print_goals([held, missed])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "gated_rms_norm" in line]
    assert "holds," in lines[0] and "MISSED," in lines[1]
    assert compare_with_goals([row for row in rows if row["memory"] == "kept"]) == []
