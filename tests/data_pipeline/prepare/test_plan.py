"""Units of work: how a text is cut."""

from amfm.data_pipeline.config import FilterConfig, SourceConfig
from amfm.data_pipeline.prepare.documents import Segment
from amfm.data_pipeline.prepare.plan import UnitSettings, make_units
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
