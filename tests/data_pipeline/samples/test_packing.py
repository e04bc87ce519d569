import numpy as np
import pytest

from amfm.data_pipeline.samples.packing import Row, assemble_rows, count_windows, fit_documents, starts_in_window


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
