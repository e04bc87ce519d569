"""What `amfm export` does with other programs: run one on an export, and write the file of llama.cpp."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from amfm.data_pipeline.progress import Waiting
from amfm.launch.console import print_json, print_pairs

if TYPE_CHECKING:
    from amfm.model.huggingface.refusals import ClientName
    from amfm.pretrain.export.clients.check import ClientReport


def check_installed(client: ClientName, python: str) -> None:
    """Reject, before any work, a program that is not installed there. Raises ValueError."""
    from amfm.pretrain.export.clients.check import check_installed

    check_installed(client, python)


def check_client(export: Path, client: ClientName, python: str | None) -> ClientReport:
    """Run a program on an export."""
    from amfm.pretrain.export.clients.check import check_export

    return check_export(export, client, python=python)


def show_check(export: Path, client: ClientName, python: str | None, *, as_json: bool) -> None:
    """Run a program on an export that exists and print what it made of it."""
    with Waiting("amfm export") as waiting:
        waiting(f"running {client}")
        report = check_client(export, client, python)
    if as_json:
        print_json(asdict(report))
    else:
        print_check(export, report)
    require_equal(report)


def print_check(export: Path, report: ClientReport) -> None:
    """Print what a program made of an export."""
    pairs: list[tuple[str, object]] = [("outcome", report.outcome)]
    if report.version is not None:
        pairs.append(("version", report.version))
    if report.max_difference is not None:
        allowed = f"at most {report.tolerance:g} is allowed"
        pairs.append(("largest difference", f"{report.max_difference:.1e} of 64 log-probabilities, {allowed}"))
    pairs += [("differs", problem) for problem in report.problems]
    if report.expected is not None:
        pairs.append(("known", report.expected))
    if report.error is not None:
        pairs.append(("its words", report.error))
    pairs += [(name.replace("_", " "), value) for name, value in report.details.items()]
    print_pairs(f"{report.client} on {export}", pairs)


def require_equal(report: ClientReport | None) -> None:
    """Raise for a program that does not read the export as transformers does: ValueError if that is known of it,
    since another try cannot help, else RuntimeError.
    """
    if report is not None and report.outcome != "equal":
        cause = report.expected or "; ".join(report.problems) or report.error
        raise (ValueError if report.expected else RuntimeError)(
            f"{report.client} does not read this export as transformers does ({report.outcome}): {cause}"
        )


def export_gguf(export: Path, out: Path, python: str | None, *, as_json: bool) -> None:
    """Convert an export to a file of llama.cpp and print what it is."""
    from amfm.pretrain.export.clients.gguf_file import write_gguf

    num_bytes = write_gguf(export, out, python)
    if as_json:
        print_json({"path": str(out), "bytes": num_bytes})
    else:
        print_pairs("Export for llama.cpp", [("file", out), ("bytes", f"{num_bytes:,}"), ("tensors", "float32")])
