import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch

from amfm.data_pipeline.config import PhaseConfig
from amfm.data_pipeline.store.shards import DamagedError
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from tests.data_pipeline.loader.loading import LENGTH, load, stream
from tests.helpers.tiny_store import make_tiny_store


# Each reading process is a new interpreter: one order is read by some quickly, all slowly.
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("shuffle", ["full", "block"])
@pytest.mark.parametrize("most_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_order_is_the_same_at_any_world_size_micro_batch_and_worker_count(config, packing, shuffle, most_workers):
    compare_sizes(config, packing, shuffle, ((1, 1, 1), (2, 4, 0), (2, 2, 2), (8, 1, 0), (8, 2, 0)), most_workers)


def test_the_order_of_a_reading_process_is_that_without_one(config):
    compare_sizes(config, "best_fit", "block", ((1, 2, 2),), 2)


def compare_sizes(config, packing, shuffle, sizes, most_workers):
    config = config.model_copy(update={"packing": packing, "shuffle": shuffle})
    expected = stream(load(config, micro_batch_size=4), 3, 16)
    assert sorted(expected) == list(range(48))
    for world_size, micro_batch, workers in sizes:
        config = config.model_copy(update={"num_workers": min(workers, most_workers)})
        together = {}
        for rank in range(world_size):
            loader = load(config, micro_batch_size=micro_batch, data_rank=rank, data_world_size=world_size)
            together |= stream(loader, 3, 16)
        assert together == expected, (world_size, micro_batch, workers)


def test_micro_batches_are_the_same_blocks_at_any_world_size(config):
    alone = {batch.sample_ids for batch in load(config).take(16)}
    spread = {b.sample_ids for rank in range(4) for b in load(config, data_rank=rank, data_world_size=4).take(16)}
    assert alone == spread and (0, 1) in alone


@pytest.mark.parametrize(
    ("workers", "stop"), [(0, 1), (0, 3), (1, 3), *(pytest.param(2, stop, marks=pytest.mark.slow) for stop in (1, 3))]
)
def test_resume_anywhere_continues_the_order_even_with_other_sizes(config, workers, stop):
    expected = stream(load(config), 8, 8)
    config = config.model_copy(update={"num_workers": workers})
    first = load(config)
    before = {}
    for _ in range(stop):
        for batch in first.take(8):
            before |= {sample: None for sample in batch.sample_ids}
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    after = {}
    for rank in range(2):
        second = load(config, micro_batch_size=4, data_rank=rank, data_world_size=2)
        second.load_state_dict(state)
        after |= stream(second, (64 - 8 * stop) // 8, 8)
    assert sorted([*before, *after]) == list(range(64))
    assert all(after[sample] == expected[sample] for sample in after)


def test_global_batch_may_change_and_seek_discards_what_was_read_ahead(config):
    expected = stream(load(config), 8, 8)
    loader = load(config.model_copy(update={"num_workers": 2}))
    for batch_size, goto in ((8, 8), (16, 24), (2, 26), (4, 10), (16, 26)):
        for batch in loader.take(batch_size):
            for number, sample in enumerate(batch.sample_ids):
                assert batch.tokens_BT[number].tolist() == expected[sample][1]
        loader.seek(goto)
    loader.close()


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_every_epoch_of_every_source_is_complete_without_repeats(config, packing, shuffle):
    loader = load(config.model_copy(update={"packing": packing, "shuffle": shuffle}))
    places = {}
    for place in loader.reader.locate(np.arange(12_000, dtype=np.int64)):
        places.setdefault((place.source, place.epoch), []).append((place.part.path, place.row))
    complete = 0
    for (source, epoch), rows in places.items():
        assert len(set(rows)) == len(rows), "a row came twice in one epoch"
        if (source, epoch + 1) in places:
            complete += 1
            assert len(rows) == loader.reader.rows_per_epoch(source)
    assert complete >= 4
    first, second = places["source0", 0], places["source0", 1]
    alike = sum(one == other for one, other in zip(first, second))
    assert alike < len(second) / 10, "epochs have their own orders"


def test_rows_hold_the_tokens_of_the_store_in_order(config):
    loader = load(config)
    store = loader.store
    tokens = {part.path: store.read_tokens(part, 0, part.num_tokens) for _, _, part in store.all_parts()}
    batch = loader.take(2)[0]
    for number, place in enumerate(loader.reader.locate(np.arange(2))):
        window = tokens[place.part.path][place.row * LENGTH : place.row * LENGTH + LENGTH + 1].astype(np.int64)
        assert batch.tokens_BT[number].tolist() == window[:-1].tolist()
        kept = batch.loss_mask_BT[number].numpy()
        assert (batch.labels_BT[number].numpy()[kept] == window[1:][kept]).all()
        assert (window[:-1][~kept] == store.eos_id).all(), "only the label after an end is masked"


def test_masks_positions_ids_and_cu_seqlens_tell_the_same_documents(config):
    for packing in ("concatenate", "best_fit"):
        for batch in load(config.model_copy(update={"packing": packing})).take(32):
            ids, positions = batch.document_ids_BT.flatten(), batch.positions_BT.flatten()
            cu = batch.cu_seqlens.tolist()
            assert cu[0] == 0 and cu[-1] == ids.numel() and set(range(0, cu[-1], LENGTH)) <= set(cu)
            for start, stop in pairwise(cu):
                assert len(set(ids[start:stop].tolist())) == 1
                assert positions[start:stop].tolist() == list(range(stop - start))
            assert batch.tokens_BT.dtype == torch.int64 and batch.positions_BT.dtype == torch.int32
            assert (batch.labels_BT[~batch.loss_mask_BT] == -100).all()


def test_weights_are_met_exactly_in_every_block(config):
    loader = load(config)
    sources = [place.source for place in loader.reader.locate(np.arange(4096, dtype=np.int64))]
    assert sources.count("source0") == round(4096 / 3) and sources.count("source1") == 4096 - round(4096 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 8}, "seed 7, this run has 8; set train.seed back"),
        ({"sequence_length": 16}, "sequence_length 32, this run has 16; set it back, and change it by data.phases"),
        ({"split": "validation"}, "split 'train', this run has 'validation'"),
    ],
)
def test_a_state_of_another_run_is_refused_naming_both_values(config, changes, message):
    with pytest.raises(ValueError, match=message):
        load(config, **changes).load_state_dict(load(config).state_dict())


