"""Verbs that look at the machine available: doctor and `amfm bench ...`. Benchmarks of a clone are in benchmarks/.

`amfm bench kernels`: operations timed on this machine's GPU, or their tiles tuned for it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amfm.launch.arguments import JsonOption
from amfm.launch.console import loading, print_json, print_rows, say
from amfm.pretrain.launcher_protocol import BAD_INPUT, DONE, RUN_FAILED

if TYPE_CHECKING:
    from amfm.launch.doctor.machine import Finding


def doctor(
    *,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Compare all ranks of a launcher and measure the links between them.")
    ] = False,
    shared: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --cluster: a folder that all hosts share, such as run.dir.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="With --cluster: start this many ranks on this machine.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out devices and Triton, for which torch is loaded.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The verb `doctor`."""
    if cluster and quick:
        raise ValueError("--quick leaves out what --cluster measures; give one of the two")
    if cluster:
        raise typer.Exit(doctor_cluster(shared, nproc, as_json=as_json))
    if shared is not None or nproc > 1:
        given = f"--nproc {nproc}" if shared is None else f"--shared {shared}"
        raise ValueError(f"{given} belongs to --cluster; add --cluster, or leave it out")
    from amfm.launch.doctor.machine import examine_machine

    if quick:
        if print_findings("This machine, without devices", examine_machine(quick=True), as_json=as_json):
            raise typer.Exit(BAD_INPUT)
        return
    with loading("doctor", "the packages that amfm needs, to see whether they work"):
        findings = examine_machine()
    if print_findings("This machine", findings, as_json=as_json):
        raise typer.Exit(BAD_INPUT)


def doctor_cluster(shared: Path | None, nproc: int, *, as_json: bool) -> int:
    """Start the ranks, or be one of them; rank 0 prints. Returns the exit code, the same on every rank.

    Raises ValueError if this process is not a rank and starts none, RuntimeError if a package is missing.
    """
    if nproc > 1:
        from amfm.launch.cluster.local import run_local

        folder = [] if shared is None else ["--shared", str(shared)]
        return run_local(["doctor", "--cluster", *folder, *(["--json"] if as_json else [])], nproc)
    if "RANK" not in os.environ:
        raise ValueError(
            "--cluster compares ranks, and this process is not a rank; add --nproc 2, start it with torchrun or srun, or "
            "amfm launch CONFIG.yaml --on ... --doctor"
        )
    from amfm.launch.doctor.machine import examine_packages

    # The measurements import torch: name what is missing, and the host, instead of failing in an import.
    missing = [item for item in examine_packages() if item.status == "fail"]
    if missing:
        texts = ", ".join(f"{item.name} is {item.found} ({item.remedy})" for item in missing)
        raise RuntimeError(f"rank {os.environ['RANK']} on {socket.gethostname()} cannot join: {texts}")
    from amfm.launch.doctor.cluster import examine_cluster, leave_cluster

    findings = examine_cluster(shared, report=say)
    leave_cluster()
    failed = any(item.status == "fail" for item in findings)
    if os.environ["RANK"] == "0":
        print_findings("This cluster", findings, as_json=as_json)
    return RUN_FAILED if failed else DONE


def print_findings(title: str, findings: Sequence[Finding], *, as_json: bool) -> bool:
    """Print findings on standard output; returns whether any is a failure."""
    failed = [finding for finding in findings if finding.status == "fail"]
    if as_json:
        print_json({"ok": not failed, "findings": [finding.as_dict() for finding in findings]})
    else:
        marks = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}
        rows = [(marks[item.status], item.name, item.found, item.remedy) for item in findings]
        print_rows(title, ("", "check", "found", "fix"), rows)
    if failed:
        say(f"amfm: {len(failed)} thing(s) that amfm needs are missing or wrong; the fixes are in the table")
    return bool(failed)


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
    cases: Annotated[str | None, typer.Option(help="Module with the operations of a package; default: ours.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time each operation on this GPU against PyTorch and installed kernel packages."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "this measures kernels on a CUDA GPU, and this machine has none; a clone times them on a CPU by "
            "python -m benchmarks.kernels"
        )
    from amfm.kernels.runtime.first_use import DEFAULT_CASES
    from amfm.launch.bench.kernels import bench_cuda, tune_cuda

    result = (tune_cuda if tune else bench_cuda)(op, cases or DEFAULT_CASES, report=say)
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


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm doctor --cluster --nproc 2 --shared runs")(doctor)
    bench = typer.Typer(epilog="Example: amfm bench kernels", no_args_is_help=True)
    bench.command(epilog="Example: amfm bench kernels --op decay_scan --json")(kernels)
    app.add_typer(bench, name="bench")
