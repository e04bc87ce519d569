"""What a preparation says: its progress on the way, and its report at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.unit import UnitReport
from amfm.data_pipeline.store.manifest import SPLITS, Part, Split
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Progress:
    """Progress of a preparation; rates count what this call read in this stage.

    stage: "tokenizer" while it is trained, "duplicates" while they are looked for, then "tokenize". eta_seconds: None
    before the first part is done.
    """

    stage: str
    units_done: int
    units_total: int
    documents: int
    text_bytes: int
    tokens: int
    rejects: int
    seconds: float
    eta_seconds: float | None

    @property
    def documents_per_second(self) -> float:
        """Documents over the seconds of this stage."""
        return self.documents / max(self.seconds, 1e-9)

    @property
    def megabytes_per_second(self) -> float:
        """10^6 bytes of text over the seconds of this stage."""
        return self.text_bytes / 1e6 / max(self.seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the seconds of this stage."""
        return self.tokens / max(self.seconds, 1e-9)


ShowProgress = Callable[[Progress], None] | None


@dataclass(frozen=True)
class PrepareReport:
    """What a preparation found and did. tokens and documents: by source and split, of the whole store.

    first_rejects: of each source that has any, where the first is and why. warnings: on leftovers that could not be deleted, and on sources with too little text.
    """

    store: str
    identity: str
    tokenizer_identity: str
    vocab_size: int
    units_total: int
    units_written: int
    tokens: dict[str, dict[Split, int]]
    documents: dict[str, dict[Split, int]]
    text_bytes: int
    rejects: int
    seconds: float
    first_rejects: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def make_report(
    config: DataConfig,
    identity: str,
    tokenizer: Tokenizer,
    reports: Mapping[str, Sequence[UnitReport]],
    *,
    units_written: int,
    seconds: float,
) -> PrepareReport:
    """Sum up what the parts' reports say."""

    def total(count: Callable[[Part], int]) -> dict[str, dict[Split, int]]:
        return {
            name: {split: sum(count(part) for item in of_source for part in item.parts[split]) for split in SPLITS}
            for name, of_source in reports.items()
        }

    everything = [report for of_source in reports.values() for report in of_source]
    return PrepareReport(
        store=config.text_store(),
        identity=identity,
        tokenizer_identity=tokenizer.identity(),
        vocab_size=tokenizer.vocab_size,
        units_total=len(everything),
        units_written=units_written,
        tokens=total(lambda part: part.num_tokens),
        documents=total(lambda part: part.num_documents),
        text_bytes=sum(report.text_bytes for report in everything),
        rejects=sum(report.rejects for report in everything),
        seconds=seconds,
    )
