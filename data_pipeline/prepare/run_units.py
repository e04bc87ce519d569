"""Who writes the units of a store: this process where the text is small, else Ray actors. The bytes are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from amfm.data_pipeline.config import DataConfig
from amfm.data_pipeline.prepare.plan import Unit
from amfm.data_pipeline.prepare.ray_actors import run_on_ray
from amfm.data_pipeline.prepare.unit import UnitFailure, UnitReport, run_unit
from amfm.data_pipeline.progress import Report, silent
from amfm.data_pipeline.store.part_writer import import_zarr
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer

SMALL_BYTES = 50_000_000  # of text: one process has written it by the time that Ray and its actors have started


def run_units(
    units: Sequence[Unit],
    store: Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    address: str | None = None,
    report: Report = silent,
) -> Iterator[tuple[Unit, UnitReport | UnitFailure]]:
    """Write units and yield each report as it comes; errors of a unit are raised.

    In this process where the units have less than SMALL_BYTES of text, no cluster is named by `address` and
    `data.prepare.num_actors` does not ask for several.
    """
    text_bytes = sum(unit.text_bytes for unit in units)
    if address is not None or (config.prepare.num_actors or 1) > 1 or text_bytes >= SMALL_BYTES:
        yield from run_on_ray(units, store, tokenizer, config, address=address, report=report)
        return
    import_zarr()
    for unit in units:
        yield unit, run_unit(unit, store, tokenizer)
