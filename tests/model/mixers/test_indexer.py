"""Attention and latent attention to the keys that an indexer chooses, and the indexer's losses in both stages."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model.config.checks import check_model
from amfm.model.config.core_options import AttentionConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import block_flops, count_parameters
from amfm.model.packing import PackMeta
from amfm.model.state_size import count_bytes, state_bytes
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.run import set_indexer_stage
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.helpers.spawn import run_ranks
from tests.model.mixers.samples import sample_options
from tests.model.mixers.test_mixers import EXACT, SECTIONS, assert_spread, run_model, run_spread
from tests.model.small_models import ATTENTION, decode, meta_of, packed_batch, small_config, small_model

INDEXER: dict[str, Any] = {"num_heads": 5, "head_dim": 4, "top_k": 4, "loss_weight": 0.7}
FORMS = [(letter, stage) for letter in "*+" for stage in ("warm_up", "sparse")]
KINDS = {"*": "attention", "+": "mixers.mla"}


def config_of(letter: str, stage: str, blocks: int = 2, **changes: Any) -> ModelConfig:
    """A model of attention or latent attention with an indexer."""
    indexer = INDEXER | {"stage": stage} | changes
    return small_config(
        letter * blocks,
        attention=AttentionConfig.model_validate(ATTENTION.model_dump() | {"gate": "head", "indexer": indexer}),
        mixers={"mla": sample_options("mla") | {"indexer": indexer}},
    )


def of_indexer(name: str) -> bool:
    return ".indexer." in name


@pytest.mark.parametrize(("letter", "stage"), FORMS)
def test_blocks_of_queries_equal_the_definition_with_gradients(letter: str, stage: str) -> None:
    config = config_of(letter, stage)
    found, expected = run_model(small_model(config)), run_model(small_model(config, backend="reference"))
    for key, value in expected.items():
        assert_near(found[key], value, EXACT, key)


@pytest.mark.parametrize("letter", "*+")
def test_an_indexer_that_chooses_all_keys_changes_nothing(letter: str) -> None:
    tokens_BT, _, ids_BT = packed_batch(((7, 1, 13, 3), (24,)))
    sparse = small_model(config_of(letter, "sparse", top_k=24))
    dense = small_model(config_of(letter, "warm_up"))
    dense.load_state_dict(sparse.state_dict())
    with torch.no_grad():
        found, expected = (model(tokens_BT, meta_of(ids_BT)).logits_BTV for model in (sparse, dense))
        set_indexer_stage(dense, "sparse")
        fewer = dense(tokens_BT, meta_of(ids_BT)).logits_BTV
    assert_near(found, expected, EXACT)
    assert not torch.allclose(fewer[1, 5:], expected[1, 5:]), "of 24 keys, 4 are others"


@pytest.mark.parametrize(("letter", "stage"), FORMS)
def test_each_loss_moves_its_own_weights_alone(letter: str, stage: str) -> None:
    tokens_BT, labels_BT, ids_BT = packed_batch()
    model = small_model(config_of(letter, stage))
    output = model(tokens_BT, meta_of(ids_BT), labels_BT)
    output.auxiliary["indexer"].backward(retain_graph=True)
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and bool(weight.grad.any())}
    # A bias of all keys alike moves no softmax, but through relu it does; every weight of the indexer learns.
    assert moved == {name for name, _ in model.named_parameters() if of_indexer(name)}
    model.zero_grad()
    output.loss.total.backward()
    assert all((weight.grad is None) == of_indexer(name) for name, weight in model.named_parameters())


@pytest.mark.parametrize("letter", "*+")
def test_packed_documents_choose_as_if_apart(letter: str) -> None:
    lengths = (11, 1, 14, 3)
    model = small_model(config_of(letter, "sparse"))
    tokens_BT, _, ids_BT = packed_batch((lengths,))
    logits_BTV, start = model(tokens_BT, meta_of(ids_BT)).logits_BTV, 0
    for length in lengths:
        piece = slice(start, start + length)
        alone = model(tokens_BT[:, piece], PackMeta.one_document_a_row(1, length)).logits_BTV
        assert_near(logits_BTV[:, piece], alone, EXACT, f"document at {start}")
        start += length


@pytest.mark.parametrize(("letter", "stage"), FORMS)
def test_a_text_in_pieces_is_the_whole_text(letter: str, stage: str) -> None:
    config = config_of(letter, stage)
    model = small_model(config).eval()
    tokens_BT, _, _ = packed_batch(((31,), (31,)))
    with torch.no_grad():
        whole_BTV = model(tokens_BT, PackMeta.one_document_a_row(2, 31)).logits_BTV
        logits_BTV, state = decode(model, tokens_BT, (9, 1, 1, 2, 17, 1))
    assert_near(logits_BTV, whole_BTV, EXACT, "logits")
    assert count_bytes(state.blocks) == 4 * state_bytes(config, 31), "two rows in float64"
    plain = state_bytes(small_config(letter * 2, attention=ATTENTION, mixers={"mla": sample_options("mla")}), 31)
    keys = 2 * 31 * INDEXER["head_dim"] * 4 if stage == "sparse" else 0
    assert state_bytes(config, 31) == plain + keys


@pytest.mark.parametrize(("letter", "stage"), FORMS)
def test_weights_and_products_are_counted(letter: str, stage: str) -> None:
    config = config_of(letter, stage)
    model = small_model(config)
    assert count_parameters(config).total == sum(weight.numel() for weight in model.parameters())
    mixer = model.blocks[0].mixer
    matrices = sum(weight.numel() for weight in mixer.parameters() if weight.dim() > 1)
    assert block_flops(config, letter, 63) == 3 * (2 * matrices + mixer.sequence_flops(63))
    tokens = torch.arange(1, 64)
    read = (tokens if stage == "warm_up" else tokens.clamp(max=4)).double().mean().item()
    pair = {"*": 4 * 6 * 8, "+": 2 * 4 * (8 + 5) if stage == "warm_up" else 2 * 4 * (7 + 4 + 7)}[letter]
    scored = 32 if stage == "warm_up" else 32 / 3 + read
    assert mixer.sequence_flops(63) == pytest.approx(read * pair + scored * 5 * (2 * 4 + 2))


def test_no_choice_depends_on_a_later_token() -> None:
    model = small_model(config_of("*", "sparse")).train()
    tokens_BT, _, _ = packed_batch(((24,),))
    before = model(tokens_BT, PackMeta.one_document_a_row(1, 24)).logits_BTV
    tokens_BT[0, 11] = (tokens_BT[0, 11] + 1) % 40
    after = model(tokens_BT, PackMeta.one_document_a_row(1, 24)).logits_BTV
    assert_bitwise(after[:, :11], before[:, :11], "outputs before the changed token")


# Tensor ranks that cut tokens too do all that is done without, as in test_mixers.py: one form shows those.
LAYOUTS = [(*form, kind) for kind in SECTIONS for form in FORMS if kind != "tensor" or form == FORMS[-1]]
SLOW_LAYOUTS = [(*form, "tensor") for form in FORMS[:-1]]


def run_layouts(layouts: list[tuple[str, str, ParallelConfig]]) -> list[dict[str, Tensor]]:
    return [run_spread(config_of(letter, stage), section) for letter, stage, section in layouts]


@cache
def spread(is_slow: bool) -> dict[tuple[str, str, str], list[dict[str, Tensor]]]:
    """What each of two ranks found, by layout."""
    layouts = SLOW_LAYOUTS if is_slow else LAYOUTS
    ranks = run_ranks(run_layouts, [(*form, SECTIONS[kind]) for *form, kind in layouts], num_ranks=2)
    return {layout: list(results) for layout, results in zip(layouts, zip(*ranks))}


@pytest.mark.parametrize(
    ("letter", "stage", "kind"),
    [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in SLOW_LAYOUTS)],
)
def test_two_ranks_compute_what_one_does(letter: str, stage: str, kind: str) -> None:
    layout = letter, stage, kind
    assert_spread(config_of(letter, stage), kind, spread(layout in SLOW_LAYOUTS)[layout])


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ({"sinks": True, "indexer": INDEXER}, "chooses keys, and its sums have no sinks"),
        ({"indexer": INDEXER | {"head_dim": 6}}, "must rotate an even number of channels"),
        ({"positions": "none", "rope": {}, "indexer": INDEXER | {"rope_fraction": 1.0}}, "only read with positions"),
    ],
)
def test_what_an_indexer_cannot_do_is_refused_by_name(attention: dict[str, Any], words: str) -> None:
    section = AttentionConfig.model_validate(ATTENTION.model_dump() | attention)
    with pytest.raises(ValueError, match=rf"model\.attention\.indexer.*{words}"):
        check_model(small_config("*", attention=section))
