"""Prefill and one-token steps give the logits of the full forward, at a cost a token that does not grow in Mamba2."""

import pytest
import torch

from amfm.model.packing import PackMeta
from tests.model.small_models import decode, packed_batch, small_config, small_model


@torch.no_grad()
@pytest.mark.parametrize("prefill_lengths", [[], [1], [2], [17], [9, 8, 3], [23]])
@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "ME*-M*E"])
def test_prefill_then_steps_equal_the_full_forward(pattern, prefill_lengths):
    model = small_model(small_config(pattern))
    tokens_BT, _, _ = packed_batch(((23,), (23,)))
    full = model(tokens_BT, PackMeta.one_document_a_row(2, 23)).logits_BTV
    logits, _ = decode(model, tokens_BT, prefill_lengths)
    # float64 weights with a state that is handed on in float32 at least.
    torch.testing.assert_close(logits, full, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_decoding_in_bf16_stays_near_the_full_forward():
    model = small_model(small_config("M*-M"), dtype=torch.bfloat16)
    tokens_BT, _, _ = packed_batch(((23,), (23,)))
    full = model(tokens_BT, PackMeta.one_document_a_row(2, 23)).logits_BTV.float()
    logits, _ = decode(model, tokens_BT, [5])
    # bf16 keeps 8 bits; a few dozen roundings fall on other values when tokens come one by one.
    assert (logits.float() - full).norm() / full.norm() < 0.05


@torch.no_grad()
def test_mamba_state_does_not_grow():
    model = small_model(small_config("MM"))
    tokens_BT, _, _ = packed_batch(((23,),))
    _, state = decode(model, tokens_BT, [4])
    shapes = [tuple(part.shape for part in block) for block in state.blocks]
    assert shapes == [tuple(part.shape for part in block) for block in model.empty_state(1).blocks]


@torch.no_grad()
def test_a_state_is_not_changed_by_going_on_from_it():
    model = small_model(small_config("M*"))
    tokens_BT, _, _ = packed_batch(((9,),))
    _, state = decode(model, tokens_BT[:, :5], [5])
    meta = PackMeta.one_document_a_row(1, 1, start=5)
    first, _, again = (model(tokens_BT[:, t : t + 1], meta, state=state).logits_BTV for t in (5, 6, 5))
    assert torch.equal(first, again)


def test_rows_that_do_not_follow_the_state_are_refused():
    model = small_model(small_config("M"))
    tokens_BT, _, ids_BT = packed_batch()
    with pytest.raises(ValueError, match="one document per row"):
        model(tokens_BT, PackMeta.from_document_ids(ids_BT), state=model.empty_state(2))
    with pytest.raises(ValueError, match="has seen 0 tokens but the rows continue"):
        meta = PackMeta.one_document_a_row(2, 23, start=4)
        model(tokens_BT, meta, state=model.empty_state(2))