def test_a_state_of_another_dataset_or_tokenizer_is_refused_naming_both(config, tmp_path):
    state = load(config).state_dict()
    other_text = make_tiny_store(tmp_path / "text", num_sources=2, seed=3)
    with pytest.raises(ValueError, match=rf"has tokenizer '{state['tokenizer']}', this run has '"):
        load(other_text).load_state_dict(state)
    same_tokenizer = make_tiny_store(
        tmp_path / "more",
        num_sources=2,
        seed=3,
        tokenizer=config.tokenizer.model_copy(update={"model": str(TokenStore.open(config.store).tokenizer_path)}),
    )
    with pytest.raises(ValueError, match=rf"has dataset {state['dataset']} .*, the store .* has "):
        load(same_tokenizer).load_state_dict(state)


def test_adding_a_source_changes_no_other_sources_order(config, tmp_path):
    """The new source is prepared into the same store and drawn in a later phase; the state still loads."""
    from amfm.data_pipeline.config import SourceConfig
    from amfm.data_pipeline.prepare.prepare import prepare
    from tests.helpers.tiny_store import run_in_process, write_jsonl

    shutil.copytree(config.store, tmp_path / "store")
    new = SourceConfig(name="extra", paths=(str(write_jsonl(tmp_path / "extra.jsonl", 100, seed=77)),))
    phases = (
        PhaseConfig(start_sample=0, weights={"source0": 1.0, "source1": 2.0}),
        PhaseConfig(start_sample=16, weights={"source0": 1.0, "extra": 1.0}),
    )
    grown = config.model_copy(
        update={"store": str(tmp_path / "store"), "sources": (*config.sources, new), "phases": phases}
    )
    report = prepare(grown, runner=run_in_process)
    assert 0 < report.units_written < report.units_total
    first = load(config)
    first.take(8)
    second = load(grown)
    second.load_state_dict(first.state_dict())
    tokens_before, tokens_after = first.take(8)[0].tokens_BT, second.take(8)[0].tokens_BT
    assert torch.equal(tokens_before, tokens_after)


def test_a_row_longer_than_every_part_is_refused(config):
    with pytest.raises(ValueError, match=r"train.sequence_length=100000 must be below the \d+ tokens of the largest"):
        load(config, sequence_length=100_000)


def test_a_store_without_validation_documents_says_so(tmp_path):
    config = make_tiny_store(tmp_path, validation_fraction=0.0)
    with pytest.raises(ValueError, match=r"has no validation documents in the store .* raise data.validation_fraction"):
        load(config, split="validation")


