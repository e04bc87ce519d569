"""`python -m benchmarks.kernels`: rows that scripts rely on, peers checked against our numbers, and documents that it
writes.
"""

from __future__ import annotations

import json

import pytest

from amfm.launch.doctor.machine import examine_compiler
from benchmarks.command import run
from benchmarks.kernels import cpu as bench_kernels
from benchmarks.kernels.__main__ import kernels

ROW = {"op", "pass", "shape", "dtype", "backend", "milliseconds", "roofline_fraction", "ratio"}


@pytest.mark.slow
def test_a_norm_beside_transformers_as_json_without_a_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert run(kernels, ["--op", "gated_rms_norm", "--rounds", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert "timing gated_rms_norm in bf16, ours_compiled left out: there is no C++ compiler" in captured.err
    result = json.loads(captured.out)
    assert len(result["rows"]) == 2 * 2 * 2 * 3
    for row in result["rows"]:
        assert set(row) >= ROW
        assert row["op"] == "gated_rms_norm"
        assert row["milliseconds"] > 0
        assert (row["ratio"] is None) == (row["backend"] == "ours_torch")
        assert (row["ratio_as_trained"] is None) == (row["backend"] == "ours_torch" or row["memory"] == "kept")
    theirs, ours = (
        next(row for row in result["rows"] if (row["memory"], row["backend"], row["pass"]) == (memory, backend, "both"))
        for memory, backend in (("returned", "transformers"), ("kept", "ours_torch"))
    )
    assert theirs["ratio_as_trained"] == pytest.approx(theirs["milliseconds"] / ours["milliseconds"])
    assert {"processor", "torch", "transformers", "threads"} <= set(result["hardware"])
    assert [(goal["op"], goal["dtype"], goal["limit"]) for goal in result["goals"]] == [
        ("gated_rms_norm", "float32", 3.0),
        ("gated_rms_norm", "bf16", 3.0),
    ]
    assert result["goals"][0]["as_trained"] == pytest.approx(theirs["ratio_as_trained"])
    assert result["goals"][0]["returned"] == pytest.approx(theirs["ratio"])
    assert result["goals"][0]["compiled"] is None


@pytest.mark.slow  # the quick one is of a step: tests/benchmarks/test_step.py
def test_allocator_settings_of_the_environment_are_the_only_treatment_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert run(kernels, ["--op", "gated_rms_norm", "--rounds", "1"]) == 0
    captured = capsys.readouterr()
    assert "Freed memory as set by MALLOC_MMAP_MAX_" in captured.out
    assert "memory is treated one way, as set in the environment by MALLOC_MMAP_MAX_" in captured.out + captured.err
    assert "Goals" not in captured.out


@pytest.mark.slow
@pytest.mark.skipif(examine_compiler().status != "ok", reason="nothing compiles here")
def test_a_norm_is_timed_compiled_too_where_there_is_a_compiler() -> None:
    said: list[str] = []
    rows = bench_kernels.bench_cpu(["rms_norm"], rounds=1, num_threads=1, report=said.append)["rows"]
    assert [row["backend"] for row in rows[::3]] == ["ours_torch", "ours_compiled", "transformers"] * 4
    assert said == ["timing rms_norm in float32", "timing rms_norm in bf16"]
    for ours, compiled in zip(rows[:3], rows[3:6], strict=True):
        assert compiled["ratio"] == pytest.approx(compiled["milliseconds"] / ours["milliseconds"])


def test_an_unknown_operation_is_refused_before_anything_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(kernels, ["--op", "nonsense"]) == 2
    captured = capsys.readouterr().err
    assert "--op nonsense: there is no such operation" in captured
    assert "timing" not in captured


def test_options_that_exclude_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(kernels, ["--audit", "--compile-table", "docs/benchmarks/kernels_ahead_of_time.md"]) == 2
    assert "give one of them" in capsys.readouterr().err
