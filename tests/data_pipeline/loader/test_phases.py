"""Phases of a run: weights and row lengths that change at a sample."""

import json
from operator import truediv

import numpy as np
import pytest

from amfm.data_pipeline.config import PhaseConfig
from tests.data_pipeline.loader.loading import LENGTH, load, stream

LONGER = (PhaseConfig(start_sample=24, sequence_length=80), PhaseConfig(start_sample=48, weights={"source1": 1.0}))


def test_a_phase_changes_the_weights_from_its_sample_on_and_resumes_across_it(config):
    phases = (PhaseConfig(start_sample=20, weights={"source1": 1.0}),)
    changed = config.model_copy(update={"phases": phases})
    before, after = stream(load(config), 8, 8), stream(load(changed), 8, 8)
    assert all(before[sample] == after[sample] for sample in range(20))
    assert {after[sample][0] for sample in range(20, 64)} == {1}
    first = load(config)
    first.take(8)
    first.take(8)
    resumed = load(changed)
    resumed.load_state_dict(first.state_dict())  # appended after the cursor: allowed
    assert stream(resumed, 6, 8) == {sample: row for sample, row in after.items() if sample >= 16}


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_phase_changes_the_row_length_the_same_way_at_any_world_size_and_after_any_resume(config, packing):
    config = config.model_copy(update={"phases": LONGER, "packing": packing})
    expected = stream(load(config, micro_batch_size=4), 9, 8)
    assert {sample: len(row[1]) for sample, row in expected.items()} == {s: 32 if s < 24 else 80 for s in range(72)}
    assert {expected[sample][0] for sample in range(24, 48)} == {0, 1} and expected[50][0] == 1
    before = stream(load(config.model_copy(update={"phases": ()})), 3, 8)
    assert all(expected[sample] == row for sample, row in before.items()), "a later phase changes nothing before it"
    for world_size, micro_batch, workers, stop in ((1, 1, 1, 24), (2, 2, 0, 16), (8, 1, 0, 32)):
        first = load(config)
        for _ in range(stop // 8):
            first.take(8)
        state, together = json.loads(json.dumps(first.state_dict())), {}
        for rank in range(world_size):
            settings = config.model_copy(update={"num_workers": workers})
            loader = load(settings, micro_batch_size=micro_batch, data_rank=rank, data_world_size=world_size)
            loader.load_state_dict(state)
            together |= stream(loader, (72 - stop) // 8, 8)
        assert together == {sample: row for sample, row in expected.items() if sample >= stop}


def test_a_new_row_length_begins_a_complete_epoch_and_says_what_it_repeats(config):
    settings = config.model_copy(update={"phases": LONGER[:1]})
    loader = load(settings)
    rows = {name: loader.reader.rows_per_epoch(name, 80) for name in loader.source_names}
    places = loader.reader.locate(np.arange(24, 24 + 3 * sum(rows.values()), dtype=np.int64))
    for name, count in rows.items():
        first = [(place.part.path, place.row) for place in places if place.source == name and place.epoch == 1]
        assert len(first) == len(set(first)) == count
    drawn = loader.reader.mixture.draws_before(24)[0]
    remarks = loader.describe_repeats(32)
    assert loader.describe_repeats(24) == [], "the change is beyond the run"
    for name, remark in zip(loader.source_names, remarks, strict=True):
        share = drawn[name] / loader.reader.rows_per_epoch(name)
        assert f"source {name!r}: sequences of 80 tokens begin epoch 1 when {share:.1%}" in remark
    loader.seek(32)
    ledger = loader.ledger()
    assert sum(line.tokens for line in ledger) == 24 * 32 + 8 * 80
    for line in ledger:
        if line.phase == 1:
            share = drawn[line.source] / loader.reader.rows_per_epoch(line.source)
            assert line.epochs == pytest.approx(share + line.samples / rows[line.source])
    assert load(config).describe_repeats(24) == []


def test_epochs_of_three_row_lengths_add_up_by_hand(config):
    changes = tuple(PhaseConfig(start_sample=start, sequence_length=length) for start, length in ((24, 80), (48, 16)))
    reader = load(config.model_copy(update={"phases": changes})).reader
    stretches = reader.stretches("source0")
    starts = [stretch.first_draw for stretch in stretches]
    assert [stretch.sequence_length for stretch in stretches] == [LENGTH, 80, 16] and 0 == starts[0] < starts[
        1
    ] < starts[2]
    rows = [reader.rows_per_epoch("source0", length) for length in (LENGTH, 80, 16)]
    for draws in (0, starts[1] - 1, starts[1], starts[1] + 2, starts[2], starts[2] + 30):
        spent = [min(draws, starts[1]), max(0, min(draws, starts[2]) - starts[1]), max(0, draws - starts[2])]
        assert reader.epochs_after("source0", draws) == pytest.approx(sum(map(truediv, spent, rows)))


def test_sources_of_more_than_one_epoch_are_named_before_the_run(config):
    loader = load(config)
    samples = 2 * sum(loader.reader.rows_per_epoch(name) for name in loader.source_names)
    loader.seek(samples)
    epochs = {line.source: line.epochs for line in loader.ledger()}
    loader.seek(0)
    assert loader.describe_repeats(samples) == [
        f"source {name!r} gives {epochs[name]:.2f} epochs in the {samples} samples of this run" for name in epochs
    ]
    assert min(epochs.values()) > 1


def test_rows_of_two_lengths_in_one_batch_are_refused(config):
    loader = load(config.model_copy(update={"phases": LONGER}))
    loader.seek(20)
    with pytest.raises(
        ValueError, match=r"sequences of 80 tokens start at sample 24, inside the .* 20 to 27; use start_sample 28"
    ):
        loader.take(8)
    loader.take(4, micro_batch_size=4)
    assert loader.sequence_length == 80 and loader.take(8)[0].tokens_BT.shape == (4, 80)


def test_validation_keeps_the_first_phase(config):
    changed = config.model_copy(update={"phases": LONGER})
    assert stream(load(changed, split="validation"), 8, 8) == stream(load(config, split="validation"), 8, 8)


def test_a_source_of_weight_0_waits_for_its_phase_and_may_join_later(config):
    idle = config.sources[1].model_copy(update={"weight": 0.0})
    phases = (PhaseConfig(start_sample=24, weights={"source0": 1.0, "source1": 1.0}),)
    alone = config.model_copy(update={"sources": config.sources[:1]})
    joined = config.model_copy(update={"sources": (config.sources[0], idle), "phases": phases})
    before, after = stream(load(alone), 3, 8), stream(load(joined), 6, 8)
    # Source 0 has the same number among the names either way.
    assert all(after[sample] == row for sample, row in before.items())
    assert {after[sample][0] for sample in range(24, 48)} == {0, 1}
    first = load(alone)
    for _ in range(3):
        first.take(8)
    resumed = load(joined)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert stream(resumed, 3, 8) == {sample: row for sample, row in after.items() if sample >= 24}


def test_past_weights_cannot_be_rewritten(config):
    first = load(config)
    for _ in range(4):
        first.take(8)
    rewritten = config.model_copy(update={"phases": (PhaseConfig(start_sample=20, weights={"source1": 1.0}),)})
    with pytest.raises(ValueError, match=r"append the change to data.phases with start_sample 32 or later"):
        load(rewritten).load_state_dict(first.state_dict())


def test_ledger_counts_samples_tokens_and_epochs_by_source_and_phase(config):
    phases = (PhaseConfig(start_sample=100, weights={"source1": 1.0}),)
    loader = load(config.model_copy(update={"phases": phases}))
    loader.seek(160)
    ledger = loader.ledger()
    assert sum(line.samples for line in ledger if line.phase == 0) == 100
    assert [(line.source, line.samples) for line in ledger if line.phase == 1] == [("source1", 60)]
    assert sum(line.tokens for line in ledger) == 160 * LENGTH
    total = sum(line.samples for line in ledger if line.source == "source1")
    assert ledger[-1].epochs == pytest.approx(total / loader.reader.rows_per_epoch("source1"))


def test_a_phase_of_an_unknown_source_is_refused(config):
    with pytest.raises(
        ValueError, match=r"gives a weight to 'web', which must be one of data.sources: source0, source1"
    ):
        load(config.model_copy(update={"phases": (PhaseConfig(start_sample=20, weights={"web": 1.0}),)}))