def test_global_batch_must_divide(config):
    with pytest.raises(ValueError, match=r"global_batch_size=10 must be a multiple of micro_batch_size 2 x 4 .* use 8"):
        load(config, data_world_size=4).take(10)


def test_train_and_validation_share_no_document(config):
    tokenizer = load_tokenizer(config.store)
    store = TokenStore.open(config.store)
    texts = {"train": set(), "validation": set()}
    for _, split, part in store.all_parts():
        tokens, start = store.read_tokens(part, 0, part.num_tokens), 0
        for end in store.document_ends(part).tolist():
            texts[split].add(tokenizer.decode(tokens[start : end - 1].tolist()))
            start = end
    assert len(texts["train"]) + len(texts["validation"]) == 600
    assert not texts["train"] & texts["validation"]
    assert 30 < len(texts["validation"]) < 95  # a tenth of 600; 5 standard deviations are 37


def damage_first_part(store_path):
    store = TokenStore.open(store_path)
    part = store.parts("source0", "train")[0]
    file = store.path / part.path / "tokens" / "c" / "0"
    content = bytearray(file.read_bytes())
    content[100] ^= 4
    file.write_bytes(content)
    return part


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_stops_the_run_or_is_skipped_logged_and_remembered(config, tmp_path, workers, caplog):
    shutil.copytree(config.store, tmp_path / "store")
    update = {"store": str(tmp_path / "store"), "num_workers": workers}
    whole = stream(load(config, micro_batch_size=64), 25, 64)
    part = damage_first_part(tmp_path / "store")
    stopping = load(config.model_copy(update=update), micro_batch_size=64)
    with pytest.raises(DamagedError, match="chunk 0 fails its crc32c"):
        stream(stopping, 25, 64)
    stopping.close()
    skipping = load(config.model_copy(update=update | {"on_corruption": "quarantine"}), micro_batch_size=64)
    rows = {}
    for _ in range(25):
        for batch in skipping.take(64):
            rows |= {sample: batch.labels_BT[n].tolist() for n, sample in enumerate(batch.sample_ids)}
    state = skipping.state_dict()
    skipping.seek(0)
    skipping.take(64 * 25)
    assert skipping.state_dict()["quarantined"] == state["quarantined"], "rows that are read again are not news"
    skipping.close()
    skipped = {entry[0] for entry in state["quarantined"]}
    assert skipped and all(entry[1] == part.path for entry in state["quarantined"])
    assert all(set(rows[sample]) == {-100} for sample in skipped)
    assert all(rows[sample] == whole[sample][2] for sample in rows if sample not in skipped)
    assert "skipped" in caplog.text and part.path in caplog.text


def test_a_missing_part_is_found_at_the_start(config, tmp_path):
    shutil.copytree(config.store, tmp_path / "store")
    store = TokenStore.open(tmp_path / "store")
    shutil.rmtree(store.path / store.parts("source0", "train")[-1].path)
    with pytest.raises(DamagedError, match=r"is missing; run `amfm prepare CONFIG`"):
        load(config.model_copy(update={"store": str(tmp_path / "store")}))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_is_kept_is_not_written_over_by_later_ones(config, workers):
    """The memory of batches is used again, but only of those that no one holds."""
    loader = load(config.model_copy(update={"num_workers": workers}))
    kept = loader.take(8)
    copies = [batch.tokens_BT.clone() for batch in kept]
    for _ in range(6):
        loader.take(8)
    loader.close()
    assert all(torch.equal(batch.tokens_BT, copy) for batch, copy in zip(kept, copies))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_blocks_whose_places_were_found_ahead_are_the_rows_read_alone(config, packing):
    """Any stride, a change of it and of the size, and a jump back: places found ahead are only a shortcut."""
    reader = load(config.model_copy(update={"packing": packing})).reader
    for first, count, stride in (
        (0, 2, 8),
        (8, 2, 8),
        (16, 2, 8),
        (17, 2, 3),
        (20, 5, 5),
        (25, 5, 5),
        (8, 2, 8),
        (4095, 1, 1),
    ):
        rows, _ = reader.read_block(first, count, stride)
        alone, _ = reader.read(np.arange(first, first + count, dtype=np.int64))
        assert [row.sample for row in rows] == list(range(first, first + count))
        for ours, expected in zip(rows, alone):
            assert np.array_equal(ours.tokens, expected.tokens) and np.array_equal(ours.starts, expected.starts)
            assert (ours.num_valid, ours.source) == (expected.num_valid, expected.source)
