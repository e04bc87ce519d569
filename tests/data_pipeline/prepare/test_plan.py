"""Units of work: how a text is cut."""

import re

import pytest

from amfm.data_pipeline.config import DataConfig, FilterConfig, PrepareConfig, SourceConfig
from amfm.data_pipeline.prepare.plan import UnitSettings, check_number_of_parts, make_units
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.prepare.segments import Segment
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.manifest import Layout
from tests.helpers.tiny_store import write_jsonl


def test_units_shrink_towards_the_end_so_that_any_number_of_actors_ends_together(tmp_path):
    """Each actor takes the next unit when it is free, as the dispatcher deals them."""
    (file,) = list_files(SourceConfig(name="text", paths=(str(write_jsonl(tmp_path / "text.jsonl", 1, seed=1)),)))
    segments = [Segment(file, number, number + 1, text_bytes=1000) for number in range(101)]
    settings = UnitSettings("text", FilterConfig(), 0.0, 0, 8000, Layout("uint16", 512, "fast"), "", 400, 2)
    units = make_units("text", segments, settings)
    assert [segment for unit in units for segment in unit.segments] == segments
    sizes = [unit.text_bytes for unit in units]
    assert sizes == sorted(sizes, reverse=True) and (sizes[0], sizes[-1]) == (8000, 1000)
    for actors in (1, 2, 3, 8):
        loads = [0] * actors
        for size in sizes:
            loads[loads.index(min(loads))] += size
        assert max(loads) - min(loads) <= 1000, actors
    assert [unit.text_bytes for unit in make_units("text", segments[:3], settings)] == [1000] * 3


def test_more_parts_than_a_manifest_names_are_refused_before_any_text_is_read(tmp_path):
    file = tmp_path / "text.jsonl"
    with file.open("wb") as opened:
        opened.truncate(400_000_000_000)  # a hole: nothing could be read from it, nor segments of it be held
    source = SourceConfig(name="web", paths=(str(file),))
    config = DataConfig(store=str(tmp_path / "store"), sources=(source,), prepare=PrepareConfig(part_bytes=1000))
    with pytest.raises(ValueError, match=r"makes about 800,000,000 parts of 0\.4 TB of text") as refused:
        prepare(config)
    assert not (tmp_path / "store").exists()
    enough = int(re.findall(r"set data\.prepare\.part_bytes=(\d+)", str(refused.value))[0])
    for part_bytes in (enough // 20, enough):
        prepared = config.model_copy(update={"prepare": PrepareConfig(part_bytes=part_bytes)})
        if part_bytes == enough:
            check_number_of_parts({"web": 400_000_000_000}, prepared)
        else:
            with pytest.raises(ValueError, match=f"part_bytes={part_bytes} makes"):
                check_number_of_parts({"web": 400_000_000_000}, prepared)
