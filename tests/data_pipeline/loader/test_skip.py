"""Samples that are left out: what would follow comes in their place, at any world size, and nothing before them changes."""

from __future__ import annotations

import pytest

from tests.data_pipeline.loader.loading import load, stream

SKIP = ((20, 37), (40, 48))


def by_source(rows, samples):
    """The rows of these samples in order, by source."""
    found = {}
    for sample in samples:
        found.setdefault(rows[sample][0], []).append(rows[sample][1:])
    return found


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_each_source_goes_on_behind_what_is_left_out(config, packing):
    config = config.model_copy(update={"packing": packing})
    plain = stream(load(config), 12, 8)
    once = stream(load(config.model_copy(update={"skip": SKIP[:1]})), 12, 8)
    twice = stream(load(config.model_copy(update={"skip": SKIP})), 12, 8)
    assert all(plain[sample] == once[sample] for sample in range(20))
    assert all(once[sample] == twice[sample] for sample in range(40)), "numbers are those of the run as it went"
    assert any(plain[sample] != once[sample] for sample in range(20, 37))
    left = by_source(plain, [sample for sample in range(96) if not 20 <= sample < 37])
    for source, rows in by_source(once, range(60)).items():
        assert left[source][: len(rows)] == rows, "no row of the source is lost or repeated but those left out"
    two_ranks = {}
    for rank in range(2):
        loader = load(config.model_copy(update={"skip": SKIP}), data_rank=rank, data_world_size=2)
        two_ranks |= stream(loader, 12, 8)
    assert two_ranks == twice


def test_ranges_may_be_appended_but_not_changed_behind_the_cursor(config):
    first = load(config)
    first.take(8)
    first.take(8)
    later = load(config.model_copy(update={"skip": ((16, 24),)}))
    later.load_state_dict(first.state_dict())
    later.take(8)
    with pytest.raises(ValueError, match="samples left out cannot change"):
        load(config.model_copy(update={"skip": ((16, 25),)})).load_state_dict(later.state_dict())
    with pytest.raises(ValueError, match="samples left out cannot change"):
        load(config.model_copy(update={"skip": ((8, 9),)})).load_state_dict(first.state_dict())
    used = {line.source: line.samples for line in later.ledger()}
    assert sum(line.samples for line in later.ledger()) == 24, used
