"""Verb import: models and tokenizers of other programs; their training states and arguments by the package of `PACKAGE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from amfm.data_pipeline.durable.files import check_free, write_file_atomically
from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import JsonOption
from amfm.launch.console import print_json, print_pairs
from amfm.launch.existing import load_packaged, require_exists, require_model
from amfm.pretrain.packages import require_extra

TRAINING_STATES = (
    ".metadata",
    "latest_universal",
    "zero/optimizer_state.pt",
    "metadata.json",
    "latest_checkpointed_iteration.txt",
)
WORD, BLEND = "megatron-args", "blend"
PACKAGE = "foreign_states"  # of examples/: arguments and training states of other programs
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; must be missing or empty.")]


def require_if_given(path: Path | None) -> Path | None:
    """Typer callback of an option whose path must exist."""
    return None if path is None else require_exists(path)


def require_source(path: Path) -> Path:
    """Typer callback of what is imported: a model, or the word before arguments of another program."""
    return path if str(path) in (WORD, BLEND) else require_model(path)


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A transformers checkpoint, an export, a training state (torch Distributed Checkpoint, DeepSpeed universal, Megatron-Core), a .tiktoken file; or the word megatron-args, before a script, a list of flags, run_config.yaml or a checkpoint of Megatron-LM and the YAML to write; or the word blend, before its blend file and the YAML.",
            callback=require_source,
        ),
    ],
    out: OutArgument,
    yaml: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT.yaml]", help="After megatron-args and blend: the configuration to write."),
    ] = None,
    *,
    pattern: Annotated[
        str | None, typer.Option(help="For a .tiktoken file: regular expression that splits text before BPE.")
    ] = None,
    special: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN=ID", help="For a .tiktoken file: a special token; repeatable.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.yaml",
            help="For a training state of another program: configuration of the run that continues.",
            callback=require_if_given,
        ),
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="With --config: step of the run; default: the optimizer's step counter.")
    ] = None,
    changed: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="With --config: an argument of the other program that this run changes on purpose, such as lr; repeatable.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `import`.

    A training state with moments becomes a run directory, which `amfm train OUT/config.yaml` continues from. A
    .tiktoken file becomes OUT/tokenizer.json. `amfm import megatron-args train.sh run.yaml` writes a configuration,
    `amfm import blend blend.txt sources.yaml` its data.sources.
    """
    if str(source) in (WORD, BLEND):
        import_words(str(source), require_exists(out), yaml, as_json=as_json)
        return
    if yaml is not None:
        raise ValueError(
            f"{yaml} is a third name, which only amfm import {WORD} or {BLEND} SOURCE OUT.yaml has; leave it out"
        )
    if source.suffix == ".tiktoken":
        import_tokenizer(source, out, pattern, special or [], as_json=as_json)
        return
    if pattern is not None or special:
        raise ValueError(f"--pattern and --special are for a .tiktoken file, and {source} is none; leave them out")
    if any((source / name).is_file() for name in TRAINING_STATES):
        load_packaged("import.training-state", PACKAGE)(source, out, config, step, changed or [], as_json=as_json)
        return
    if config is not None or step is not None or changed:
        raise ValueError(
            f"--config, --step and --changed are for a training state, and {source} is none; leave them out"
        )
    import_model(source, out, as_json=as_json)


def import_model(source: Path, out: Path, *, as_json: bool) -> None:
    """Read a model of transformers, and print what it became."""
    check_free(out)
    require_extra("export", "amfm import")
    from amfm.pretrain.export.import_huggingface import import_huggingface

    with Waiting("amfm import") as waiting:
        report = import_huggingface(source, out, waiting)
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "target": report.target,
                "tensors": report.num_tensors,
                "parameters": report.num_parameters,
                "skipped": list(report.skipped),
                "kept": list(report.kept),
                "dropped": list(report.dropped),
                "model": report.model.model_dump(mode="json"),
            }
        )
        return
    pairs = [
        ("folder", str(report.path)),
        ("read as", report.target),
        ("pattern", report.model.pattern),
        ("tensors", f"{report.num_tensors:,}"),
        ("parameters", f"{report.num_parameters:,}"),
    ]
    pairs += [("left out", name) for name in report.skipped]
    pairs += [("kept", text) for text in report.kept] + [("dropped", text) for text in report.dropped]
    print_pairs("Import", pairs)


def import_words(word: str, source: Path, out: Path | None, *, as_json: bool) -> None:
    """Write OUT.yaml out of what the word says that SOURCE is. Raises ValueError if OUT exists, and as the readers do."""
    if out is None or out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"amfm import {word} needs a source and a file to write: amfm import {word} SOURCE run.yaml")
    if out.exists():
        raise ValueError(f"{out} exists; name another file, or delete it")
    load_packaged(f"import.{word}", PACKAGE)(source, out, as_json=as_json)


def import_tokenizer(source: Path, out: Path, pattern: str | None, special: list[str], *, as_json: bool) -> None:
    """Convert a .tiktoken file to a tokenizer.json and print what came of it."""
    from amfm.data_pipeline.tokenizer.tiktoken import convert_tiktoken

    if pattern is None:
        raise ValueError(f"{source} does not hold the pattern that cuts texts into pieces; give it with --pattern")
    pairs = [text.rpartition("=") for text in special]
    wrong = [text for text, (name, _, index) in zip(special, pairs) if not name or not index.isdecimal()]
    if wrong:
        raise ValueError(f"--special {wrong[0]} must be TOKEN=ID, such as '<|endoftext|>=100257'")
    check_free(out)
    content = convert_tiktoken(source, pattern=pattern, special_tokens={name: int(index) for name, _, index in pairs})
    out.mkdir(parents=True, exist_ok=True)
    target = out / "tokenizer.json"
    write_file_atomically(target, content)
    if as_json:
        print_json({"path": str(target)})
    else:
        print_pairs("Tokenizer", [("file", target), ("use", f"data.tokenizer.model={target} and its eos_token")])


def add_verbs(app: typer.Typer) -> None:
    """Register the verb of this file."""
    app.command("import", epilog="Example: amfm import exports/tiny_cpu imports/tiny_cpu")(import_)
