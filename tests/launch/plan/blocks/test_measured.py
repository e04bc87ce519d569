"""Blocks without storage: what is counted there is what a real pass keeps, and ranks keep their part of it."""

from dataclasses import replace

import pytest
import torch

import amfm
from amfm.launch.plan.activations import Storage, up_rows
from amfm.launch.plan.blocks import measured
from amfm.launch.plan.blocks.measured import _block_bytes, block_bytes
from amfm.launch.plan.blocks.seen import id_of
from amfm.launch.plan.stand_ins import COUNTED_TOKENS, Cut
from amfm.model.block import Block
from amfm.model.config.kinds import registered_kinds
from amfm.model.config.mixer_options import HeadOptions
from amfm.model.mixers.base import LinearMixer, no_decay, query_key_value
from amfm.model.mixers.recurrence import DecayRecurrence, ScanRows
from amfm.model.packing import PackMeta
from tests.helpers.registered import nothing_stays_registered  # noqa: F401 a fixture
from tests.launch.plan.presets import preset
from tests.model.mixers.samples import mixer_config
from tests.model.small_models import small_config, small_model

# Several chunks and windows of the samples, which are smaller than those of a run.
TOKENS = 512
PLAIN, CARD = Storage(4, "torch"), Storage(2, "triton")


def kept_by(config):
    """Bytes per token that the first block of a real model keeps for backward: each storage once, without weights and input."""
    block: Block = small_model(config, dtype=torch.float32).blocks[0]
    residual_BTD, delta_BTD = (torch.randn(1, TOKENS, config.hidden_size, requires_grad=True) for _ in range(2))
    known = {id_of(tensor) for tensor in [residual_BTD, delta_BTD, *block.parameters(), *block.buffers()]}
    kept = {}

    def note(tensor):
        if id_of(tensor) not in known:
            kept[id_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        meta = PackMeta.one_document_a_row(1, TOKENS).with_tokens(torch.zeros(1, TOKENS, dtype=torch.int64))
        output = block(residual_BTD, delta_BTD, meta)
    assert output[1].y_BTD.requires_grad
    return sum(storage.nbytes() for storage in kept.values()) / TOKENS


# A decay, a scan by channels, attention with a window, latent attention; a delta rule takes seconds.
QUICK = ("retnet", "mamba1", "window", "mla")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in registered_kinds()]
)
def test_kept_bytes_of_a_registered_mixer_are_those_of_a_real_pass(name):
    config = mixer_config(name, blocks=1)
    symbol = registered_kinds()[name].symbol
    # PyTorch pads what its attention keeps of each query.
    assert block_bytes(config, symbol, PLAIN).kept == pytest.approx(kept_by(config), rel=0.03)


@pytest.mark.parametrize("letter", ["M", "*", "-"])
def test_kept_bytes_of_a_core_block_are_those_of_a_real_pass(letter):
    config = small_config(letter)
    assert block_bytes(config, letter, PLAIN).kept == pytest.approx(kept_by(config), rel=0.03)


@pytest.mark.parametrize(
    "name",
    [
        "gla",
        "window",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("retnet", "gated_deltanet", "kda", "mamba1", "mla")),
    ],
)
def test_what_triton_kernels_keep_is_counted_without_a_card_and_tensor_ranks_cut_it(name):
    config = mixer_config(name, blocks=1)
    symbol, options = registered_kinds()[name].symbol, getattr(config.mixers, name)
    chunks = {"chunk_size": 64} if hasattr(options, "chunk_size") else {}
    mixers = config.mixers.model_copy(update={name: options.model_copy(update=chunks)})
    config = config.model_copy(update={"mixers": mixers})
    own, cut = (block_bytes(config, symbol, CARD, Cut(tensor=ranks)) for ranks in (1, 2))
    assert 0 < own.kept != block_bytes(config, symbol, Storage(2, "torch")).kept
    assert own.working > 0
    assert own.kept / 2 <= cut.kept < own.kept


def test_a_group_that_tensor_ranks_share_is_on_each_of_them():
    config = preset("ladder_20m").model
    whole, half = (block_bytes(config, "M", CARD, Cut(tensor=ranks)) for ranks in (1, 2))
    stream = 256 * 2 * 2 + 4
    assert half.kept - stream > 0.5 * (whole.kept - stream) + 2 * 64 * 2
    wide = config.model_copy(update={"mamba": config.mamba.model_copy(update={"num_groups": 2})})
    whole, half = (block_bytes(wide, "M", CARD, Cut(tensor=ranks)) for ranks in (1, 2))
    assert half.kept - stream == pytest.approx(0.5 * (whole.kept - stream))


