"""How users call a model: arguments, outputs, packed and padded rows, losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.pretrain.export.habits.exported import Exported, assert_near, habit, tokens

# Documents of a packed sequence, and where they begin and end.
EDGES = (0, 5, 6, 12)
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2]], dtype=torch.int32)


def assert_documents_alone(export: Exported, packed: Tensor, ids: Tensor, *, bits: bool) -> None:
    for start, stop in pairwise(EDGES):
        alone = export.model()(ids[:, start:stop]).logits
        if bits:
            assert torch.equal(packed[:, start:stop], alone)
        else:
            assert_near(packed[:, start:stop], alone)


@contextmanager
def refused_by_name() -> Iterator[None]:
    """A class that needs kernels for packed sequences says so; numbers of one row for another are not answer."""
    try:
        yield
    except ValueError as error:
        assert "packed sequences apart" in str(error)


def is_own(export: Exported) -> bool:
    return bool(export.arguments)


@habit()
def documents_of_a_packed_row_are_named_by_positions_alone(export: Exported) -> None:
    ids = tokens(1)
    assert_documents_alone(
        export, export.model()(ids, position_ids=POSITIONS, use_cache=False).logits, ids, bits=is_own(export)
    )


@habit(slow=True)
def documents_of_a_packed_row_are_named_by_seq_idx(export: Exported) -> None:
    ids = tokens(1)
    with refused_by_name():
        packed = export.model()(ids, position_ids=POSITIONS, seq_idx=DOCUMENTS, use_cache=False).logits
        assert_documents_alone(export, packed, ids, bits=is_own(export))


@habit()
def documents_of_a_packed_row_are_named_by_their_lengths(export: Exported) -> None:
    ids, lengths = tokens(1), torch.tensor(EDGES, dtype=torch.int32)
    names: dict[str, Any] = {
        "use_cache": False,
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": 6,
        "max_length_k": 6,
    }
    with refused_by_name():
        packed = export.model()(ids, position_ids=POSITIONS, seq_idx=DOCUMENTS, **names).logits
        assert_documents_alone(export, packed, ids, bits=is_own(export))


@habit(slow=True)
def rows_of_a_flattening_collator_train_as_rows_apart(export: Exported) -> None:
    from transformers import DataCollatorWithFlattening

    texts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 7)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    packed = None
    with refused_by_name():
        packed = export.model()(
            **collate([{"input_ids": text, "labels": text} for text in texts]), use_cache=False
        ).loss
    each = [export.model()(torch.tensor([t]), labels=torch.tensor([t])).loss * (len(t) - 1) for t in texts]
    assert packed is None or float((packed - sum(each) / (4 + 6)).abs()) < 1e-4


@habit()
def padding_on_either_side_changes_nothing(export: Exported) -> None:
    ids = tokens()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    found = export.model()(ids, attention_mask=mask).logits
    assert_near(found[1:, 5:], export.model()(ids[1:, 5:]).logits)
    assert_near(found[:1], export.model()(ids[:1]).logits)
    found = export.model()(ids, attention_mask=mask.flip(1)).logits
    assert_near(found[1:, :7], export.model()(ids[1:, :7]).logits)


@habit()
def a_misspelt_argument_is_an_error(export: Exported) -> None:
    with pytest.raises(TypeError, match="atention_mask"):
        export.model()(tokens(), atention_mask=torch.ones(2, 12))


@habit()
def embeddings_stand_in_for_ids(export: Exported) -> None:
    embeds = export.model().get_input_embeddings()(tokens())
    assert_near(export.model()(inputs_embeds=embeds).logits, export.model()(tokens()).logits)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        export.model()(tokens(), inputs_embeds=embeds)


@habit(slow=True)
def hidden_states_are_the_embeddings_and_each_block(export: Exported) -> None:
    output = export.model()(tokens(), output_hidden_states=True)
    base = export.model().base_model(tokens()).last_hidden_state
    assert len(output.hidden_states) == export.model().config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[-1], base) and output.hidden_states[0].shape == base.shape
    assert output.hidden_states[0].shape == output.hidden_states[1].shape


@habit()
def logits_are_kept_of_the_tokens_asked_for(export: Exported) -> None:
    whole = export.model()(tokens()).logits
    assert_near(export.model()(tokens(), logits_to_keep=1).logits, whole[:, -1:])
    assert_near(export.model()(tokens(), logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]])


@habit(slow=True)
def a_tuple_is_returned_where_asked_for(export: Exported) -> None:
    loss, logits, *_ = export.model()(tokens(), labels=tokens(), return_dict=False)
    assert torch.equal(logits, export.model()(tokens()).logits) and loss.dim() == 0


@habit()
def the_loss_is_that_of_the_next_token_where_labels_count(export: Exported) -> None:
    labels = tokens()
    labels[0, :7] = -100
    output = export.model()(tokens(), labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_near(output.loss, expected)


@habit(slow=True)
def the_loss_of_a_piece_is_divided_by_the_items_of_all(export: Exported) -> None:
    mean = export.model()(tokens(), labels=tokens()).loss
    for count in (44, torch.tensor(44)):
        assert_near(export.model()(tokens(), labels=tokens(), num_items_in_batch=count).loss, mean * 22 / 44)


@habit()
def a_text_in_pieces_is_the_whole_text(export: Exported) -> None:
    whole, cache, start = export.model()(tokens()).logits, None, 0
    for length in (7, 1, 1, 3):
        piece: Any = export.model()(tokens()[:, start : start + length], cache=cache, use_cache=True)
        cache = piece.cache
        assert_near(piece.logits, whole[:, start : start + length])
        start += length
    assert cache.get_seq_length() == 12
