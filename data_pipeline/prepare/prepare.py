"""Prepare a token store from text: plan, tokenizer, parts, journal, and the manifest last.

The plan cuts the sources into units; a unit's bytes depend only on the unit, not on the actor, its neighbours or how
often it was tried. So a store is byte-identical for any number of actors and after any kill. An actor writes a part
under its final name only when it is whole and durable; the journal then records the unit, and a second call writes
what the journal lacks. The manifest is written last: a folder without one is not a store, and no one can read half of
it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from amfm.data_pipeline.config import DataConfig, SourceConfig
from amfm.data_pipeline.durable.files import UNFINISHED, make_folders, take_lock, try_to_delete
from amfm.data_pipeline.prepare.choose_tokenizer import choose_tokenizer, keep_tokenizer
from amfm.data_pipeline.prepare.dialogues import describe_columns, dialogues_of
from amfm.data_pipeline.prepare.duplicates import mark_duplicates, units_to_hash
from amfm.data_pipeline.prepare.finished_units import Journal, run_units, take_tokens
from amfm.data_pipeline.prepare.hub import pin_revisions, read_pins, write_pins
from amfm.data_pipeline.prepare.plan import Unit, UnitSettings, make_units, part_bytes_of, plan_sources
from amfm.data_pipeline.prepare.reading import reading_of
from amfm.data_pipeline.prepare.rejects import count_rejects, describe_first_damage, describe_first_reject
from amfm.data_pipeline.prepare.report import PrepareReport, Progress, ShowProgress, make_report
from amfm.data_pipeline.prepare.segments import Segment
from amfm.data_pipeline.prepare.unit import UnitFailure, UnitReport
from amfm.data_pipeline.store.manifest import (
    PART_NAME,
    SPLITS,
    Layout,
    Part,
    Split,
    TokenizerRecord,
    write_manifest,
)
from amfm.data_pipeline.store.object_store import is_url
from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.chat_template import NOTHING_LEARNED
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer

LOCK = ".lock"

Results = Iterator[tuple[Unit, UnitReport | UnitFailure]]
Runner = Callable[[Sequence[Unit], Path, Tokenizer, DataConfig], Results]


def prepare(
    config: DataConfig,
    *,
    vocab_size: int | None = None,
    progress: ShowProgress = None,
    waiting: Report = silent,
    address: str | None = None,
    runner: Runner | None = None,
) -> PrepareReport:
    """Make or complete the token store of a configuration.

    The second call with the same inputs writes nothing; after a crash, or when a source is added, only the missing
    parts are written: in this process, or by Ray where the text is large (run_units.py). Ray is started on this machine
    unless `address` names a cluster (whose nodes must see the same paths), and stopped if it was started here; `runner`
    replaces both in tests. `waiting` hears what is waited for while there is no progress.
    vocab_size: of the model, which sources of token ids need where no tokenizer is given.
    ValueError for settings and input, RuntimeError for a full disk or another preparation of the same store.
    """
    began, place = time.monotonic(), config.text_store()
    paths = [path for source in config.sources for path in source.paths]
    pins = pin_revisions(paths, {} if is_url(place) else read_pins(place))
    plans = plan_sources(config, pins)
    if len(plans) < len(config.sources):
        raise ValueError(
            f"data.sources has two sources of one name among {[s.name for s in config.sources]}; rename one"
        )
    if is_url(place):
        raise ValueError(
            f"data.store={place!r} must be a folder to write in; prepare there, copy the folder to the object "
            "store with any tool, manifest.json last, and train from the URL"
        )
    store = Path(place)
    try:
        make_folders(store)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"data.store={place!r} cannot be made ({error.strerror}); name a writable folder") from error
    with _only_writer(store):
        with _explain_full_disk(store, 0, 0):
            write_pins(store, pins)
        tokenizer = _tokenizer_of(store, config, plans, progress, vocab_size)
        layout = Layout.for_vocabulary(tokenizer.vocab_size, config.prepare.chunk_tokens, config.prepare.preset)
        units: dict[str, Sequence[Unit]] = {
            source.name: make_units(
                source.name, plans[source.name], _unit_settings(source, config, tokenizer, layout, plans[source.name])
            )
            for source in config.sources
        }
        journal = Journal(store)
        run = runner or (lambda *arguments: run_units(*arguments, address=address, report=waiting))
        units = _without_duplicates(units, config, store, tokenizer, run, progress)
        write = _UnitsWriter(journal, lambda missing: run(missing, store, tokenizer, config), store, progress)
        find = partial(journal.find, store)
        limits = {source.name: source.max_tokens for source in config.sources if source.max_tokens is not None}
        for name, max_tokens in limits.items():
            units[name] = take_tokens(units[name], max_tokens, find, write)
        write([unit for of_source in units.values() for unit in of_source if find(unit) is None])
        reports = {name: [_must_find(journal, store, unit) for unit in of_source] for name, of_source in units.items()}
        for source in config.sources:
            _check_source(source, plans[source.name], reports[source.name], store, units[source.name])
            if config.prepare.on_damage == "refuse":
                _refuse_damage(source, reports[source.name], store, units[source.name])
        names = journal.source_names() | reports.keys()
        code = {
            name: used
            for name, of_source in units.items()
            if of_source and (used := of_source[0].settings.reading.code())
        }
        identity, remarks = _finish(store, tokenizer, layout, reports, names, pins, code)
    remarks += _describe_short_sources(reports, limits)
    remarks += _describe_passed_limits(config, reports)
    remarks += _describe_unheld_sources(config, reports)
    remarks += _describe_files_read_twice(plans)
    remarks += _describe_unlearned(config, store, units)
    seconds = time.monotonic() - began
    report = make_report(config, identity, tokenizer, reports, units_written=write.written, seconds=seconds)
    described = {name: describe_first_reject(store, of_source) for name, of_source in units.items()}
    first_rejects = {name: text for name, text in described.items() if text is not None}
    return replace(report, first_rejects=first_rejects, remarks=tuple(remarks))


@contextmanager
def _only_writer(store: Path) -> Iterator[None]:
    lock = take_lock(store / LOCK, wait=False)
    if lock is None:
        raise RuntimeError(f"another `amfm prepare` is writing {store}; wait for it, or stop it and run this again")
    with lock:
        yield


def _describe_short_sources(reports: Mapping[str, Sequence[UnitReport]], limits: Mapping[str, int]) -> Iterator[str]:
    """Report which sources have fewer tokens than they were to give."""
    for name, limit in limits.items():
        tokens = sum(report.tokens for report in reports[name])
        if tokens < limit:
            yield f"source {name!r} has {tokens:,} tokens of max_tokens={limit:,}: there is no more text in the files chosen"


def _describe_passed_limits(config: DataConfig, reports: Mapping[str, Sequence[UnitReport]]) -> Iterator[str]:
    """Report which sources have more than a limit by over a tenth, since documents are taken whole."""
    for source in config.sources:
        for name, limit in (("max_tokens", source.max_tokens), ("max_bytes", source.max_bytes)):
            field = "tokens" if name == "max_tokens" else "text_bytes"
            number = sum(getattr(report, field) for report in reports[source.name])
            if limit is not None and number > 1.1 * limit:
                yield (
                    f"source {source.name!r} has {number:,} {field.replace('_', ' ')} at {name}={limit:,}: documents are taken whole; "
                    "cut large files of text with sources.*.cut"
                )


def _describe_unheld_sources(config: DataConfig, reports: Mapping[str, Sequence[UnitReport]]) -> Iterator[str]:
    """Report of which sources no document was kept for validation, although some were to be."""
    fractions = {source.name: config.held_out(source) for source in config.sources}
    for name in reports:
        if fractions[name] and not any(
            part.num_tokens for report in reports[name] for part in report.parts["validation"]
        ):
            yield (
                f"source {name!r} has no validation documents at data.validation_fraction={fractions[name]}, and a run "
                "that validates will reject it: give more documents (one file of text is one document, unless sources.*.cut cuts it) or raise the fraction"
            )


def _describe_unlearned(config: DataConfig, store: Path, units: Mapping[str, Sequence[Unit]]) -> Iterator[str]:
    """Report how many conversations had no turn to learn from."""
    for source in config.sources:
        number = count_rejects(store, units[source.name], NOTHING_LEARNED) if source.has_loss_spans else 0
        if number:
            yield f"source {source.name!r} has {number:,} records of which nothing would be learned; they are left out"


def _describe_files_read_twice(plans: Mapping[str, Sequence[Segment]]) -> Iterator[str]:
    """Report which sources have a file several times, by two of their paths or by links."""
    for name, segments in plans.items():
        files = {segment.file.name: segment.file.shown for segment in segments}
        path, times = Counter(files.values()).most_common(1)[0]
        if times > 1:
            yield f"source {name!r} has {path} {times} times, by its paths or by links, and so each of its documents"


def _unit_settings(
    source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, layout: Layout, plan: Sequence[Segment]
) -> UnitSettings:
    return UnitSettings(
        text_column=source.text_column,
        filters=source.filters,
        validation_fraction=config.held_out(source),
        seed=config.prepare.seed,
        part_bytes=part_bytes_of(source, config),
        layout=layout,
        tokenizer_identity=tokenizer.identity(),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dialogues=dialogues_of(source, config.tokenizer, tokenizer),
        reading=reading_of(source, (segment.file for segment in plan)),
    )


def _tokenizer_of(
    store: Path,
    config: DataConfig,
    plans: Mapping[str, Sequence[Segment]],
    progress: ShowProgress,
    vocab_size: int | None,
) -> Tokenizer:
    def begin_training() -> None:
        if progress:
            progress(Progress("tokenizer", 0, 1, 0, 0, 0, 0, 0.0, None))

    tokenizer, settings = choose_tokenizer(store, config, plans, begin_training, vocab_size)
    if settings is not None:
        with _explain_full_disk(store, 0, 0):
            keep_tokenizer(store, tokenizer, settings)
    return tokenizer


def _without_duplicates(
    units: Mapping[str, Sequence[Unit]],
    config: DataConfig,
    store: Path,
    tokenizer: Tokenizer,
    run: Runner,
    progress: ShowProgress,
) -> dict[str, Sequence[Unit]]:
    """Hash what is not hashed yet and tell the units of sources that drop exact duplicates what to skip."""
    chosen = [source.name for source in config.sources if source.filters.exact_duplicates == "drop"]
    missing = [unit for name in chosen for unit in units_to_hash(store, units[name])]
    if missing:
        _write_missing(missing, None, run(missing, store, tokenizer, config), store, progress)
    with _explain_full_disk(store, 0, 0):
        return {
            name: mark_duplicates(store, of_source) if name in chosen else of_source
            for name, of_source in units.items()
        }


class _UnitsWriter:
    """Writes units that are missing and counts them; progress is that of each call."""

    def __init__(
        self, journal: Journal, run: Callable[[Sequence[Unit]], Results], store: Path, progress: ShowProgress
    ) -> None:
        self.journal, self.run, self.store, self.progress = journal, run, store, progress
        self.written = 0

    def __call__(self, missing: Sequence[Unit]) -> None:
        if missing:
            _write_missing(missing, self.journal, self.run(missing), self.store, self.progress)
            self.written += len(missing)


def _write_missing(
    missing: Sequence[Unit],
    journal: Journal | None,
    results: Results,
    store: Path,
    progress: ShowProgress,
) -> None:
    began = time.monotonic()
    expected = sum(unit.text_bytes for unit in missing)
    done = documents = text_bytes = tokens = rejects = planned = 0
    for unit, report in results:
        if isinstance(report, UnitFailure):
            _raise_failure(report, store, done, len(missing))
        assert isinstance(report, UnitReport), "a unit gives a report or a failure"
        if journal is not None:  # hashes are their own record
            with _explain_full_disk(store, done, len(missing)):
                journal.append(unit, report)
        done, planned = done + 1, planned + unit.text_bytes
        documents, text_bytes = documents + report.documents, text_bytes + report.text_bytes
        tokens, rejects = tokens + report.tokens, rejects + report.rejects
        if progress:
            seconds = time.monotonic() - began
            eta = seconds * (expected - planned) / max(planned, 1)
            stage = "tokenize" if journal is not None else "duplicates"
            progress(Progress(stage, done, len(missing), documents, text_bytes, tokens, rejects, seconds, eta))


def _raise_failure(failure: UnitFailure, store: Path, done: int, total: int) -> None:
    what = "the disk is full" if failure.reason == "disk_full" else "the disk failed"
    raise RuntimeError(
        f"{what} while writing {store}: {failure.message}; {done} of {total} missing parts are done and kept: "
        "free space and run the same command to continue"
    )


@contextmanager
def _explain_full_disk(store: Path, done: int, total: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _raise_failure(UnitFailure("disk_full", str(error)), store, done, total)


def _must_find(journal: Journal, store: Path, unit: Unit) -> UnitReport:
    report = journal.find(store, unit)
    if report is None:
        raise RuntimeError(
            f"part {unit.name} of {store} disappeared or its input changed while the store was being prepared; "
            "run `amfm prepare CONFIG` again"
        )
    return report


def _check_source(
    source: SourceConfig, plan: Sequence[Segment], reports: Sequence[UnitReport], store: Path, units: Sequence[Unit]
) -> None:
    """Check that every byte of jsonl was read exactly once, and that the source gave a training document."""
    planned = sum(
        item.stop - item.start for item in plan if item.file.kind == "jsonl" and item.file.compression == "none"
    )
    covered = sum(report.covered_bytes for report in reports)
    limited = source.max_bytes is not None or source.max_tokens is not None
    if not limited and planned != covered:  # with a limit the last line of a range may be longer than it
        raise RuntimeError(
            f"source {source.name!r}: {covered} of {planned} bytes of jsonl were read; a file changed while it was "
            "being read: run `amfm prepare CONFIG` again"
        )
    used: Split = "validation" if source.validation_fraction == 1 else "train"
    if not any(report.parts[used] for report in reports):
        rejects = sum(report.rejects for report in reports)
        first = describe_first_reject(store, units)
        why = "its files have no records"
        if rejects:
            why = f"{rejects} records were rejected, {f'the first is {first}, ' if first else ''}"
            why += f"the reasons are in {store / 'rejects' / source.name}"
        raise ValueError(
            f"source {source.name!r} gave no {'training' if used == 'train' else used} document: {why}; check {describe_columns(source)} and the files"
        )


def _refuse_damage(source: SourceConfig, reports: Sequence[UnitReport], store: Path, units: Sequence[Unit]) -> None:
    """Raise ValueError if a file was cut: no record that breaks a rule, but text that was there and is lost."""
    damage = describe_first_damage(store, [unit for unit, report in zip(units, reports) if report.rejects])
    if damage is not None:
        raise ValueError(
            f"source {source.name!r}: {damage}; restore the file, or keep the readable part with "
            "data.prepare.on_damage=keep"
        )


def _finish(
    store: Path,
    tokenizer: Tokenizer,
    layout: Layout,
    reports: Mapping[str, Sequence[UnitReport]],
    source_names: set[str],
    revisions: Mapping[str, str],
    code: Mapping[str, Mapping[str, str]],
) -> tuple[str, list[str]]:
    """Write the manifest if it is not there already, then delete what we wrote and no part holds; identity and warnings.

    source_names: those whose parts may be ours, also of earlier configurations.
    """
    sources: dict[str, dict[Split, Sequence[Part]]] = {
        name: {split: [part for report in of_source for part in report.parts[split]] for split in SPLITS}
        for name, of_source in reports.items()
    }
    record = TokenizerRecord(
        file=tokenizer.file_name,
        kind=tokenizer.kind,
        identity=tokenizer.identity(),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    with _explain_full_disk(store, len(reports), len(reports)):
        identity = write_manifest(store, record, layout, sources, revisions, code)
    kept = {part.path for by_split in sources.values() for parts in by_split.values() for part in parts}
    left = [
        folder
        for name in sorted(source_names)
        for folder in sorted((store / "parts" / name).glob("*.zarr"))
        if PART_NAME.fullmatch(folder.name) and folder.relative_to(store).as_posix() not in kept
    ]
    remarks = [remark for folder in left for remark in try_to_delete(folder, PART_NAME)]
    for pattern in (".writing-*", "parts/*/.writing-*", "rejects/*/.writing-*", "duplicates/*/.writing-*"):
        for path in store.glob(pattern):  # of calls that were killed
            remarks += try_to_delete(path, UNFINISHED)
    return identity, remarks
