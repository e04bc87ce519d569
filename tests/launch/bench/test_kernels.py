"""`amfm bench kernels`: rows that scripts rely on, peers held to our numbers, and documents that it writes."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

from kernels.backend import INTERPRETED
from launch.bench.kernels import compile as bench_kernels_compile
from launch.bench.kernels import cpu as bench_kernels
from launch.bench.kernels.cpu_cases import Case
from launch.bench.kernels.cpu_goals import compare_with_goals
from launch.bench.kernels.cpu_rounds import compare_variants
from launch.bench.kernels.cuda import find_faults, time_case
from launch.bench.kernels.cuda_cases import CUDA_OPERATIONS, CudaCase, Sizes, build_cuda_case
from launch.cli import run
from launch.commands.bench.verbs import print_goals, print_kernel_table
from launch.doctor.machine import examine_compiler

ROW = {"op", "pass", "shape", "dtype", "backend", "milliseconds", "roofline_fraction", "ratio"}
SMALL = Sizes(
    tokens=64, model=32, heads=2, head_dim=16, state=16, experts=4, top_k=2, expert_width=16,
    attention_heads=2, kv_heads=1, attention_dim=16, vocabulary=64,
)  # fmt: skip


def test_a_norm_beside_transformers_as_json_without_a_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    command = ["bench", "kernels", "--op", "gated_rms_norm", "--rounds", "1", "--json"]
    assert run(command) == 0
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


def test_allocator_settings_of_the_environment_are_the_only_treatment_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert run(["bench", "kernels", "--op", "gated_rms_norm", "--rounds", "1"]) == 0
    captured = capsys.readouterr()
    assert "Freed memory as MALLOC_MMAP_MAX_ says" in captured.out
    assert "memory is treated one way, as the environment says in MALLOC_MMAP_MAX_" in captured.out + captured.err
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
    assert run(["bench", "kernels", "--op", "nonsense"]) == 2
    captured = capsys.readouterr().err
    assert "--op nonsense: there is no such operation" in captured
    assert "timing" not in captured


def test_options_that_exclude_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--audit", "--compile-table", "docs/benchmarks/kernels_ahead_of_time.md"]) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can tune")
def test_tuning_without_a_card_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--tune"]) == 2
    assert "--tune times kernels on a CUDA card; this machine has none" in capsys.readouterr().err


def test_variants_that_compute_something_else_are_refused() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    case = Case("copy", "3", torch.float32, (torch.ones(3, requires_grad=True),), {"ours": torch.clone})
    wrong = dataclasses.replace(case, variants={"ours": torch.clone, "peer": double})
    assert compare_variants(case) == {"ours": 0.0}
    with pytest.raises(RuntimeError, match="peer differs from ours by 1 "):
        compare_variants(wrong)


def test_the_audit_counts_in_a_child_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--audit", "--op", "swiglu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["predicted"]
    wanted = {"op", "pass", "bytes", "minimum_bytes", "flops", "minimum_flops", "milliseconds", "roofline_fraction"}
    for row in result["rows"]:
        assert set(row) >= wanted
        assert row["holds"]


def test_an_unknown_operation_is_refused_before_anything_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--audit", "--op", "nonsense"]) == 2
    assert "--op nonsense: there is no such operation; use decay_scan" in capsys.readouterr().err


def test_cases_for_cards_compute_what_float32_does() -> None:
    """On CPU through the torch backend; what needs a card or a package stays out, named in the remarks."""

    def measure(work) -> float:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3

    remarks: list[str] = []
    rows = []
    for op in CUDA_OPERATIONS:
        rows += time_case(build_cuda_case(op, torch.device("cpu"), SMALL), measure, remarks)
    assert {row["op"] for row in rows} == set(CUDA_OPERATIONS)
    for row in rows:
        assert set(row) >= ROW
        # bfloat16 keeps eight bits at each of some ten steps.
        assert row["relative_error"] < 5e-2, row
    if not INTERPRETED:
        assert any("decay_scan: triton cannot run here" in remark for remark in remarks)
        assert find_faults([*CUDA_OPERATIONS], rows) == [f"{op} did not run" for op in CUDA_OPERATIONS]


@pytest.mark.parametrize("error", [0.01, 0.3, float("nan")])
def test_a_kernel_of_ours_that_is_far_from_float32_on_a_card_is_a_fault(
    error: float, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.ones(8, requires_grad=True)
    variants = {"torch": lambda x: 2 * x, "triton": lambda x: 2 * (1 + error) * x, "peer": lambda x: 3 * x}
    case = CudaCase("double", "8", (x,), variants, (64, 8), (64, 8))
    remarks: list[str] = []
    rows = time_case(case, lambda work: 1.0, remarks)
    assert remarks == []
    assert len(find_faults(["double"], rows)) == (error != 0.01)
    print_kernel_table({"rows": rows, "remarks": remarks, "hardware": {"card": "none"}})
    out = capsys.readouterr().out
    assert "off float32" in out and f"{error:.2g}" in out and "0.5" in out


def test_the_compile_table_goes_between_its_markers(tmp_path) -> None:
    row = {
        "kernel": "walk", "architecture": 90, "warps": 4, "registers": 64, "spill_bytes": 8, "shared_bytes": 2048,
        "wgmma": False, "multiplies": True,
    }  # fmt: skip
    result = {"triton": "3.9.0", "rows": [row, row | {"architecture": 80, "wgmma": False}]}
    document = tmp_path / "kernels.md"
    begin, end = bench_kernels_compile.BEGIN, bench_kernels_compile.END
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    bench_kernels_compile.write_table(document, bench_kernels_compile.table_of(result))
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| walk | 4 | 64 / 8 / 2 | 64 / 8 / 2 | no |" in text
    assert "walk: spills 8 bytes a thread and multiplies without wgmma" in text
    document.write_text("nothing")
    with pytest.raises(ValueError, match="must hold the lines"):
        bench_kernels_compile.write_table(document, "table")


@pytest.mark.slow
def test_saving_in_the_background_is_timed_beside_waiting_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "checkpoint", "--rounds", "1", "--threads", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["variants"]) == {"blocking", "background", "torch_dcp", "torch_dcp_async"}
    assert result["variants"]["blocking"]["ratio_to_blocking"] == 1
    # The goal is a tenth; one round on a busy machine proves no more than that the thread does the work.
    assert result["variants"]["background"]["ratio_to_blocking"] < 0.5
    assert 230e6 < result["bytes"] < 240e6
