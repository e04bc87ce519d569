"""Mixers side by side in one block: the sum of both, with the states and the ranks of each."""

from __future__ import annotations

import torch

from amfm.model.flops import count_parameters, flops_per_token
from amfm.model.packing import PackMeta
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.model.small_models import meta_of, packed_batch, small_config, small_model

EXACT = 1e-10


def test_the_block_adds_both_mixers_of_one_norm_to_the_bit() -> None:
    model = small_model(small_config("(M&*)")).eval()
    tokens_BT, _, ids_BT = packed_batch()
    meta, block = meta_of(ids_BT), model.blocks[0]
    stream_BTD = model.embedding(tokens_BT)
    normed_BTD = block.norm(stream_BTD)
    mamba, attention = block.mixer.branches
    wanted_BTD = mamba(normed_BTD, meta).y_BTD + attention(normed_BTD, meta).y_BTD
    assert_bitwise(block.mixer(normed_BTD, meta).y_BTD, wanted_BTD, "both")
    with torch.no_grad():
        attention.o_proj.weight.zero_()
    assert_bitwise(block.mixer(normed_BTD, meta).y_BTD, mamba(normed_BTD, meta).y_BTD, "Mamba2 alone")


def test_a_text_in_pieces_is_the_whole_text() -> None:
    model = small_model(
        small_config("(M&*)-(*&W)", mixers={"window": {"num_heads": 2, "window": 4, "head_dim": 6}})
    ).eval()
    tokens_BT, _, _ = packed_batch(((19,), (19,)))
    whole_BTV = model(tokens_BT, PackMeta.one_document_a_row(2, 19)).logits_BTV
    state, logits = model.empty_state(2), []
    for piece_BT in tokens_BT.split([6, 1, 12], dim=1):
        meta = PackMeta.one_document_a_row(2, piece_BT.shape[1], start=state.length)
        output = model(piece_BT, meta, state=state)
        state = output.state
        logits.append(output.logits_BTV)
    assert_near(torch.cat(logits, dim=1), whole_BTV, EXACT, "logits")


def test_the_block_costs_what_both_cost_less_a_norm() -> None:
    both, apart = small_config("(M&*)"), small_config("M*")
    norm = both.hidden_size
    assert count_parameters(both).total == count_parameters(apart).total - norm
    assert sum(flops_per_token(both, 64).values()) == sum(flops_per_token(apart, 64).values())
    assert count_parameters(both).total == sum(p.numel() for p in small_model(both).parameters())
