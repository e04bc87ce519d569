"""The layout of packed sequences against one computed document by document."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amfm.model.packing import PackMeta

partitions = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(partitions, min_size=1, max_size=3), st.data())
def test_layout_equals_the_documents_written_out(rows, data):
    longest = max(map(sum, rows))
    lengths = [row + [longest - sum(row)] * (sum(row) < longest) for row in rows]
    first = data.draw(st.integers(0, 3))
    ids_BT = torch.tensor([[first + d for d, n in enumerate(row) for _ in range(n)] for row in lengths])
    meta = PackMeta.from_document_ids(ids_BT)
    assert meta.positions_BT.tolist() == [[t for n in row for t in range(n)] for row in lengths]
    assert meta.single_document == all(len(row) == 1 for row in lengths)
    assert (meta.boundaries_BT() is None) == meta.single_document
    assert meta.document_ids_BT.dtype == torch.int32 and not meta.first_continues
    bounds = meta.find_bounds()
    if meta.single_document:
        assert bounds.document_starts_BT() is None and bounds.document_ends is None
        return
    starts_BT = [[t - place for t, place in enumerate(row)] for row in meta.positions_BT.tolist()]
    assert bounds.document_starts_BT().tolist() == meta.document_starts_BT().tolist() == starts_BT
    moved = bounds.map_tensors(torch.clone)
    every = [n for row in lengths for n in row]
    assert moved.document_ends.offsets.diff().tolist() == every and moved.document_ends.longest == max(every)


def test_rows_of_one_document_can_start_anywhere():
    meta = PackMeta.one_document_a_row(2, 3, start=4)
    assert meta.positions_BT.tolist() == [[4, 5, 6]] * 2
    assert meta.single_document and meta.first_continues
    assert not PackMeta.one_document_a_row(1, 1).first_continues


def test_what_is_changed_is_every_tensor_that_there_is():
    for meta in (PackMeta.one_document_a_row(2, 3), PackMeta.from_document_ids(torch.tensor([[0, 0, 1], [2, 3, 3]]))):
        moved = meta.map_tensors(lambda tensor: tensor.to("meta"))
        for name, value in vars(meta).items():
            if isinstance(value, torch.Tensor):
                assert getattr(moved, name).is_meta and getattr(moved, name).shape == value.shape
            elif name not in ("document_ends", "segments"):
                assert getattr(moved, name) == value
        assert (meta.document_ends is None) == (moved.document_ends is None)


def test_given_positions_are_kept():
    ids_BT = torch.zeros(1, 3, dtype=torch.int32)
    assert PackMeta.from_document_ids(ids_BT, torch.tensor([[5, 6, 7]])).positions_BT.tolist() == [[5, 6, 7]]


def test_falling_ids_and_empty_rows_are_refused():
    with pytest.raises(ValueError, match="must not decrease"):
        PackMeta.from_document_ids(torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="not empty"):
        PackMeta.from_document_ids(torch.zeros(0, 4))
