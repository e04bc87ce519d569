"""What `amfm export --check PROGRAM` and `--format gguf` do and print: parts of the verb, entry points of `amfm.verbs`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from amfm.data_pipeline.terminal import Report, Waiting
from amfm.launch.console import print_json, print_pairs
from amfm.model.huggingface.refusals import ClientName
from amfm_clients.check import ClientReport, check_export, check_installed, write_gguf


class ClientCheck:
    """A program that is run on exports. Raises ValueError, before any work, where it is not installed.

    python: interpreter with the program; None: this one.
    """

    def __init__(self, client: ClientName, python: str | None) -> None:
        check_installed(client, python or sys.executable)
        self.client, self.python = client, python

    def run(self, export: Path, report: Report) -> ClientReport:
        """Run the program on an export and compare it with transformers."""
        report(f"running {self.client}")
        return check_export(export, self.client, python=self.python)

    def show(self, export: Path, *, as_json: bool) -> None:
        """Run the program on an export that exists and print what it made of it; raises as `require_equal` does."""
        with Waiting("amfm export") as waiting:
            found = self.run(export, waiting)
        if as_json:
            print_json(asdict(found))
        else:
            self.print(export, found)
        self.require_equal(found)

    @staticmethod
    def print(export: Path, report: ClientReport) -> None:
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

    @staticmethod
    def require_equal(report: ClientReport) -> None:
        """Raise for a program that does not read the export as transformers does: ValueError if that is known of it,
        since another try cannot help, else RuntimeError.
        """
        if report.outcome != "equal":
            cause = report.expected or "; ".join(report.problems) or report.error
            raise (ValueError if report.expected else RuntimeError)(
                f"{report.client} does not read this export as transformers does ({report.outcome}): {cause}"
            )


def export_gguf(export: Path, out: Path, python: str | None, *, as_json: bool) -> None:
    """Convert an export to a file of llama.cpp and print what it is."""
    num_bytes = write_gguf(export, out, python)
    if as_json:
        print_json({"path": str(out), "bytes": num_bytes})
    else:
        print_pairs("Export for llama.cpp", [("file", out), ("bytes", f"{num_bytes:,}"), ("tensors", "float32")])
