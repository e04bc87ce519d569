"""Verbs that measure: `amfm bench ...`, side by side in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from launch.arguments import JsonOption, OverridesArgument
from launch.bench.freed_memory import title_of
from launch.commands.bench.data import data
from launch.commands.bench.memory import memory
from launch.commands.bench.published import plan
from launch.console import print_json, print_rows, say

PLAIN = ("ours_fp32", "ours_bf16")
COMPILED = ("ours_fp32_compiled", "ours_bf16_compiled")
PEER = ("transformers_default", "transformers_tuned")
STEP_ROUNDS = 8

bench = typer.Typer(
    help="Measure side by side, in one run.",
    epilog="Example: amfm bench step --peer transformers",
    no_args_is_help=True,
)


@bench.command(epilog="Example: amfm bench step --peer transformers --compiled --json")
def step(
    overrides: OverridesArgument = None,
    *,
    peer: Annotated[Literal["transformers", "none"], typer.Option(help="Whose step to time beside ours.")] = "none",
    compiled: Annotated[
        bool, typer.Option(help="Also time our step with compiled blocks (minutes to compile).")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed steps of each variant, taking turns; default: 8, with --sweep 3.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: all cores, with --sweep one.")
    ] = None,
    sweep: Annotated[
        Literal["length"] | None,
        typer.Option(
            help="Time small models of one mixer each instead, the same tokens cut into longer and longer rows."
        ),
    ] = None,
    mixers: Annotated[
        str | None, typer.Option(metavar="M,G,gla", help="With --sweep: letters or names; default: all, and attention.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="1024,16384", help="With --sweep: tokens a row; a step holds the longest row's."),
    ] = None,
    comm: Annotated[
        bool, typer.Option("--comm", help="Count what ranks send instead, under the layout that KEY=VALUE give.")
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this machine, with --comm.")] = 1,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.yaml", help="Measure blocks instead, and write this machine as a file for `amfm plan --gpu`."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a training step of a 19.5M-parameter Granite-shaped hybrid: 4 rows of 512 tokens, same weights for all.

    With --comm: bytes of a small model's step by axis and collective, counted and by formula. With --calibration: a
    hardware file, and how well the plan then does. With --sweep length: tokens a second of each sequence mixer by row
    length, and which are flat.
    """
    if sweep is not None:
        if comm or compiled or calibration is not None or peer != "none" or overrides or nproc > 1:
            raise ValueError(
                "--sweep length times models of its own; beside it give --mixers, --lengths, --rounds alone"
            )
        from launch.commands.bench.length import sweep_lengths

        sweep_lengths(mixers, lengths, rounds, threads, as_json=as_json)
        return
    if mixers is not None or lengths is not None:
        raise ValueError("--mixers and --lengths choose what --sweep length times; add it, or remove them")
    rounds = rounds or STEP_ROUNDS
    if calibration is not None and (comm or compiled or peer != "none"):
        raise ValueError("--calibration measures blocks of its own; leave out --comm, --compiled and --peer")
    if comm:
        from launch.commands.bench.communication import count_communication

        raise typer.Exit(count_communication(overrides or [], nproc, as_json=as_json))
    if overrides or nproc > 1:
        raise ValueError("KEY=VALUE and --nproc give a layout to count; add --comm, or remove them")
    if calibration is not None:
        _calibrate(calibration, rounds, threads, as_json=as_json)
        return
    from launch.bench.step import bench_step

    names = [*(PEER if peer == "transformers" else ()), "bare_loop", *PLAIN, *(COMPILED if compiled else ())]
    result = bench_step(names, rounds=rounds, num_threads=threads, report=say)
    if as_json:
        print_json(result)
    else:
        print_step_table(result)


def _calibrate(path: Path, rounds: int, threads: int | None, *, as_json: bool) -> None:
    if path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
        raise ValueError(f"--calibration {path} must end in .yaml and lie in a folder that exists; use hardware.yaml")
    from launch.bench.calibration import calibrate, write_hardware

    hardware, checks = calibrate(rounds=rounds, num_threads=threads, report=say)
    write_hardware(hardware, checks, path)
    if as_json:
        found = [{"name": c.name, "planned_seconds": c.planned, "measured_seconds": c.measured} for c in checks]
        print_json({"hardware": hardware.model_dump(), "checks": found})
    else:
        print_rows(
            f"{hardware.name} as in {path}",
            ("whole steps", "planned s", "measured s", "error"),
            [(c.name, f"{c.planned:.3f}", f"{c.measured:.3f}", f"{c.error:+.0%}") for c in checks],
        )


