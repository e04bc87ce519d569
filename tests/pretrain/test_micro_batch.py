"""From the loader's batch to the model's input: the same documents, found on the CPU, and no value read on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amfm.data_pipeline.batch import Batch
from amfm.data_pipeline.samples.packing import Row, assemble_rows
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.micro_batch import MicroBatch, MicroBatches
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.model.small_models import small_config

LENGTH = 24


def make_batch(starts: list[list[int]], *, num_valid: int = LENGTH + 1) -> Batch:
    """Rows of 24 random tokens with documents that begin at these places."""
    generator = np.random.default_rng(3)
    rows = [
        Row(generator.integers(0, 40, LENGTH + 1, dtype=np.int64), np.array(places, np.int32), num_valid, number, 0)
        for number, places in enumerate(starts)
    ]
    arrays = assemble_rows(rows, mask_document_boundaries=True)
    return Batch(
        tokens_BT=torch.from_numpy(arrays.tokens),
        labels_BT=torch.from_numpy(arrays.labels),
        loss_mask_BT=torch.from_numpy(arrays.loss_mask),
        positions_BT=torch.from_numpy(arrays.positions),
        document_ids_BT=torch.from_numpy(arrays.document_ids),
        cu_seqlens=torch.from_numpy(arrays.cu_seqlens),
        sample_ids=(0,) * len(rows),
        source_ids=(0,) * len(rows),
    )


@pytest.mark.parametrize(
    ("starts", "num_valid"), [([[0], [0]], 25), ([[0, 24], [0]], 25), ([[0, 1, 13], [0]], 25), ([[0], [0]], 17)]
)
def test_the_layout_is_that_of_the_document_ids(starts: list[list[int]], num_valid: int) -> None:
    batch = make_batch(starts, num_valid=num_valid)
    built = MicroBatch.from_batch(batch, 0, 1)
    expected = PackMeta.from_document_ids(batch.document_ids_BT)
    assert built.meta.single_document == expected.single_document
    assert torch.equal(built.meta.document_ids_BT, expected.document_ids_BT)
    assert torch.equal(built.meta.positions_BT, expected.positions_BT)
    assert built.meta.positions_BT.dtype == expected.positions_BT.dtype == torch.int32


def test_context_ranks_cut_tokens_labels_and_layout_alike() -> None:
    batch = make_batch([[0, 5, 13], [0]])
    for rank in range(2):
        own = MicroBatch.from_batch(batch, rank, 2)
        places = [*range(6 * rank, 6 * rank + 6), *range(18 - 6 * rank, 24 - 6 * rank)]
        assert torch.equal(own.tokens_BT, batch.tokens_BT[:, places])
        assert torch.equal(own.labels_BT, batch.labels_BT[:, places])
        assert torch.equal(own.meta.positions_BT, batch.positions_BT[:, places])


@pytest.mark.parametrize("starts", [[[0], [0]], [[0, 5, 13], [0]]])
def test_no_value_of_a_device_tensor_is_read_on_the_way_through_the_model(starts: list[list[int]]) -> None:
    # Tensors on the meta device have no values: whatever would make the host wait for a GPU raises here.
    model = HybridModel(small_config("M*E-"), single_rank_groups(), device="meta")
    given = MicroBatch.from_batch(make_batch(starts), 0, 1).to(torch.device("meta"))
    output = model(given.tokens_BT, given.meta, given.labels_BT)
    assert output.loss is not None
    (output.loss.total + sum(output.auxiliary.values())).backward()
    assert given.meta.document_ids_BT.device.type == "meta"


@pytest.mark.parametrize("asked", [[0, 1, 2], [0, 0, 2, 1], [-1]])
def test_a_step_s_micro_batches_are_prepared_when_they_are_first_asked_for_and_once(asked: list[int]) -> None:
    parallel = initialize_parallel(timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    batches = [make_batch([[0, place], [0]]) for place in (3, 5, 9)]
    given = MicroBatches(batches, parallel, small_config("M"))
    assert len(given) == 3
    seen = {}
    for number in asked:
        seen[number % 3] = given[number]
        assert len(given._ready) == max(seen) + 1, "not those whose turn has not come"
    for number, found in seen.items():
        assert given[number] is found
        assert torch.equal(found.meta.document_ids_BT, batches[number].document_ids_BT)
    assert [entry.tokens_BT.tolist() for entry in given[:2]] == [batch.tokens_BT.tolist() for batch in batches[:2]]
