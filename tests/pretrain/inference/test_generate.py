"""Text comes out token by token as the full forward pass would choose it, streamed in whole characters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.packing import PackMeta
from amfm.pretrain.inference.generate import Sampling, choose_token, generate, generate_tokens, stream_text
from amfm.pretrain.inference.weights import read_weights
from tests.pretrain.export.exported_models import MODELS, random_weights, weights_folder

PROMPT = [9, 200, 31, 77, 5]


@pytest.mark.parametrize("target", MODELS)
def test_greedy_tokens_equal_the_full_forward_pass(data: DataConfig, target: str) -> None:
    weights = random_weights(data, MODELS[target])
    model = weights.build()
    tokens = list(generate_tokens(model, PROMPT, 20, Sampling(temperature=0)))
    ids_BT = torch.tensor([PROMPT + tokens])
    with torch.no_grad():
        logits_BTV = model(ids_BT, PackMeta.one_document_a_row(1, ids_BT.shape[1])).logits_BTV
    assert logits_BTV[0, len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    assert len(set(tokens)) > 3, "a constant continuation would show little"


def test_state_of_mamba2_blocks_does_not_grow(data: DataConfig) -> None:
    model = random_weights(data, {**MODELS["nemotron_h"], "pattern": "MEM-"}).build()
    state = model.empty_state(1)
    sizes = []
    for number in range(3):
        meta = PackMeta.one_document_a_row(1, 5, start=state.length)
        state = model(torch.full((1, 5), 7 + number), meta, state=state).state
        sizes.append([part.numel() for block in state.blocks if block is not None for part in block])
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_seed_fixes_the_text_and_other_seeds_change_it(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "nemotron_h")

    def sample(seed: int) -> str:
        return "".join(generate(folder, "a word", max_new_tokens=20, sampling=Sampling(seed=seed)))

    assert sample(1) == sample(1) != sample(2)


def test_top_k_and_top_p_keep_only_the_most_likely() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]
    generator = torch.Generator().manual_seed(0)

    def seen(**settings) -> set[int]:
        return {choose_token(logits_V, Sampling(**settings), generator) for _ in range(300)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {1, 3}
    assert seen(top_k=9) == {0, 1, 2, 3}
    assert seen(top_p=0.5) == {1}
    assert seen(top_p=0.6) == {1, 3}
    assert seen(top_p=1e-9) == {1}
    assert seen(top_k=3, top_p=0.99) == {0, 1, 3}
    assert seen(temperature=0) == seen(temperature=1e-4) == {1}


def test_generation_ends_at_end_of_text_and_never_leaves_the_vocabulary(data: DataConfig) -> None:
    weights = random_weights(data, MODELS["nemotron_h"])
    model = weights.build()
    tokens = list(generate_tokens(model, PROMPT, 30, Sampling(temperature=0)))
    stopped = list(generate_tokens(model, PROMPT, 30, Sampling(temperature=0), eos_id=tokens[4]))
    assert stopped == tokens[: tokens.index(tokens[4])]
    small = list(generate_tokens(model, PROMPT, 60, Sampling(temperature=3.0), vocab_size=20))
    assert len(small) == 60 and max(small) < 20


def test_characters_of_several_bytes_are_streamed_whole(data: DataConfig) -> None:
    tokenizer = random_weights(data, MODELS["nemotron_h"]).tokenizer
    text = " caf\u00e9 \u6f22\u5b57 \U0001f600  end"
    ids = tokenizer.encode(text)
    pieces = list(stream_text(tokenizer, tokenizer.encode("before"), iter(ids)))
    assert "".join(pieces) == text
    assert "\U0001f600" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    broken = list(stream_text(tokenizer, [5], iter([*ids[:2], tokenizer.encode("\u6f22")[0]])))
    assert "".join(broken).endswith("\ufffd"), "bytes that never become a character are shown as such at the end"


def test_impossible_settings_and_prompts_are_refused(data: DataConfig, tmp_path: Path) -> None:
    folder = weights_folder(data, tmp_path / "weights", "nemotron_h")
    for settings, message in [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("inf")}, "temperature=inf must be at least 0 and finite"),
        ({"seed": 2**63}, "seed=9223372036854775808 must fit into 64 bits"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(folder, "a", sampling=Sampling(**settings))
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate(folder, "")
    with pytest.raises(ValueError, match=r"the prompt 'caf\\udce9' must be Unicode"):
        generate(folder, "caf\udce9")  # as Python reads an argument that is not UTF-8
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(folder, "a", max_new_tokens=0)
    assert read_weights(folder).run is None
