"""Verb export, and sending an export to the Hugging Face Hub, or to what `HF_ENDPOINT` names, as one commit of a model repository.

Other programs on an export, and training states for them, are parts that packages of examples/ bring.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from amfm.data_pipeline.durable.files import check_free
from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import CheckpointArgument, JsonOption, WeightsOption
from amfm.launch.console import loading, print_json, print_pairs, say
from amfm.launch.existing import load_packaged
from amfm.model.huggingface.hf_class import Target
from amfm.model.huggingface.refusals import ClientName
from amfm.pretrain.packages import require_extra

if TYPE_CHECKING:
    from amfm.pretrain.export.export import ExportReport


PACKAGE = "clients"  # of examples/: other programs on an export
CheckOption = Annotated[
    ClientName | None,
    typer.Option(
        metavar="PROGRAM", help="Also run llama.cpp, mlx-lm, vllm, lm-eval or peft on the export and compare."
    ),
]
ClientPythonOption = Annotated[
    Path | None,
    typer.Option(metavar="PYTHON", help="Python interpreter with that program; default: this one."),
]
FormatOption = Annotated[
    Literal[
        "huggingface",
        "dcp",
        "deepspeed-universal",
        "megatron-deepspeed",
        "megatron-deepspeed-plain",
        "torch-dist",
        "torch-dist-gpt",
        "megatron",
        "gguf",
    ],
    typer.Option(
        "--format",
        help="A model for transformers, a whole training state for torch Distributed Checkpoint, DeepSpeed's loader or "
        "Megatron-DeepSpeed (-plain: its --no-pipeline-parallel), Megatron-Core (torch-dist; -gpt: names of GPTModel), the tokens of a store as .bin and .idx, or an export as a file for llama.cpp.",
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME", help="Also send the export, or one that exists, to this model repository of the Hub."
    ),
]
OptionalOutArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="OUT",
        help="Output folder, missing or empty (gguf: output file). Leave it out to --check an existing export.",
    ),
]


def export(
    checkpoint: CheckpointArgument,
    out: OptionalOutArgument = None,
    *,
    file_format: FormatOption = "huggingface",
    target: Annotated[
        Literal[Target, "auto"] | None,
        typer.Option(help="Model class of transformers; default: export.target of the run."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load the export with transformers and compare logits.")
    ] = True,
    weights: WeightsOption = "last",
    check: CheckOption = None,
    client_python: ClientPythonOption = None,
    push: PushOption = None,
    notes: Annotated[
        bool, typer.Option("--notes", help="List other programs that are known not to read the export, and why.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The verb `export`.

    With --check another program reads the export, or an export that exists, and is compared with transformers.
    """
    python = None if client_python is None else str(client_python.absolute())
    writes_for_transformers = target is not None or not verify or weights != "last"
    check_export_options(file_format, out, check, python, push, writes_for_transformers=writes_for_transformers)
    client = None if check is None else load_packaged("export.check", PACKAGE)(check, python)
    hub = None if push is None else Hub(push)
    if out is None or file_format != "huggingface":
        export_other(checkpoint, out, file_format, client, hub, python, as_json=as_json)
        return
    require_extra("export", "amfm export")
    with loading("export", "PyTorch and transformers"):
        from amfm.pretrain.export.export import export_checkpoint
        from amfm.pretrain.inference.weights import read_weights

    with Waiting("amfm export") as waiting:
        source = checkpoint if weights == "last" else read_weights(checkpoint, waiting, averaged=True)
        report = export_checkpoint(source, out, target=target, verify=verify, report=waiting)
        checked = None if client is None else client.run(out, waiting)
        is_right = checked is None or checked.outcome == "equal"
        pushed = hub.push(out) if hub is not None and is_right else None
    if as_json:
        print_json(
            report_as_dict(report)
            | ({} if checked is None else {"check": asdict(checked)})
            | ({} if pushed is None else {"pushed": pushed})
        )
    else:
        print_pairs("Export", describe_report(report, pushed, whole=notes))
        if client is not None:
            client.print(out, checked)
    if client is not None:
        client.require_equal(checked)
    if not as_json:
        say(f"next: in Python, transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})")


def export_other(
    source: Path, out: Path | None, file_format: str, client: Any, hub: Hub | None, python: str | None, *, as_json: bool
) -> None:
    """Check or send an export that exists, without `out`, or write a form that is not for transformers."""
    if out is None:
        if client is not None:
            client.show(source, as_json=as_json)
            return
        assert hub is not None, "checked before"
        push_export(source, hub, as_json=as_json)
    elif file_format == "gguf":
        load_packaged("export.gguf", PACKAGE)(source, out, python, as_json=as_json)
    elif file_format == "megatron":
        export_tokens(source, out, as_json=as_json)
    else:
        load_packaged("export.training-state", "foreign_states")(source, out, file_format, as_json=as_json)


def report_as_dict(report: ExportReport) -> dict[str, Any]:
    """What `--json` prints of an export."""
    return {
        "path": str(report.path),
        "target": report.target,
        "class": report.class_name,
        "max_logit_difference": report.max_logit_difference,
        "same_argmax": report.same_argmax,
        "tokens_compared": report.tokens_compared,
        "compared": report.compared,
        "files": list(report.files),
        "reasons": list(report.reasons),
        "refused_by": list(report.refusals),
        "left_out": report.left_out,
        "kept": list(report.kept),
    }


