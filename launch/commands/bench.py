"""Verbs that measure the machine available: `amfm bench ...`. Those of a clone are in benchmarks/.

`amfm bench calibrate`: this machine as a file for `amfm plan --gpu`, and how well the plan then does.

`amfm bench kernels`: operations timed on this machine's GPU, or their tiles tuned for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say


def calibrate(
    path: Annotated[Path, typer.Argument(metavar="OUT.yaml", help="The hardware file to write.")],
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps per model; the models take turns.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure peak speeds and steps of six small models, and write a hardware file for `amfm plan --gpu`.

    The plan of steps that were not fitted is printed next to their measured time.
    """
    if path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
        raise ValueError(f"{path} must end in .yaml and be in a folder that exists; use hardware.yaml")
    from amfm.launch.bench.calibration import calibrate as measure
    from amfm.launch.bench.calibration import write_hardware

    hardware, checks = measure(rounds=rounds, num_threads=threads, report=say)
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


# Columns of a row that differ between machines: title, field, format.
Columns = tuple[tuple[str, str, str], ...]
ON_CUDA: Columns = (("of roofline", "roofline_fraction", ".0%"), ("worst off float32", "relative_error", ".2g"))


def kernels(
    *,
    op: Annotated[list[str] | None, typer.Option(help="Only this operation; repeatable.")] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Choose tiles for this GPU and save them for training; each is verified before it is timed."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Time each operation on this GPU against PyTorch and installed kernel packages."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "this measures kernels on a CUDA GPU, and this machine has none; a clone times them on a CPU by "
            "python -m benchmarks.kernels"
        )
    from amfm.launch.bench.kernels import bench_cuda, tune_cuda

    result = tune_cuda(op, report=say) if tune else bench_cuda(op, report=say)
    if as_json:
        print_json(result)
    elif tune:
        say(f"{len(result['configs'])} kernels have tuned tiles on this GPU")
    else:
        print_kernel_table(result)
    if result["faults"]:
        raise RuntimeError(
            f"our kernels are at fault on this GPU: {'; '.join(result['faults'])}; train with kernels.backend: torch"
        )


def print_kernel_table(result: dict[str, Any]) -> None:
    """Print the rows of `bench_cuda`, a line a variant."""
    print_variants("Operations side by side, medians", result["rows"], ON_CUDA)
    print_shapes(result)


def print_shapes(result: dict[str, Any]) -> None:
    """Print the sizes of each operation, warnings, and what they were measured on."""
    for op, shape in {row["op"]: row["shape"] for row in result["rows"]}.items():
        say(f"{op}: {shape}")
    for remark in result.get("remarks", ()):
        say(remark)
    say(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))


def print_variants(title: str, rows: list[dict[str, Any]], last: Columns) -> None:
    """Print a line for each variant of each operation, `last` after the columns that all machines have."""
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["op"], row["dtype"], row["backend"])
        lines.setdefault(key, {})[row["pass"]] = row
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


VERBS = (
    (calibrate, "amfm bench calibrate own.yaml --threads 1"),
    (kernels, "amfm bench kernels --op decay_scan --json"),
)


def add_verbs(app: typer.Typer) -> None:
    """Add `bench` to the command."""
    bench = typer.Typer(
        epilog="Example: amfm bench kernels",
        no_args_is_help=True,
    )
    for verb, example in VERBS:
        bench.command(epilog=f"Example: {example}")(verb)
    app.add_typer(bench, name="bench")