def test_experts_keep_the_rows_that_come_to_them():
    model = preset("nemotron3_nano_30b").model
    row, top_k = model.hidden_size * 2, model.moe.top_k
    alone = block_bytes(model, "E", CARD)
    by_rank = Cut(expert=8, sent=4.5)
    spread, uneven, shared = (
        block_bytes(model, "E", CARD, cut)
        for cut in (by_rank, replace(by_rank, rows=1.5), replace(by_rank, tensor=2, expert_tensor=2))
    )
    # Each row with weights and ids of its choices in float32, and where they are sorted to.
    assert spread.kept - alone.kept == pytest.approx(4.5 * (row + 20 * top_k), rel=0.05)
    assert uneven.kept - spread.kept > 0.5 * 4.5 * row
    # Ranks that share inner widths have the rows of both.
    lone = block_bytes(model, "E", CARD, replace(by_rank, tensor=2))
    assert shared.kept - lone.kept == pytest.approx(4.5 / 2 * (row + 20 * top_k), rel=0.05)


def test_slots_of_a_capacity_are_kept_filled_or_not():
    model = preset("ladder_8b_a1b").model
    limited = model.model_copy(update={"moe": model.moe.model_copy(update={"capacity_factor": 1.5})})
    even = model.model_copy(update={"moe": model.moe.model_copy(update={"capacity_factor": 1.0})})
    more, less = (block_bytes(each, "E", CARD, Cut(expert=8, in_slots=True)).kept for each in (limited, even))
    # Hidden rows, rows as they came, and results as they went back.
    numbers = up_rows(model.moe.expert_hidden_size, model.moe.activation) + 2 * model.hidden_size
    assert more - less == pytest.approx(0.5 * model.moe.top_k * 2 * numbers, rel=0.02)


def test_context_ranks_keep_the_keys_of_whole_rows_and_their_own_queries():
    model = preset("nemotron3_nano_30b").model
    attention = model.attention
    keys = 2 * 2 * attention.num_kv_heads * attention.head_dim
    two, eight = (block_bytes(model, "*", CARD, Cut(context=ranks)).kept for ranks in (2, 8))
    assert eight - two > 4 * keys


def test_a_pass_that_is_cut_leaves_what_weights_are_differentiated_by():
    config = small_config("-")
    section = config.feed_forward
    left = block_bytes(config, "-", Storage(2, "triton"), Cut(is_split=True)).left
    rows = section.hidden_size * (2 if section.activation == "swiglu" else 1)
    # What up and down read, and the gradients of what they gave.
    assert left == pytest.approx(2 * (2 * config.hidden_size + section.hidden_size + rows))
    assert block_bytes(config, "-", Storage(2, "triton")).left == 0.0


def test_measuring_leaves_torch_as_it_was():
    def settings():
        return (
            torch.distributed.is_initialized,
            torch.cuda.current_device,
            torch.get_num_threads,
            torch.get_default_dtype(),
        )

    before = settings()
    block_bytes(small_config("*"), "*", CARD, Cut(tensor=2))
    assert settings() == before


@pytest.mark.parametrize("letter", ["M", "E"])
def test_what_is_counted_does_not_depend_on_the_threads_of_the_process(letter):
    config, threads, found = preset("tiny_cpu").model, torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(_block_bytes.__wrapped__(config, letter, PLAIN, Cut(), COUNTED_TOKENS))
    torch.set_num_threads(threads)
    assert found[0] == found[1]


class LoopOptions(HeadOptions):
    """None of its own."""


class LoopMixer(LinearMixer):
    """Forgets in a loop over tokens, as a first try of an idea does."""

    recurrence = DecayRecurrence()

    def parts(self):
        return query_key_value(self.options)

    def rows(self, parts, meta):
        q, k, v = (self.heads(parts[name]) for name in ("q", "k", "v"))
        state, seen = torch.zeros_like(v[:, 0]), []
        for token in v.unbind(1):
            state = state * 0.5 + token.sigmoid()
            seen.append(state)
        return ScanRows(q, k, torch.stack(seen, 1), no_decay(q))

    def output(self, o_BTHV, parts):
        return o_BTHV.flatten(-2)


def test_a_loop_over_tokens_is_counted_on_short_rows_as_on_long_ones(monkeypatch, capsys):
    """What ends the first pass is a number of operations, so that no loop takes long; ours are far below it."""
    amfm.register(amfm.Kind("loop", LoopMixer, LoopOptions))
    config = small_config("{loop}", mixers={"loop": {"num_heads": 2, "head_dim": 8}})
    whole = measured._measure(config, "{loop}", torch.float32, "torch", Cut(), tokens=384)
    monkeypatch.setattr(measured, "MOST_OPERATIONS", 1000)
    _block_bytes.cache_clear()
    found = block_bytes(config, "{loop}", PLAIN, tokens=384)
    _block_bytes.cache_clear()
    assert found.kept == pytest.approx(whole.kept, rel=0.01)
    assert found.launches == pytest.approx(whole.launches, rel=0.02)
    assert capsys.readouterr().err.count("block {loop} launches operations token by token") == 1
