"""`python -m benchmarks.kernels --audit`: bytes and operations, counted in the interpreter."""

from __future__ import annotations

import json

import pytest

from benchmarks.command import run
from benchmarks.kernels.__main__ import kernels


@pytest.mark.slow
def test_the_audit_counts_in_a_child_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(kernels, ["--audit", "--op", "swiglu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["predicted"]
    wanted = {"op", "pass", "bytes", "minimum_bytes", "flops", "minimum_flops", "milliseconds", "roofline_fraction"}
    for row in result["rows"]:
        assert set(row) >= wanted
        assert row["holds"], row
        assert row["bytes"] >= row["minimum_bytes"]
        assert row["milliseconds"] == pytest.approx(row["bytes"] / 3.0e12 * 1e3)
    assert {row["pass"] for row in result["rows"]} == {"forward", "backward"}


def test_an_unknown_operation_is_refused_before_anything_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(kernels, ["--audit", "--op", "nonsense"]) == 2
    assert "--op nonsense: there is no such operation; use attention" in capsys.readouterr().err
