"""Verbs about the configuration and the machine: config, doctor."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from launch.console import print_json, print_rows, say
from pretrain.exit_codes import BAD_INPUT, DONE, RUN_FAILED

if TYPE_CHECKING:
    from launch.doctor import Finding

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration file of the run.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Overrides such as train.steps=20 or data.sources.0.weight=2."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output; remarks on standard error.")
]


class CommandWithFields(TyperCommand):
    """A verb whose help ends with the table of configuration fields."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The usual help, then every field of the schema."""
        super().format_help(ctx, formatter)
        print_fields()


def print_fields() -> None:
    """Every setting with type, default and meaning, from the schema."""
    from pretrain.config_fields import describe_fields

    rows = [
        (row.key, row.type, "required" if row.default is None else row.default, row.meaning)
        for row in describe_fields()
    ]
    print_rows("Settings (as keys of the file or as KEY=VALUE)", ("key", "type", "default", "meaning"), rows)


def config(
    path: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", help="The configuration file.")] = None,
    overrides: OverridesArgument = None,
    *,
    diff: Annotated[Path | None, typer.Option(metavar="OTHER.yaml", help="Print only what differs from OTHER.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Also check that this many ranks can run it.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON Schema of configuration files.")] = False,
    fields: Annotated[
        bool, typer.Option("--fields", help="List every setting with type, default and meaning.")
    ] = False,
    reference: Annotated[bool, typer.Option("--reference", help="Print docs/configuration.md.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a configuration and print it resolved: extends and overrides applied, defaults filled in."""
    if schema or fields or reference:
        print_about_schema(schema=schema, reference=reference, as_json=as_json)
        return
    if path is None:
        raise ValueError("no CONFIG.yaml given; name a file, or ask for --schema, --fields or --reference")
    from pretrain.checks import load_checked
    from pretrain.config_file import diff_configs, load_config, resolved_yaml

    resolved = load_checked(path, overrides or [], world_size=ranks)
    if diff is not None:
        differences = diff_configs(load_config(diff), resolved)
        if as_json:
            print_json({item.key: {"other": item.first, "this": item.second} for item in differences})
        else:
            print_rows(
                f"{diff} -> {path}", ("key", str(diff), str(path)), [(d.key, d.first, d.second) for d in differences]
            )
    elif as_json:
        print_json(resolved.model_dump(mode="json"))
    else:
        sys.stdout.write(resolved_yaml(resolved))


def print_about_schema(*, schema: bool, reference: bool, as_json: bool) -> None:
    """The schema itself in one of its forms."""
    from pretrain.config_fields import describe_fields, reference_page
    from pretrain.config_file import config_schema

    if schema:
        print_json(config_schema())
    elif reference:
        sys.stdout.write(reference_page())
    elif as_json:
        print_json(
            {row.key: {"type": row.type, "default": row.default, "meaning": row.meaning} for row in describe_fields()}
        )
    else:
        print_fields()


def doctor(
    *,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Compare all ranks of a launcher and measure what lies between them.")
    ] = False,
    shared: Annotated[
        Path | None, typer.Option(metavar="DIR", help="cluster: the folder that all hosts should see, as run.dir.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="cluster: ranks on this machine, without another launcher.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine, or with --cluster every host, has, what it can run, and what to mend."""
    if cluster:
        raise typer.Exit(doctor_cluster(shared, nproc, as_json=as_json))
    if shared is not None or nproc > 1:
        given = f"--nproc {nproc}" if shared is None else f"--shared {shared}"
        raise ValueError(f"{given} belongs to --cluster; add --cluster, or leave it out")
    from launch.doctor import examine_machine

    if print_findings("This machine", examine_machine(), as_json=as_json):
        raise typer.Exit(BAD_INPUT)


def doctor_cluster(shared: Path | None, nproc: int, *, as_json: bool) -> int:
    """Start the ranks, or be one of them; rank 0 prints. Returns the exit code, the same on every rank."""
    if nproc > 1:
        from launch.local import run_local

        folder = [] if shared is None else ["--shared", str(shared)]
        return run_local(["doctor", "--cluster", *folder, *(["--json"] if as_json else [])], nproc)
    if "RANK" not in os.environ:
        raise ValueError(
            "--cluster compares ranks, and this is none; add --nproc 2, start it with torchrun or srun, or "
            "amfm launch CONFIG.yaml --on ... --doctor"
        )
    from launch.doctor import examine_packages

    missing = [item for item in examine_packages() if item.status == "fail"]
    if missing:
        texts = ", ".join(f"{item.name} is {item.found} ({item.remedy})" for item in missing)
        raise RuntimeError(f"rank {os.environ['RANK']} on {socket.gethostname()} cannot join: {texts}")
    from launch.doctor_cluster import examine_cluster, leave_cluster

    findings = examine_cluster(shared, report=say)
    leave_cluster()
    failed = any(item.status == "fail" for item in findings)
    if os.environ["RANK"] == "0":
        print_findings("This cluster", findings, as_json=as_json)
    return RUN_FAILED if failed else DONE


def print_findings(title: str, findings: Sequence[Finding], *, as_json: bool) -> bool:
    """Findings on standard output; returns whether any is a failure, which is also said."""
    failed = [finding for finding in findings if finding.status == "fail"]
    if as_json:
        print_json({"ok": not failed, "findings": [finding.as_dict() for finding in findings]})
    else:
        marks = {"ok": "ok", "warn": "WARN", "fail": "FAIL"}
        rows = [(marks[item.status], item.name, item.found, item.remedy) for item in findings]
        print_rows(title, ("", "what", "found", "remedy"), rows)
    if failed:
        say(f"amfm: {len(failed)} thing(s) that amfm needs are missing or wrong; the remedies are in the table")
    return bool(failed)


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(
        cls=CommandWithFields,
        epilog="Example: amfm config configs/tiny_cpu.yaml train.seed=1 --diff configs/tiny_cpu.yaml",
    )(config)
    app.command(epilog="Example: amfm doctor --cluster --nproc 2 --shared runs")(doctor)