def print_step_table(result: dict[str, Any]) -> None:
    """The variants of `bench_step`: each as it trains, then with memory treated alike, and what they were measured on."""
    variants = result["variants"]
    if all(figures["as_trained"] for figures in variants.values()):
        rows = [
            (name, *_step_figures(figures["as_trained"]), f"{figures['first_loss']:.5f}")
            for name, figures in variants.items()
        ]
        columns = ("variant", "median s", "tokens/s", "x transformers", "first loss")
        title = "Each as it trains: transformers returns freed memory, ours keeps it"
        print_rows(f"A training step, {result['rounds']} rounds in turns. {title}", columns, rows)
    for treatment in next(iter(variants.values()))["memory"]:
        rows = []
        for name, figures in variants.items():
            taken = figures["memory"][treatment]
            rows.append((name, *_step_figures(taken), f"{taken['seconds_min']:.3f} to {taken['seconds_max']:.3f}"))
        columns = ("variant", "median s", "tokens/s", "x transformers", "min to max s")
        print_rows(title_of(treatment), columns, rows)
    for remark in result["remarks"]:
        say(remark)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


def _step_figures(figures: dict[str, Any]) -> tuple[str, str, str]:
    """Median seconds, tokens a second, and how many times as fast as transformers' default."""
    ratio = figures["ratio_to_transformers_default"]
    return f"{figures['seconds']:.3f}", f"{figures['tokens_per_second']:,.0f}", f"{ratio:.2f}" if ratio else ""


@bench.command(epilog="Example: amfm bench checkpoint --folder runs --json")
def checkpoint(
    *,
    folder: Annotated[Path | None, typer.Option(help="A folder on the disk to measure; default: /tmp.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed saves of each variant, taking turns.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time saving 234 MB of state: waiting for the disk, beside training, and torch's own checkpoints."""
    from launch.bench.checkpoint import bench_checkpoint

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    result = bench_checkpoint(folder, rounds=rounds, num_threads=threads, report=say)
    if as_json:
        print_json(result)
    else:
        print_checkpoint_table(result)


def print_checkpoint_table(result: dict[str, Any]) -> None:
    """The variants of `bench_checkpoint` as a table, and what they were measured on."""
    rows = [
        (
            name,
            f"{figures['stall_seconds']:.3f}",
            f"{figures['ratio_to_blocking']:.1%}",
            f"{figures['first_stall_seconds']:.3f}",
            f"{figures['durable_seconds']:.3f}",
            f"{figures['step_beside_seconds']:.3f}" if figures["step_beside_seconds"] else "",
        )
        for name, figures in result["variants"].items()
    ]
    columns = ("variant", "training waits s", "of blocking", "first time s", "durable after s", "step meanwhile s")
    print_rows(f"Saving {result['bytes'] / 1e6:.0f} MB, medians of {result['rounds']} rounds", columns, rows)
    say(f"a step alone takes {result['step_alone_seconds']:.3f} s")
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


@bench.command(epilog="Example: amfm bench kernels --op decay_scan --json")
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
        from launch.bench.kernels.audit import audit_kernels

        say("counting in Triton's interpreter, a minute or two")
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
        say(f"wrote {result['path']}: {len(result['configs'])} kernels")
    elif compile_table is None:
        print_kernel_table(result)
    if result.get("faults"):
        raise RuntimeError(
            f"our kernels are at fault on this card: {'; '.join(result['faults'])}; train with kernels.backend: torch"
        )


def _write_compile_table(document: Path) -> dict[str, Any]:
    from launch.bench.kernels.compile import check_document, compile_kernels, table_of, write_table

    check_document(document)
    result = compile_kernels(report=say)
    write_table(document, table_of(result))
    say(f"wrote {document}")
    return result


def _tune_kernels(names: list[str] | None) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--tune times kernels on a CUDA card; this machine has none")
    from launch.bench.kernels.cuda import tune_cuda

    return tune_cuda(names, report=say)


def _time_kernels(names: list[str] | None, rounds: int, threads: int | None) -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        from launch.bench.kernels.cuda import bench_cuda

        return bench_cuda(names, report=say)
    from launch.bench.kernels.cpu import bench_cpu
    from launch.bench.kernels.cpu_goals import compare_with_goals

    result = bench_cpu(names, rounds=rounds, num_threads=threads, report=say)
    return result | {"goals": compare_with_goals(result["rows"])}


def print_kernel_table(result: dict[str, Any]) -> None:
    """The rows of `bench_cpu`, a table for each treatment of freed memory, or of `bench_cuda`; a line a variant."""
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
        else [("of roofline", "roofline_fraction", ".0%"), ("off float32", "relative_error", ".2g")]
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
    """The rows of `compare_with_goals`."""
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
    """The rows of `audit_kernels`, and which goals hold."""
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


def add_verbs(app: typer.Typer) -> None:
    """Add `bench` to the command."""
    bench.command(epilog="Example: amfm bench data --megabytes 120 --json")(data)
    bench.command(epilog="Example: amfm bench memory configs/ladder_20m.yaml parallel.tensor=2 --nproc 2")(memory)
    bench.command(epilog="Example: amfm bench plan configs")(plan)
    app.add_typer(bench, name="bench")
