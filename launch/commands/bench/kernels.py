"""`amfm bench kernels`: operations timed on this machine's GPU, or their tiles tuned for it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_rows, say

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
