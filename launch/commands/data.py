"""Verbs about text and folders: sample-data, prepare, inspect."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from amfm.data_pipeline.terminal import Waiting
from amfm.launch.arguments import ConfigOrPreset, JsonOption, OverridesArgument, PresetOption
from amfm.launch.console import loading, print_json, print_pairs, print_rows, say, show_progress
from amfm.launch.existing import choose_config, load_packaged
from amfm.pretrain.launcher_protocol import BAD_INPUT
from amfm.pretrain.packages import require_extra

if TYPE_CHECKING:
    from amfm.data_pipeline.prepare.report import Progress
    from amfm.data_pipeline.store.manifest import Split
    from amfm.launch.inspect_path import Inspection
    from amfm.pretrain.config.schema import RunConfig


def sample_data(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The text: shakespeare (5 MB of plays, public domain) or python-sources (Python files of this installation).",
        ),
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Output folder; default: data/corpus/NAME.")
    ] = None,
    *,
    megabytes: Annotated[
        int | None, typer.Option(min=1, help="Amount of text of python-sources; default: 120.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `sample-data`."""
    from amfm.data_pipeline.prepare.sample_text import collect_python_sources, fetch_corpus

    target = folder or Path("data/corpus") / name
    if name == "python-sources":
        files = collect_python_sources(target, megabytes or 120)
    elif megabytes is not None:
        raise ValueError(f"--megabytes={megabytes} is for python-sources; leave it out for {name}")
    else:
        files = fetch_corpus(name, target)
    num_bytes = sum(path.stat().st_size for path in files)
    if as_json:
        print_json({"folder": str(target), "files": len(files), "bytes": num_bytes})
    else:
        print_pairs(
            f"Corpus {name}", [("folder", target), ("files", len(files)), ("megabytes", f"{num_bytes / 1e6:.1f}")]
        )


class Terminated(KeyboardInterrupt):
    """SIGTERM came; as with Ctrl-C, code on the way does not handle it as an error."""


@contextmanager
def said_to_be_resumable() -> Iterator[None]:
    """Report after Ctrl-C or SIGTERM inside the block that nothing of a preparation is lost.

    RuntimeError for SIGTERM: a supervisor calls again.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Terminated:
        raise RuntimeError("prepare was stopped by SIGTERM; the same command does what is missing") from None
    except KeyboardInterrupt:
        say("amfm: prepare interrupted; the same command does what is missing")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def prepare(
    path: ConfigOrPreset = None,
    overrides: OverridesArgument = None,
    *,
    preset: PresetOption = None,
    address: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, such as host:6379 or auto; default: this machine only."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `prepare`."""
    path, overrides = choose_config(path, overrides, preset)
    require_extra("data", "amfm prepare")
    with loading("prepare"):
        from amfm.pretrain.checks.load import load_checked

        config = load_checked(path, overrides or [])
    if config.data.synthetic is not None:
        if as_json:
            print_json({"probe": config.data.synthetic.task, "units_written": 0})
        say(f"amfm: nothing to prepare: data.synthetic.task={config.data.synthetic.task} is computed while it is read")
        return
    from amfm.data_pipeline.prepare.prepare import prepare as prepare_store

    with said_to_be_resumable(), Waiting("amfm prepare") as waiting, show_progress("prepare") as show:

        def show_parts(now: Progress) -> None:
            waiting("training the tokenizer" if now.stage == "tokenizer" else "")  # which shows no progress
            show(*describe_progress(now))

        waiting("looking at the files of the sources")
        report = prepare_store(
            config.data,
            vocab_size=config.model.vocab_size,
            progress=show_parts,
            waiting=waiting,
            address=address,
        )
    for remark in report.remarks:
        say(f"warning: {remark}")
    check_rows(config)
    if as_json:
        print_json(asdict(report))
        return
    tokens = {
        f"tokens of {name}, {split}": f"{number:,}"
        for name, splits in report.tokens.items()
        for split, number in splits.items()
    }
    pairs = {
        "store": report.store,
        "identity": report.identity,
        "vocabulary": f"{report.vocab_size:,}",
        **tokens,
        "text": f"{report.text_bytes / 1e6:.1f} MB, {report.rejects:,} records rejected",
        **{f"first rejected of {name}": text for name, text in report.first_rejects.items()},
        **({"all rejected": f"{report.store}/rejects"} if report.rejects else {}),
        "units of work": f"{report.units_written} written now, {report.units_total} in the store",
        "time": f"{report.seconds:.1f} s",
    }
    print_pairs("Token store", pairs.items())


