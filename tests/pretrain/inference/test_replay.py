"""A recorded token is the token that the model computes, and what cannot be repeated is not recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.kernels.runtime.native import refuse_native
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.inference.replay import OneText, Recorder, advance, find_form
from benchmarks.small_steps import load_small
from tests.helpers.numbers import assert_bitwise
from tests.pretrain.export.exported_models import MODELS, random_weights

PROMPT = [9, 200, 31, 77, 5]
FIT = ["model.mamba.state_size=16", "model.mamba.chunk_size=64", "model.moe.activation=squared_relu"]


def read_both(model: HybridModel, tokens: int) -> OneText:
    """Read a prompt and tokens with and without a record; all logits must be bitwise equal."""
    text, state = OneText(model), model.empty_state(1)
    ids = PROMPT
    for number in range(tokens):
        state, expected_V = advance(model, state, ids)
        assert_bitwise(text.read(ids), expected_V, f"token {number}")
        ids = [int(expected_V.argmax())]
    return text


@pytest.mark.parametrize("target", MODELS)
def test_recorded_tokens_are_those_of_the_model_to_the_bit(data: DataConfig, target: str) -> None:
    read_both(random_weights(data, MODELS[target]).build(), 12)


@pytest.mark.skipif(refuse_native(torch.device("cpu")) is not None, reason="no C compiler")
@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
def test_all_blocks_but_attention_are_recorded_where_their_code_is_c(activation: str) -> None:
    config = load_small([*FIT, f"model.moe.activation={activation}"], 1).model
    text = read_both(HybridModel(config, single_rank_groups(), backend="native", seed=0).eval(), 70)
    letters = "".join(block.letter for block in text.model.blocks)
    assert [text.recorded.get(index) is not None for index in range(len(letters))] == [
        letter != "*" for letter in letters
    ]


def test_two_texts_of_a_model_do_not_share_memory(data: DataConfig) -> None:
    model = random_weights(data, MODELS["nemotron_h"]).build()
    one, other, state = OneText(model), OneText(model), model.empty_state(1)
    for text, prompt in ((one, PROMPT), (other, PROMPT[::-1])):
        text.read(prompt)
    state, _ = advance(model, state, PROMPT)
    for token in (3, 8, 1, 4):
        other.read([token + 1])
        state, expected_V = advance(model, state, [token])
        assert_bitwise(one.read([token]), expected_V)


def test_a_model_that_someone_watches_is_not_recorded(data: DataConfig) -> None:
    model, seen = random_weights(data, MODELS["nemotron_h"]).build(), []
    model.blocks[0].mixer.register_forward_hook(lambda *given: seen.append(1))
    read_both(model, 4)
    assert len(seen) == 8


OUTSIDE = torch.ones(3)


@pytest.mark.parametrize(
    ("compute", "can_be_repeated"),
    [
        (lambda x: torch.relu(x + x).square_(), True),
        (lambda x: x.view(1, 3).expand(2, 3) @ x.new_full((3,), 2.0), True),
        (lambda x: x.new_zeros(3).add_(x), True),
        (lambda x: x + OUTSIDE, False),
        (lambda x: x * x.sum().item(), False),
        (lambda x: x * torch.rand(3), False),
        (lambda x: x.new_ones(3).add_(x), False),
        (lambda x: x.topk(2).values, False),
    ],
)
def test_what_is_recorded_gives_the_results_of_other_values(
    compute: Callable[[Tensor], Tensor], can_be_repeated: bool
) -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    with Recorder([x]) as recorder:
        result = compute(x)
    assert recorder.is_spoiled() != can_be_repeated
    if can_be_repeated:
        x.copy_(torch.tensor([-4.0, 5.0, 0.5]))
        for _ in range(2):
            for each in recorder.repeats:
                each()
        assert_bitwise(result, compute(x))


def test_the_form_that_writes_to_a_tensor_has_the_same_arguments() -> None:
    aten = torch.ops.aten
    assert find_form(aten.mm.default) is aten.mm.out and find_form(aten.add.Tensor) is aten.add.out
    assert find_form(aten.topk.default) is None and find_form(aten.item.default) is None
