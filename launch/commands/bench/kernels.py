"""`amfm bench kernels`: operations timed, counted, tuned or compiled ahead of time, and their tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.bench.freed_memory import title_of
from amfm.launch.console import print_json, print_rows, say


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
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Choose tiles for this CUDA card, each proved before it is timed; saved for training."
        ),
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each variant, taking turns (CPU).")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time each operation beside public peers: transformers' PyTorch code on CPU, installed kernel packages on CUDA."""
    if audit + (compile_table is not None) + tune > 1:
        raise ValueError("--audit, --compile-table and --tune measure different things; give one of them")
    if compile_table is not None:
        if op:
            raise ValueError("--compile-table writes the table of all kernels; leave out --op")
        result = _write_compile_table(compile_table)
    elif audit:
        from amfm.launch.bench.kernels.audit import audit_kernels

        say("counting in Triton's interpreter, up to ten minutes")
        result = audit_kernels(op)
    elif tune:
        result = _tune_kernels(op)
    else:
        result = _time_kernels(op, rounds, threads)
    if as_json:
        print_json(result)
    elif audit:
        print_audit_table(result)
    elif tune:
        say(f"{len(result['configs'])} kernels have tuned tiles on this card")
    elif compile_table is None:
        print_kernel_table(result)
    if result.get("faults"):
        raise RuntimeError(
            f"our kernels are at fault on this card: {'; '.join(result['faults'])}; train with kernels.backend: torch"
        )


def _write_compile_table(document: Path) -> dict[str, Any]:
    from amfm.launch.bench.kernels.compile import check_document, compile_kernels, table_of, write_table

    check_document(document)
    result = compile_kernels(report=say)
    write_table(document, table_of(result))
    say(f"wrote {document}")
    return result


def _tune_kernels(names: list[str] | None) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--tune times kernels on a CUDA card; this machine has none")
    from amfm.launch.bench.kernels.cuda import tune_cuda

    return tune_cuda(names, report=say)


def _time_kernels(names: list[str] | None, rounds: int, threads: int | None) -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        from amfm.launch.bench.kernels.cuda import bench_cuda

        return bench_cuda(names, report=say)
    from amfm.launch.bench.kernels.cpu import bench_cpu
    from amfm.launch.bench.kernels.cpu_goals import compare_with_goals

    result = bench_cpu(names, rounds=rounds, num_threads=threads, report=say)
    return result | {"goals": compare_with_goals(result["rows"])}


def print_kernel_table(result: dict[str, Any]) -> None:
    """Print the rows of a kernel benchmark, a line a variant.

    Of `bench_cpu` there is a table for each treatment of freed memory, of `bench_cuda` one.
    """
    for treatment in dict.fromkeys(row.get("memory") for row in result["rows"]):
        rows = [row for row in result["rows"] if row.get("memory") == treatment]
        title = title_of(treatment) if treatment else "Operations side by side, medians"
        _print_variants(title, rows, on_cpu=treatment is not None)
    if result.get("goals"):
        print_goals(result["goals"])
    for op, shape in {row["op"]: row["shape"] for row in result["rows"]}.items():
        say(f"{op}: {shape}")
    for remark in result.get("remarks", ()):
        say(remark)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


def _print_variants(title: str, rows: list[dict[str, Any]], *, on_cpu: bool) -> None:
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["op"], row["dtype"], row["backend"])
        lines.setdefault(key, {})[row["pass"]] = row
    last = (
        [("as trained", "ratio_as_trained", ".2f")]
        if on_cpu
        else [("of roofline", "roofline_fraction", ".0%"), ("worst off float32", "relative_error", ".2g")]
    )
    table = [
        (
            *key,
            *(f"{passes[which]['milliseconds']:.3g}" for which in ("forward", "backward", "both")),
            *(
                format(passes["both"][field], form) if passes["both"][field] else ""
                for _, field, form in (("x ours", "ratio", ".2f"), *last)
            ),
        )
        for key, passes in lines.items()
    ]
    columns = ["operation", "dtype", "variant", "forward ms", "backward", "both", "x ours"]
    print_rows(title, [*columns, *(name for name, _, _ in last)], table)


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