def check_rows(config: RunConfig) -> None:
    """Open the rows that `amfm train` will ask for. Raises ValueError, as it would, if a source fills none."""
    from amfm.data_pipeline.samples.samples import SampleReader, SampleSettings
    from amfm.pretrain.stages import data_of_stages, resolve_stages

    stages = resolve_stages(config)
    data, lengths = data_of_stages(config, stages), {stage.train.sequence_length for stage in stages}
    wanted: list[tuple[Split, int]] = [("train", stages[0].train.sequence_length)]
    if config.train.validate_every_steps is not None:
        wanted += [("validation", length) for length in sorted(lengths)]
    for split, length in wanted:
        settings = SampleSettings.from_config(data, split=split, sequence_length=length, seed=config.train.seed)
        SampleReader(settings).store.close()


def describe_progress(now: Progress) -> tuple[int, int, str, float | None]:
    """(done, total, warning, seconds left) of a preparation, for a progress bar."""
    if now.stage == "tokenizer":
        return now.units_done, now.units_total, "training the tokenizer", None
    if now.stage == "duplicates":
        remark = f"looking for duplicates, {now.megabytes_per_second:.1f} MB/s"
        return now.units_done, now.units_total, remark, now.eta_seconds
    speed = (
        f"{now.documents_per_second:,.0f} documents/s, {now.megabytes_per_second:.1f} MB/s, "
        f"{now.tokens_per_second:,.0f} tokens/s"
    )
    return now.units_done, now.units_total, f"{now.tokens:,} tokens, {speed}", now.eta_seconds


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A store (a URL too), checkpoint, run, export or import.")
    ],
    *,
    diff: Annotated[Path | None, typer.Option(metavar="OTHER", help="Show only what differs from OTHER.")] = None,
    protect: Annotated[
        bool | None,
        typer.Option(
            "--protect/--unprotect", help="Protect a verified checkpoint from pruning, or remove the protection."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="For a store: check sizes and indices only, not every chunk.")
    ] = False,
    sample: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="G", help="Show the text of global sample G of a run, or of a store with --config."
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Of a run: which start trained step N, with its hosts, code and settings."
        ),
    ] = None,
    spike: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Of a run: the sequences of step N by loss, and the text of its worst documents."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="CONFIG", help="Configuration for --sample of a store.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The verb `inspect`."""
    from amfm.launch.inspect_path import inspect_path, mark_checkpoint

    if sample is not None:
        show_sample(path, sample, config, as_json=as_json)
        return
    if step is not None:
        show_origin(Path(path), step, as_json=as_json)
        return
    if spike is not None:
        load_packaged("inspect.spike", "replay")(Path(path), spike, as_json=as_json)
        return
    if config is not None:
        raise ValueError(f"--config {config} is for --sample G; leave it out, or add --sample")
    if protect is not None:
        mark_checkpoint(Path(path), protect)
    with Waiting("amfm inspect") as waiting:
        found = inspect_path(path, quick=quick, report=waiting)
        other = None if diff is None else inspect_path(diff, report=waiting)
    problems = [*(other.problems if other is not None else ()), *found.problems]
    if diff is not None and other is not None:
        print_differences(diff, other, Path(path), found, as_json=as_json)
    elif as_json:
        print_json(found.as_json())
    else:
        verdict = "no problem found" if found.is_ok() else f"{len(found.problems)} problem(s)"
        print_pairs(f"{path}: {found.kind}, {verdict}", show_facts(found.facts))
    for problem in problems:
        say(f"amfm: {problem}")
    if problems:
        raise typer.Exit(BAD_INPUT)


def print_differences(diff: Path, other: Inspection, path: Path, found: Inspection, *, as_json: bool) -> None:
    """Print how two folders differ: two whole checkpoints number by number, anything else by its inspection."""
    from amfm.launch.inspect_path import compare_checkpoints, diff_inspections, list_differences

    rows: list[tuple[str, Any, Any]]
    if found.kind == other.kind == "checkpoint" and found.is_ok() and other.is_ok():
        compared = compare_checkpoints(diff, path)
        rows, document = list_differences(compared), compared
    else:
        differences = diff_inspections(other, found)
        rows = [(name, *pair) for name, pair in differences.items()]
        document = {name: {"other": first, "this": second} for name, (first, second) in differences.items()}
    if as_json:
        print_json(document)
    else:
        print_rows(f"{diff} -> {path}", ("what", str(diff), str(path)), rows)


def show_origin(run_dir: Path, step: int, *, as_json: bool) -> None:
    """Print which starts trained a step, and which of them the run still consists of."""
    from amfm.pretrain.report.data import HEADER, list_attempts, read_run

    record = read_run(run_dir)
    attempts = list_attempts(record.events, record.last_step())
    found = [attempt for attempt in attempts if attempt.did(step)]
    if not found:
        raise ValueError(f"no start of {run_dir} trained step {step}; it has steps 1 to {record.last_step()}")
    if as_json:
        print_json(
            {"step": step, "starts": [attempt.describe() | {"is_kept": attempt.keeps(step)} for attempt in found]}
        )
        return
    for attempt in found:
        kept = "as the run has it" if attempt.keeps(step) else "given up later"
        versions = ", ".join(f"{name} {version}" for name, version in (attempt.event.get("versions") or {}).items())
        rows = [*zip(HEADER, attempt.words(), strict=True), ("versions", versions or "-")]
        print_pairs(f"Step {step} of {run_dir}, {kept}", rows)


def show_sample(path: str, sample: int, config_path: Path | None, *, as_json: bool) -> None:
    """Decode and print the row of a global sample, which the configuration and the store determine."""
    from amfm.data_pipeline.verify import sample_text
    from amfm.pretrain.config.file import load_config
    from amfm.pretrain.stages import data_of_stages, resolve_stages, stage_of, step_of_sample

    place = config_path or Path(path) / "config.yaml"
    if not place.is_file():
        raise ValueError(f"--sample {sample} of {path} needs a run directory, or a store and --config CONFIG")
    run = load_config(place)
    stages = resolve_stages(run)
    data = data_of_stages(run, stages)
    if data.synthetic is not None:
        if config_path is not None:
            raise ValueError(
                f"{config_path} is of a synthetic task, whose sequences no store holds; give only its run directory"
            )
        length, seed = stages[0].train.sequence_length, run.train.seed
        load_packaged("inspect.synthetic", "synthetic")(data, sample, length, seed, as_json=as_json)
        return
    if config_path is not None:
        data = data.model_copy(update={"store": path})
    shown = sample_text(data, sample, sequence_length=stages[0].train.sequence_length, seed=run.train.seed)
    if as_json:
        print_json(asdict(shown))
        return
    step, row = step_of_sample(stages, sample)
    facts = {
        "step": f"{step}, row {row} of its {stage_of(stages, step - 1).batch_size(step)}",
        "source": f"{shown.source}, epoch {shown.epoch}",
        "part": f"{shown.part}, row {shown.row}, from document {shown.first_document} on",
        "tokens": f"{len(shown.tokens):,} of {len(shown.documents)} documents, {shown.num_learned:,} of them learned",
    }
    documents = shown.documents
    if shown.pieces:
        facts["marks"] = "what is learned is between « and »"
        documents = tuple(
            "".join(f"«{text}»" if is_learned else text for text, is_learned in runs) for runs in shown.pieces
        )
    print_pairs(f"Sample {sample} of {data.store}", facts.items())
    for number, text in enumerate(documents, start=shown.first_document):
        print(f"--- document {number}\n{text}")


ONE_LINE = 3  # facts of a mapping that has no further ones inside


def show_facts(facts: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    """Rows of facts: what a mapping holds is below its name, further in."""
    for name, value in facts.items():
        inside = value.values() if isinstance(value, dict) else ()
        if len(inside) <= ONE_LINE and not any(isinstance(item, dict) for item in inside):
            yield f"{indent}{name}", show_fact(value)
        else:
            yield f"{indent}{name}", ""
            yield from show_facts(value, f"{indent}  ")


def show_fact(value: Any) -> str:
    """A fact on one line: 1234567 as 1,234,567, other numbers in four digits, nested mappings as `a: b`."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {show_fact(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(show_fact, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command(epilog="Example: amfm sample-data shakespeare data/corpus/shakespeare")(sample_data)
    app.command(epilog="Example: amfm prepare configs/tiny_cpu.yaml data.prepare.num_actors=2")(prepare)
    app.command(epilog="Example: amfm inspect data/shakespeare --quick; amfm inspect runs/tiny_cpu --sample 17")(
        inspect
    )
