"""Rows of windows and of bins; bins that are kept next to a store are used where they are whole, and computed again where they are not."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from amfm.data_pipeline.loader.loader import row_settings
from amfm.data_pipeline.samples.packing import Row, assemble_rows, count_windows, fit_documents, starts_in_window
from amfm.data_pipeline.store.store import TokenStore
from tests.helpers.tiny_store import make_tiny_store


def row_of(tokens, starts, num_valid=None):
    return Row(
        np.array(tokens, np.uint16), np.array(starts, np.int32), len(tokens) if num_valid is None else num_valid, 0, 0
    )


def test_a_row_by_hand():
    """Documents of 3, 2 and more tokens in a row of 6; labels are the next token but never across an end."""
    out = assemble_rows([row_of([5, 6, 2, 7, 2, 8, 9], [0, 3, 5])], mask_document_boundaries=True)
    assert out.tokens.tolist() == [[5, 6, 2, 7, 2, 8]]
    assert out.labels.tolist() == [[6, 2, -100, 2, -100, 9]]
    assert out.loss_mask.tolist() == [[True, True, False, True, False, True]]
    assert out.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert out.document_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert out.cu_seqlens.tolist() == [0, 3, 5, 6]


def test_a_document_that_begins_with_the_extra_token_takes_the_last_label():
    out = assemble_rows([row_of([5, 6, 2, 7], [0, 3])], mask_document_boundaries=True)
    assert out.labels.tolist() == [[6, 2, -100]] and out.cu_seqlens.tolist() == [0, 3]


def test_plain_concatenation_keeps_every_label():
    out = assemble_rows([row_of([5, 6, 2, 7, 2, 8, 9], [0, 3, 5])] * 2, mask_document_boundaries=False)
    assert out.labels.tolist() == [[6, 2, 7, 2, 8, 9]] * 2
    assert out.positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert out.document_ids.max() == 0 and out.cu_seqlens.tolist() == [0, 6, 12]


@pytest.mark.parametrize("masked", [True, False])
def test_padding_has_no_labels_and_a_document_of_its_own(masked):
    out = assemble_rows([row_of([5, 6, 2, 3, 3], [0], num_valid=3)], mask_document_boundaries=masked)
    assert out.labels.tolist() == [[6, 2, -100, -100]]
    assert out.document_ids.tolist() == [[0, 0, 0, 1]]
    assert out.cu_seqlens.tolist() == [0, 3, 4]


def test_one_token_rows_and_one_token_documents():
    out = assemble_rows([row_of([2, 2], [0, 1])], mask_document_boundaries=True)
    assert out.labels.tolist() == [[-100]] and out.positions.tolist() == [[0]]
    out = assemble_rows([row_of([2, 2, 2, 2], [0, 1, 2, 3])], mask_document_boundaries=True)
    assert out.document_ids.tolist() == [[0, 1, 2]] and not out.loss_mask.any()


def test_windows_cover_a_part_and_each_token_is_labelled_once():
    assert [count_windows(n, 8) for n in (0, 1, 8, 9, 16, 17)] == [0, 0, 0, 1, 1, 2]


def test_starts_in_a_window_by_hand():
    ends = np.array([3, 5, 5 + 7, 20], np.int64)
    assert starts_in_window(ends, 0, 6).tolist() == [0, 3, 5]
    assert starts_in_window(ends, 3, 6).tolist() == [0, 2]
    assert starts_in_window(ends, 4, 9).tolist() == [0, 1, 8]


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_best_fit_places_every_token_once_and_overfills_nothing(capacity):
    random = np.random.default_rng(capacity)
    lengths = random.geometric(0.02, size=500)
    ends = np.cumsum(lengths).astype(np.uint64)
    bins = fit_documents(ends, capacity)
    covered = np.zeros(int(ends[-1]), int)
    document_of = np.repeat(np.arange(500), lengths)
    for number in range(bins.num_bins):
        pieces = slice(bins.bin_offsets[number], bins.bin_offsets[number + 1])
        assert 0 < bins.length[pieces].sum() <= capacity
        for first, length in zip(bins.first[pieces], bins.length[pieces]):
            covered[first : first + length] += 1
            assert len(set(document_of[first : first + length])) == 1
    assert (covered == 1).all()
    whole = lengths <= capacity
    assert whole.sum() + (-(-lengths[~whole] // capacity)).sum() == len(bins.length), "short documents stay whole"


def test_best_fit_leaves_under_one_percent_padding():
    lengths = np.random.default_rng(0).geometric(1 / 680, size=5000)
    bins = fit_documents(np.cumsum(lengths).astype(np.uint64), 4096)
    assert bins.num_bins * 4096 < 1.01 * lengths.sum()


def test_a_part_without_documents_has_no_bins():
    assert fit_documents(np.zeros(0, np.uint64), 64).num_bins == 0


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_tiny_store(folder, num_documents=60, mean_words=12).model_copy(update={"packing": "best_fit"})


def rows_of(config) -> list[list[int]]:
    reader = row_settings(config, split="train", sequence_length=40, seed=1).open_reader()
    return [row.tokens.tolist() for row in reader.read(np.arange(reader.rows_per_epoch("source0")))[0]]


def test_kept_bins_that_are_damaged_are_computed_and_written_again(config):
    expected, folder, drawn = rows_of(config), Path(config.store, "bins", "40"), random.Random(0)
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.suffix for path in kept} == {".json", ".npz"}
    for path, content in kept.items():
        for _ in range(20):
            damaged = bytearray(content)
            damaged[drawn.randrange(len(damaged))] ^= 1 << drawn.randrange(8)
            path.write_bytes(damaged[: drawn.choice([len(damaged), drawn.randrange(len(damaged))])])
            assert rows_of(config) == expected
            assert path.read_bytes() == content


def test_kept_bins_are_not_computed_again(config):
    expected, folder = rows_of(config), Path(config.store, "bins", "40")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert rows_of(config) == expected
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    shutil.rmtree(folder)
    assert rows_of(config) == expected and set(folder.iterdir()) == set(before)


def test_the_last_label_of_a_full_row_is_of_the_same_document_or_none(config):
    """Rows as long as a document that there is: filled by one document to its end, by a piece of a longer one, or by several."""
    store = TokenStore.open(config.store)
    parts = store.parts("source0", "train")
    documents = [
        np.split(store.read_tokens(part, 0, part.num_tokens), store.document_ends(part)[:-1]) for part in parts
    ]
    texts = [document.tolist() for part in documents for document in part]
    length = Counter(map(len, texts)).most_common(1)[0][0]
    assert any(len(text) > 2 * length for text in texts)
    reader = row_settings(config, split="train", sequence_length=length, seed=1).open_reader()
    whole, cut = 0, 0
    for row in reader.read(np.arange(reader.rows_per_epoch("source0")))[0]:
        if row.num_valid >= length and len(row.starts) == 1:
            last = row.tokens[length - 1]
            assert row.num_valid == (length if last == store.eos_id else length + 1)
            assert any(contains(text, row.tokens[: row.num_valid].tolist()) for text in texts)
            whole, cut = whole + (last == store.eos_id), cut + (last != store.eos_id)
    assert whole > 0 and cut > 0


def contains(text: list[int], piece: list[int]) -> bool:
    return any(text[start : start + len(piece)] == piece for start in range(len(text) - len(piece) + 1))