def describe_report(report: ExportReport, pushed: str | None, *, whole: bool) -> list[tuple[str, Any]]:
    """The rows that a person gets; `whole`: with each program that is known to reject the export."""
    verification = "not verified"
    if report.max_logit_difference is not None:
        same = "same most likely token everywhere" if report.same_argmax else "another most likely token somewhere"
        verification = (
            f"largest logit difference {report.max_logit_difference:.1e} over {report.tokens_compared:,} tokens, {same}"
        )
    pairs: list[tuple[str, Any]] = [
        ("verification", verification),
        ("compared on", report.compared),
        ("folder", report.path),
        ("class", report.class_name),
    ]
    pairs += [("why no native class", reason) for reason in report.reasons]
    pairs += [("left out", report.left_out)] if report.left_out else []
    pairs += [("kept", text) for text in report.kept]
    pairs += [("pushed to", pushed)] if pushed is not None else []
    return pairs + known_incompatibilities(report.refusals, whole=whole)


def known_incompatibilities(refusals: Sequence[str], *, whole: bool) -> list[tuple[str, str]]:
    """Rows on other programs that are known to reject an export: each in its words, or how many there are."""
    if whole or not refusals:
        return [("known incompatibilities", refusal) for refusal in refusals]
    return [("known incompatibilities", f"{len(refusals)}; --notes lists them")]


def push_export(folder: Path, hub: Hub, *, as_json: bool) -> None:
    """Send an export that exists, and print where it is."""
    require_export(folder)
    pushed = hub.push(folder)
    if as_json:
        print_json({"path": str(folder), "pushed": pushed})
    else:
        print_pairs("Export", [("folder", folder), ("pushed to", pushed)])


def check_export_options(
    file_format: str,
    out: Path | None,
    check: ClientName | None,
    python: str | None,
    push: str | None,
    *,
    writes_for_transformers: bool,
) -> None:
    """Reject, before any work, options that have no effect together, and a program that is not installed."""
    if file_format != "huggingface" and writes_for_transformers:
        raise ValueError(
            f"--target, --weights and --no-verify are about transformers; leave them out with {file_format}"
        )
    if python is not None and check is None and file_format != "gguf":
        raise ValueError("--client-python has no effect without --check or --format gguf; leave it out")
    if check is not None and file_format != "huggingface":
        raise ValueError(f"--check reads an export for transformers, not {file_format}; leave one of them out")
    if push is not None and (file_format != "huggingface" or (out is None and check is not None)):
        raise ValueError(
            "--push sends an export for transformers; leave it out with another --format, or with only --check"
        )
    if out is None and check is None and push is None:
        raise ValueError("name OUT, the folder to write; only --check and --push read an export that exists")
    if out is not None and file_format not in ("gguf", "megatron"):  # which write files next to others
        check_free(out)
    if out is None and writes_for_transformers:
        raise ValueError("--target, --weights and --no-verify are about writing an export; leave them out, or name OUT")


def export_tokens(store_path: Path, out: Path, *, as_json: bool) -> None:
    """Write OUT/SOURCE-SPLIT.bin and .idx, Megatron's format, for each source and split of a token store."""
    from amfm.data_pipeline.store.manifest import SPLITS
    from amfm.data_pipeline.store.megatron_files import export_megatron
    from amfm.data_pipeline.store.store import TokenStore

    store = TokenStore.open(store_path)
    with Waiting("amfm export") as waiting:
        documents = {
            f"{source}-{split}": export_megatron(store, source, split, out / f"{source}-{split}", waiting)
            for source in store.source_names
            for split in SPLITS
            if store.parts(source, split)
        }
    if as_json:
        print_json({"path": str(out), "documents": documents})
    else:
        print_pairs(f"Megatron files in {out}", [(name, f"{count:,} documents") for name, count in documents.items()])


def add_verbs(app: typer.Typer) -> None:
    """Register the verb of this file."""
    app.command(epilog="Example: amfm export runs/tiny_cpu exports/tiny_cpu --format huggingface")(export)


NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class Hub:
    """A repository of the Hub, OWNER/NAME, that can be written: a new one is private.

    Made before an export takes its time. Raises ValueError for another name and if the Hub rejects, RuntimeError if it cannot
    be reached.
    """

    def __init__(self, name: str) -> None:
        if NAME.fullmatch(name) is None:
            raise ValueError(f"--push {name} must be OWNER/NAME, such as my-team/tiny-cpu")
        require_extra("export", "amfm export --push")
        from huggingface_hub import HfApi

        self.name, self.api = name, HfApi()
        with self.refusals("see whether HF_ENDPOINT and the network are right, and give the same command"):
            self.api.create_repo(name, private=True, exist_ok=True)

    def push(self, folder: Path) -> str:
        """Send the files of an export as one commit, in place of the weights that were there; returns the commit's address."""
        with self.refusals(f"send it again by amfm export {folder} --push {self.name}"):
            info = self.api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message=f"amfm export {folder.name}",
                delete_patterns="*.safetensors",
            )
        return str(info.commit_url)

    @contextmanager
    def refusals(self, remedy: str) -> Iterator[None]:
        """Inside, what the Hub rejects is a ValueError, and what fails on the way a RuntimeError, with what to do."""
        from huggingface_hub.errors import HfHubHTTPError

        # Its client's errors, whichever client that is, and the system's.
        failures = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
        try:
            yield
        except failures as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            is_refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
            kind, what = (
                (ValueError, "set HF_TOKEN to a token that may write there") if is_refused else (RuntimeError, remedy)
            )
            raise kind(f"--push {self.name}: {self.api.endpoint}: {reason}; {what}") from error


def require_export(folder: Path) -> None:
    """Raise ValueError if a folder that is sent without an export is not one."""
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(f"{folder} is not an export (config.json and safetensors); name OUT to export it first")
