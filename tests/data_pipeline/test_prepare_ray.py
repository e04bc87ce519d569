"""Two units in one actor: the one that kills it is found, and the one beside it is not blamed."""

import pytest

from data_pipeline.documents import SegmentReader
from data_pipeline.journal import Journal
from data_pipeline.prepare import prepare
from data_pipeline.prepare_ray import run_on_ray
from tests.data_pipeline.deadly_tokenizer import DeadlyTokenizer
from tests.data_pipeline.test_prepare import contents, elsewhere
from tests.helpers.tiny_store import make_tiny_store, run_in_process


def texts_of(unit):
    return [item.text for segment in unit.segments for item in SegmentReader(segment, "text")]


@pytest.mark.parametrize("place", [0, 3])
def test_a_text_that_kills_its_actor_is_named_and_its_neighbour_is_not_blamed(tmp_path, place):
    reference = make_tiny_store(tmp_path / "reference", part_bytes=20_000)
    config = elsewhere(reference, tmp_path, num_actors=1)
    seen = []

    def deadly_runner(units, store, tokenizer, config):
        seen.extend(units)
        return run_on_ray(units, store, DeadlyTokenizer(tokenizer.to_bytes(), texts_of(units[place])[0]), config)

    with pytest.raises(RuntimeError, match=r"the process that writes part (\S+) died 3 times") as caught:
        prepare(config, runner=deadly_runner)
    assert len(seen) > 5 and f"part {seen[place].name} died" in str(caught.value)
    written = [unit for unit in seen if Journal(tmp_path / "store").find(tmp_path / "store", unit)]
    assert seen[place] not in written
    assert len(written) >= place - 1, "of those before it only the one beside it may have gone with the actor"
    assert prepare(config, runner=run_in_process).units_written == len(seen) - len(written)
    assert contents(config.store) == contents(reference.store)
