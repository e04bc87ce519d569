"""Middles move to the end of pieces after the order of samples is fixed: same rows, documents and order, and it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amfm.data_pipeline.config import DataConfig, FimConfig
from amfm.data_pipeline.loader.loader import PretrainLoader
from amfm.data_pipeline.samples.fim import ADDED, SMALLEST, FimSettings, fill_in_middle
from amfm.data_pipeline.samples.packing import Row
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.data_pipeline.verify import sample_text
from tests.helpers.tiny_store import make_tiny_store

END, PREFIX, SUFFIX, MIDDLE = 1, 2, 3, 4
TOKENS = ("<pre>", "<suf>", "<mid>")


def cut(
    tokens: list[int],
    starts: list[int],
    rate: float = 1.0,
    kind: Any = "psm",
    key: bytes = b"k",
    valid: int | None = None,
) -> list[list[int]]:
    row = Row(np.array(tokens, np.uint16), np.array(starts, np.int32), valid or len(tokens), 0, 0)
    found = fill_in_middle(row, FimSettings(rate, kind, TOKENS), (PREFIX, SUFFIX, MIDDLE), END, key)
    assert row.tokens.tolist() == tokens, "a row of the store is not written to"
    assert (found.starts is row.starts) and found.num_valid == row.num_valid
    return [piece.tolist() for piece in np.split(found.tokens, starts[1:])]


def undo(piece: list[int], kind: str) -> list[int]:
    """The text of a piece in order."""
    assert piece[0] == PREFIX and piece[-1] == END
    suffix_at, middle_at = piece.index(SUFFIX), piece.index(MIDDLE)
    suffix, rest = piece[suffix_at + 1 : middle_at], piece[middle_at + 1 : -1]
    if kind == "psm":
        return piece[1:suffix_at] + rest + suffix
    assert suffix_at == 1
    return rest + suffix


@pytest.mark.parametrize("kind", ["psm", "spm"])
def test_a_piece_keeps_its_length_and_its_text_up_to_the_last_tokens(kind: str) -> None:
    whole, part = [*range(100, 120), END], list(range(200, 230))
    cuts = set()
    for number in range(50):
        pieces = cut(whole + part, [0, len(whole)], kind=kind, key=bytes([number]))
        assert [len(piece) for piece in pieces] == [len(whole), len(part)]
        assert undo(pieces[0], kind) == whole[:-ADDED] and undo(pieces[1], kind) == part[:-ADDED]
        cuts.add((pieces[0].index(SUFFIX), pieces[0].index(MIDDLE)))
    assert len(cuts) > 10, "the places are drawn"


def test_short_pieces_and_padding_stay(tmp_path: Path) -> None:
    short, long, padding = list(range(50, 50 + SMALLEST - 1)), list(range(100, 130)), [9] * 5
    row = [*short, *long, *padding]
    pieces = cut(row, [0, len(short)], valid=len(short) + len(long))
    assert pieces[0] == short and pieces[1][len(long) :] == padding and pieces[1][0] == PREFIX


def test_as_many_pieces_are_cut_as_the_rate_says() -> None:
    pieces = [list(range(100, 120)) for _ in range(400)]
    row, starts = [token for piece in pieces for token in piece], list(range(0, 8000, 20))
    changed = sum(piece[0] == PREFIX for piece in cut(row, starts, rate=0.3))
    assert 90 <= changed <= 150


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("fim")
    plain = make_tiny_store(folder, num_sources=2, tokenizer={"vocab_size": 400, "control_tokens": TOKENS})
    first, second = plain.sources
    cut_source = second.model_copy(update={"fim": FimConfig(rate=0.7, kind="spm", tokens=TOKENS)})
    return plain.model_copy(update={"sources": (first, cut_source)})


def load(config: DataConfig, **changes: Any) -> PretrainLoader:
    return PretrainLoader(config, **({"sequence_length": 64, "micro_batch_size": 4, "seed": 5} | changes))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_order_documents_and_other_sources_stay(data: DataConfig, packing: str) -> None:
    data = data.model_copy(update={"packing": packing})
    plain = data.model_copy(update={"sources": tuple(each.model_copy(update={"fim": None}) for each in data.sources)})
    here, there = load(data), load(plain)
    middle = load_tokenizer(data.text_store()).find_token("<mid>")  # type: ignore[attr-defined]
    changed = 0
    for one, other in zip(here.take(32), there.take(32)):
        assert one.sample_ids == other.sample_ids and one.source_ids == other.source_ids
        assert (one.cu_seqlens == other.cu_seqlens).all() and (one.loss_mask_BT == other.loss_mask_BT).all()
        for row, source in enumerate(one.source_ids):
            has_middle = bool((one.tokens_BT[row] == middle).any())
            assert not (has_middle and source == 0)
            changed += has_middle
            assert has_middle or source or (one.tokens_BT[row] == other.tokens_BT[row]).all()
            counted = one.loss_mask_BT[row]
            assert (one.labels_BT[row][:-1][counted[:-1]] == one.tokens_BT[row][1:][counted[:-1]]).all()
    assert changed > 5


def test_it_resumes_to_the_bit_and_for_any_number_of_ranks(data: DataConfig) -> None:
    whole = load(data)
    rows = {}
    for _ in range(3):
        for batch in whole.take(16):
            rows |= {sample: batch.tokens_BT[number].tolist() for number, sample in enumerate(batch.sample_ids)}
        state = whole.state_dict()
    whole = load(data)
    whole.take(16)
    state = whole.state_dict()
    for rank in range(2):
        resumed = load(data, data_rank=rank, data_world_size=2, micro_batch_size=2)
        resumed.load_state_dict(state)
        for batch in [*resumed.take(16), *resumed.take(16)]:
            assert [rows[sample] for sample in batch.sample_ids] == batch.tokens_BT.tolist()


def test_another_cut_is_refused_on_resume(data: DataConfig) -> None:
    state = load(data).state_dict() | {"global_sample": 16}
    other = data.sources[1].model_copy(update={"fim": FimConfig(rate=0.5, tokens=TOKENS)})
    with pytest.raises(ValueError, match=r"was made with fim \[0.7, 'spm', .*this run has \[0.5, 'psm'"):
        load(data.model_copy(update={"sources": (data.sources[0], other)})).load_state_dict(state)
    none = data.model_copy(update={"sources": tuple(each.model_copy(update={"fim": None}) for each in data.sources)})
    with pytest.raises(ValueError, match="this run has None"):
        load(none).load_state_dict(state)


def test_validation_is_not_cut_and_missing_tokens_are_named(data: DataConfig) -> None:
    middle = load_tokenizer(data.text_store()).find_token("<mid>")  # type: ignore[attr-defined]
    assert not any((batch.tokens_BT == middle).any() for batch in load(data, split="validation").take(16))
    other = data.sources[1].model_copy(update={"fim": FimConfig(rate=0.5)})
    with pytest.raises(
        ValueError, match=r"fim of source 'source1': the store's tokenizer has no token '<\|fim_prefix\|>'"
    ):
        load(data.model_copy(update={"sources": (data.sources[0], other)}))


def test_a_sample_shows_its_cuts(data: DataConfig) -> None:
    config = data.model_copy(update={"sources": data.sources[1:]})
    shown = [sample_text(config, sample, sequence_length=64, seed=5) for sample in range(4)]
    texts = ["".join(text for runs in each.pieces for text, _ in runs) for each in shown]
    assert any("<pre><suf>" in text and "<mid>" in text for text in texts)
