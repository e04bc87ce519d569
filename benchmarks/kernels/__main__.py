"""`python -m benchmarks.kernels`: operations timed on a CPU, counted or compiled ahead of time, and their tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.commands.doctor import Columns, print_shapes, print_variants
from amfm.launch.console import print_json, print_rows, say
from benchmarks.command import main
from benchmarks.freed_memory import title_of

ON_CPU: Columns = (("as trained", "ratio_as_trained", ".2f"),)


def kernels(
    *,
    op: Annotated[list[str] | None, typer.Option(help="Only this operation; may be given again.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Count bytes and operations of the Triton kernels in the interpreter.")
    ] = False,
    compile_table: Annotated[
        Path | None,
        typer.Option(help="Compile every kernel for sm_80, 90, 100 and write the table into this document."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each variant, taking turns.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time each operation on a CPU vs. transformers' PyTorch code (on a GPU: amfm bench kernels)."""
    if audit and compile_table is not None:
        raise ValueError("--audit and --compile-table measure different things; give one of them")
    if compile_table is not None:
        if op:
            raise ValueError("--compile-table writes the table of all kernels; leave out --op")
        result = _write_compile_table(compile_table)
    elif audit:
        from benchmarks.kernels.audit import audit_kernels

        say("counting in Triton's interpreter, up to ten minutes")
        result = audit_kernels(op)
    else:
        result = _time_kernels(op, rounds, threads)
    if as_json:
        print_json(result)
    elif audit:
        print_audit_table(result)
    elif compile_table is None:
        print_kernel_table(result)


def _write_compile_table(document: Path) -> dict[str, Any]:
    from benchmarks.kernels.compile import check_document, compile_kernels, table_of, write_table

    check_document(document)
    result = compile_kernels(report=say)
    write_table(document, table_of(result))
    say(f"wrote {document}")
    return result


def _time_kernels(names: list[str] | None, rounds: int, threads: int | None) -> dict[str, Any]:
    from benchmarks.kernels.cpu import bench_cpu
    from benchmarks.kernels.cpu_goals import compare_with_goals

    result = bench_cpu(names, rounds=rounds, num_threads=threads, report=say)
    return result | {"goals": compare_with_goals(result["rows"])}


def print_kernel_table(result: dict[str, Any]) -> None:
    """Print the rows of `bench_cpu`, a table for each treatment of freed memory, and the goals."""
    for treatment in dict.fromkeys(row["memory"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["memory"] == treatment]
        print_variants(title_of(treatment), rows, ON_CPU)
    if result.get("goals"):
        print_goals(result["goals"])
    print_shapes(result)


def print_goals(goals: list[dict[str, Any]]) -> None:
    """Print the rows of `compare_with_goals`."""
    table = [
        (
            goal["op"],
            goal["dtype"],
            f"{'holds' if goal['holds'] else 'MISSED'}, >= {goal['limit']:g}",
            *(
                "" if goal[field] is None else f"{goal[field]:.2f}"
                for field in ("as_trained", "compiled", "returned", "kept")
            ),
        )
        for goal in goals
    ]
    columns = ("operation", "dtype", "goal", "as trained", "compiled", "returned", "kept")
    print_rows(
        "Goals: how many times as long as ours transformers takes, each as it trains; ours compiled; memory alike",
        columns,
        table,
    )


def print_audit_table(result: dict[str, Any]) -> None:
    """Print the rows of `audit_kernels`, and which goals hold."""
    rows = [
        (
            row["op"],
            row["pass"],
            row["shape"],
            f"{row['bytes']:,}",
            f"{row['bytes'] / row['minimum_bytes']:.3f}",
            f"{row['requested_bytes'] / row['minimum_bytes']:.2f}",
            f"{row['flops'] / row['minimum_flops']:.2f}" if row["flops"] else "",
            f"{row['milliseconds'] * 1e3:.2f}",
            f"{row['goal_ratio']:.2f} x {row['goal']}" if row["goal"] else "",
            ""
            if row["holds"] is None
            else f"holds, <= {row['goal_limit']}"
            if row["holds"]
            else f"MISSED, > {row['goal_limit']}",
        )
        for row in result["rows"]
    ]
    columns = (
        "operation",
        "pass",
        "shape",
        "bytes",
        "x minimum",
        "asked of cache, x",
        "operations, x",
        "predicted H100 us",
        "goal",
        "",
    )
    print_rows("Counted in the interpreter; times are predicted, not measured", columns, rows)


if __name__ == "__main__":
    main(kernels)
