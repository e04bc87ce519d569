"""The plan of a preparation: which byte ranges make which part, the same on every machine and for any number of actors.

Files are cut into segments, all segments of a source are put in a keyed random order, and runs of that order become units.
So a part holds text from many places, which the shuffle of training can then leave in blocks, and any unit can be written
by any actor at any time. Sizes, parquet footers and Megatron indexes are read for it, and no text. A unit is worth an actor's
while but no more than a share of the text that is left, or the last one would be the only one at work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Literal

from amfm.data_pipeline.config import DataConfig, FilterConfig, SourceConfig
from amfm.data_pipeline.memory import no_garbage_collection
from amfm.data_pipeline.prepare.dialogues import Dialogues, columns_of
from amfm.data_pipeline.prepare.documents import NO_FILTERS
from amfm.data_pipeline.prepare.reading import AS_IT_IS, Reading, Template, check_reading
from amfm.data_pipeline.prepare.segments import Segment, check_column, cut_segments, holds_tokens
from amfm.data_pipeline.prepare.sources import TOKEN_KINDS, InputFile, list_files
from amfm.data_pipeline.samples.permutation import derive_key, permute
from amfm.data_pipeline.store.manifest import MAX_PARTS, Layout

SEGMENTS_PER_PART = 32  # a part mixes ranges from this many places, so that neighbours in a row differ
MIN_SEGMENT_BYTES = 2**16  # smaller reads cost more than they mix
UNITS_LEFT = 8  # a unit is at most this share of the text that is left, so that all actors end at about the same time
BYTES_A_TOKEN = 4  # about what a token is worth, before any is counted
MOST_BYTES_A_TOKEN = 12  # files on the disk, compressed or not: more than the longest tokens need
PARTS_OF_A_LIMIT = 16  # parts in `max_tokens`: by one of them the limit is passed at most
UNIT_FORMAT = 6  # raised when the same plan would write other bytes


@dataclass(frozen=True)
class UnitSettings:
    """What shapes the bytes of a part besides its inputs. dialogues: None where all of the text counts."""

    text_column: str
    filters: FilterConfig
    validation_fraction: float
    seed: int
    part_bytes: int
    layout: Layout
    tokenizer_identity: str
    vocab_size: int
    eos_id: int
    dialogues: Dialogues | None = None
    reading: Reading = AS_IT_IS


@dataclass(frozen=True)
class Unit:
    """The work of one actor call: segments of one source that become one part (more, if the text is far larger).

    stage: `hash` only hashes the documents, to find duplicates. duplicates: digest of the list of those to skip.
    """

    source: str
    number: int
    segments: tuple[Segment, ...]
    settings: UnitSettings
    stage: Literal["hash", "write"] = "write"
    duplicates: str = ""

    @property
    def name(self) -> str:
        """Name in the journal."""
        return f"{self.source}/{self.number:06d}"

    @property
    def text_bytes(self) -> int:
        """Estimated text."""
        return sum(segment.text_bytes for segment in self.segments)

    def key(self) -> str:
        """Digest everything that decides the unit's output, modification times of its inputs included.

        Names and not paths of the inputs: a source that was moved is not written again.
        """
        inputs = [
            (item.file.name, item.file.num_bytes, item.file.modified_ns, item.start, item.stop, item.split)
            for item in self.segments
        ]
        settings = asdict(replace(self.settings, reading=AS_IT_IS)) | {"filters": self.settings.filters.model_dump()}
        if self.settings.dialogues is None:
            del settings["dialogues"]  # as it was before there were any
        settings["reading"] = self.settings.reading.facts()
        if not settings["reading"]:
            del settings["reading"]
        facts = [UNIT_FORMAT, self.source, self.number, inputs, settings, self.stage, self.duplicates]
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def plan_sources(config: DataConfig, pins: Mapping[str, str] = {}) -> dict[str, list[Segment]]:
    """Plan every source, by name. pins: commits of data sets of the Hub. ValueError as by `check_number_of_parts`."""
    with no_garbage_collection():
        files = {source.name: _choose_files(source, config, pins) for source in config.sources}
        # Of what is compressed this is the least, and enough to reject a mistake before it is cut into segments.
        check_number_of_parts({name: sum(file.num_bytes for file in found) for name, found in files.items()}, config)
        plans = {source.name: plan_source(source, config, files[source.name]) for source in config.sources}
    check_number_of_parts({name: sum(item.text_bytes for item in plan) for name, plan in plans.items()}, config)
    return plans


def check_number_of_parts(text_bytes: Mapping[str, int], config: DataConfig) -> None:
    """Raise ValueError if text of these sizes, by source, would become more parts than a manifest names."""
    splits = 2 if config.validation_fraction else 1  # a unit writes a part of each
    expected = sum(splits * text_bytes[source.name] // part_bytes_of(source, config) for source in config.sources)
    if expected <= MAX_PARTS:
        return
    enough = config.prepare.part_bytes * expected / MAX_PARTS
    rounded = math.ceil(1.1 * enough / 10**7) * 10**7
    raise ValueError(
        f"data.prepare.part_bytes={config.prepare.part_bytes} makes about {expected:,} parts of "
        f"{sum(text_bytes.values()) / 10**12:.1f} TB of text, and a manifest names at most {MAX_PARTS:,}; set "
        f"data.prepare.part_bytes={rounded} (the memory of an actor grows with it)"
    )


def plan_source(source: SourceConfig, config: DataConfig, files: Sequence[InputFile] | None = None) -> list[Segment]:
    """Plan a source: its segments in the order in which they are dealt into parts. files: by default, those of its paths.

    Text files are split into train and validation here, because their number is known: at least one of two or more
    validates. Records of jsonl and parquet are split when they are read, by the hash of their text.
    ValueError for missing or empty input.
    """
    files = _choose_files(source, config, {}) if files is None else files
    template = None if source.template is None else Template.parse(source.template)
    for column in columns_of(source).values() if template is None else template.columns:
        check_column(files, column, holds_text=source.messages_column is None and template is None)
    check_reading(source, has_lines=source.cut is not None or any(file.kind == "jsonl" for file in files))
    if source.has_loss_spans and any(file.kind in ("text", *TOKEN_KINDS) for file in files):
        raise ValueError(
            f"source {source.name!r} has columns of conversations, and files without columns; name .jsonl, .parquet or .arrow"
        )
    filtered = source.filters != FilterConfig() or source.steps or template is not None
    if filtered and holds_tokens(files, source.text_column):
        raise ValueError(f"source {source.name!r} holds tokens; {NO_FILTERS}")
    part_bytes = part_bytes_of(source, config)
    segment_bytes = max(part_bytes // SEGMENTS_PER_PART, min(part_bytes, MIN_SEGMENT_BYTES))
    if source.max_bytes is not None and source.max_bytes < segment_bytes:
        segment_bytes = max(1, source.max_bytes // PARTS_OF_A_LIMIT)
    whole = [file for file in files if file.kind == "text" and source.cut is None]
    whole_names, validating = {file.name for file in whole}, _choose_validation(source, whole, config)
    segments = [
        replace(segment, split="validation" if file.name in validating else "train")
        if file.name in whole_names
        else segment
        for file in files
        for segment in cut_segments(file, segment_bytes, config.megatron_split, source.cut)
    ]
    if not segments:
        raise ValueError(
            f"source {source.name!r} has no text: its {len(files)} files are all empty; name files that hold text"
        )
    order = permute(range(len(segments)), len(segments), derive_key(config.prepare.seed, "plan", source.name))
    return _take_bytes([segments[index] for index in order.tolist()], source.max_bytes)


def part_bytes_of(source: SourceConfig, config: DataConfig) -> int:
    """Text bytes of a part: smaller where `max_tokens` would be passed by much with the last one."""
    if source.max_tokens is None:
        return config.prepare.part_bytes
    return min(config.prepare.part_bytes, max(MIN_SEGMENT_BYTES, source.max_tokens * BYTES_A_TOKEN // PARTS_OF_A_LIMIT))


def _choose_files(source: SourceConfig, config: DataConfig, pins: Mapping[str, str]) -> list[InputFile]:
    """List the files; by seed as many as `max_tokens` can need, so that of thousands not every footer is read."""
    files = list_files(source, pins)
    if source.max_tokens is None:
        return files
    ranked = sorted(files, key=lambda file: derive_key(config.prepare.seed, "files", source.name, file.name))
    total = accumulate(file.num_bytes for file in ranked)
    enough = source.max_tokens * MOST_BYTES_A_TOKEN
    number = next((number for number, so_far in enumerate(total, 1) if so_far >= enough), len(ranked))
    return sorted(ranked[:number], key=lambda file: file.name)


def _take_bytes(segments: list[Segment], max_bytes: int | None) -> list[Segment]:
    """Take the first segments whose text stays within the limit; one at least, or a small limit would leave nothing."""
    if max_bytes is None:
        return segments
    total = list(accumulate(segment.text_bytes for segment in segments))
    return segments[: max(1, sum(1 for bytes_so_far in total if bytes_so_far <= max_bytes))]


def _choose_validation(source: SourceConfig, files: Sequence[InputFile], config: DataConfig) -> frozenset[str]:
    """Choose the text files that validate: those of the lowest keyed hashes, all of them only at a fraction of 1."""
    texts, fraction = [file.name for file in files if file.num_bytes], config.held_out(source)
    if fraction == 1:
        return frozenset(file.name for file in files)
    if fraction == 0 or len(texts) < 2:
        return frozenset()
    wanted = min(len(texts) - 1, max(1, round(fraction * len(texts))))
    ranked = sorted(texts, key=lambda name: derive_key(config.prepare.seed, "validation", source.name, name))
    return frozenset(ranked[:wanted])


def make_units(source: str, segments: Sequence[Segment], settings: UnitSettings) -> list[Unit]:
    """Gather segments into units of up to part_bytes of text, smaller ones towards the end.

    Smallest: part_bytes / SEGMENTS_PER_PART. The sizes do not depend on the number of actors, nor do the bytes.
    """
    groups: list[list[Segment]] = []
    filled, limit, left = 0, 0, sum(segment.text_bytes for segment in segments)
    for segment in segments:
        if not groups or filled + segment.text_bytes > limit:
            groups.append([])
            filled = 0
            limit = min(settings.part_bytes, max(left // UNITS_LEFT, settings.part_bytes // SEGMENTS_PER_PART))
        groups[-1].append(segment)
        filled, left = filled + segment.text_bytes, left - segment.text_bytes
    return [Unit(source, number, tuple(group), settings) for number, group in enumerate(groups)]
