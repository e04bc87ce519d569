"""The text that a tokenizer is trained on: from each source by its weight, in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from amfm.data_pipeline.config import DataConfig, SourceConfig
from amfm.data_pipeline.prepare.documents import Document, Reject, Segment, SegmentReader, TokenDocument
from amfm.data_pipeline.prepare.filters import make_filter
from amfm.data_pipeline.prepare.rejects import place_of


def require_training_text(config: DataConfig, plans: Mapping[str, Sequence[Segment]]) -> None:
    """Refuse a source with weight none of whose records is text, before the trainer complains that it got nothing.

    Reads each source up to its first text. Raises ValueError with the first record that was rejected.
    """
    for source in config.sources:
        first: Reject | None = None
        number = 0
        for item in _read_records(source, plans[source.name]) if source.weight else ():
            if not isinstance(item, Reject):
                break
            first, number = first or item, number + 1
        else:
            if first is not None:
                raise ValueError(
                    f"source {source.name!r} gave no text to train the tokenizer on: {number} records were rejected, the "
                    f"first ({place_of(first.position, plans[source.name])}) for: {first.reason}; check text_column={source.text_column!r} and the files"
                )


def training_texts(config: DataConfig, plans: Mapping[str, Sequence[Segment]]) -> Iterator[str]:
    """Yield `data.tokenizer.training_bytes` of text, shared by the weights of the sources; validation files left out."""
    total_weight = sum(source.weight for source in config.sources)
    for source in config.sources:
        budget = config.tokenizer.training_bytes * source.weight / total_weight
        if budget <= 0:
            continue
        for item in _read_records(source, plans[source.name]):
            if isinstance(item, Document):
                text = item.text[: int(budget) + 1]
                budget -= len(text.encode())
                yield text
            if budget <= 0:
                break


def _read_records(source: SourceConfig, plan: Sequence[Segment]) -> Iterator[Document | TokenDocument | Reject]:
    reason_to_drop = make_filter(source.filters, source.name)
    for segment in plan:
        if segment.split != "validation":
            yield from SegmentReader(segment, source.text_column, reason_to_drop)
