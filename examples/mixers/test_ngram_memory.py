"""N-gram memory: the paper's equations token by token, the plain model at first, texts one by one, and a resumed run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from amfm_mixers.ngram_memory import multiplier
from amfm_mixers.options import NgramMemoryOptions
from amfm_serve.rows import TextRows
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters, flops_per_token
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.inference.replay import OneText, advance
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.model.small_models import loss_of, meta_of, packed_batch, small_config, small_model
from tests.pretrain.tiny_run import MODEL, assert_resumes_bitwise, tiny_data

FLOAT64 = 1e-11  # the same sums in another order
FLOAT32 = 1e-5  # of products of other shapes
SIZES: dict[str, Any] = {"num_heads": 2, "head_dim": 3, "table_size": 20}


def config_of(pattern: str = "M{ngram_memory}*-", **changes: Any) -> ModelConfig:
    return small_config(pattern, mixers={"ngram_memory": SIZES | changes})


def reference(mixer: Any, x_BTD: Tensor, tokens_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """Equations of section 2 of the paper, a token and a table at a time."""
    options: NgramMemoryOptions = mixer.options
    epsilon, width = mixer.key_norm.epsilon, x_BTD.shape[-1]

    def norm(x_D: Tensor, weight_D: Tensor) -> Tensor:
        return x_D / (x_D.square().mean() + epsilon).sqrt() * weight_D

    rows = []
    for x_TD, tokens, ids in zip(x_BTD, tokens_BT.tolist(), ids_BT.tolist(), strict=True):
        values: list[Tensor] = []
        outputs = []
        for t in range(len(tokens)):

            def seen(back: int, t: int = t, ids: list[int] = ids) -> bool:
                return t >= back and ids[t - back] == ids[t]

            found, start, number = [], 0, 0
            for n in range(2, options.max_n + 1):
                mixed = 0
                for back in range(n):
                    mixed ^= (tokens[t - back] + 1) * multiplier(back) if seen(back) else 0
                for _ in range(options.num_heads):
                    size = options.table_sizes()[number]
                    found.append(mixer.tables[start + mixed % size])
                    start, number = start + size, number + 1
            e = torch.cat(found)
            score = (x_TD[t] @ norm(mixer.key_proj.weight @ e, mixer.key_norm.weight)) / math.sqrt(width)
            gate = torch.sigmoid(score.sign() * score.abs().sqrt())
            values.append(gate * (mixer.value_proj.weight @ e))
            total = torch.zeros(width, dtype=x_BTD.dtype)
            for tap in range(options.conv_kernel):
                back = tap * options.max_n
                if seen(back):
                    total = total + mixer.conv_weight[:, -1 - tap] * norm(values[t - back], mixer.value_norm.weight)
            outputs.append(values[t] + total * torch.sigmoid(total))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("documents", "changes"),
    [(((7, 1, 12, 3), (23,)), {}), (((1,),), {}), (((63,),), {"max_n": 4, "conv_kernel": 2, "num_heads": 3})],
)
def test_outputs_and_gradients_are_those_of_the_equations(documents: Any, changes: dict[str, Any]) -> None:
    mixer: Any = small_model(config_of(**changes)).blocks[1].mixer
    tokens_BT, _, ids_BT = packed_batch(documents)
    generator = torch.Generator().manual_seed(2)
    x_BTD, pull_BTD = torch.randn(2, *tokens_BT.shape, 12, dtype=torch.float64, generator=generator)
    x_BTD.requires_grad_()
    leaves = [x_BTD, *mixer.parameters()]
    actual_BTD = mixer(x_BTD, meta_of(ids_BT).with_tokens(tokens_BT)).y_BTD
    expected_BTD = reference(mixer, x_BTD, tokens_BT, ids_BT)
    assert_near(actual_BTD, expected_BTD, FLOAT64, "outputs")
    actual = torch.autograd.grad((actual_BTD * pull_BTD).sum(), leaves)
    expected = torch.autograd.grad((expected_BTD * pull_BTD).sum(), leaves)
    for gradient, other in zip(actual, expected, strict=True):
        assert_near(gradient, other, FLOAT64, "gradient")


def test_a_new_model_is_the_one_without_memories_and_learns_them() -> None:
    model, plain = (
        # Deviations by depth would differ: the model has a block more.
        HybridModel(config.model_copy(update={"depth_scaled_init": False}), single_rank_groups(), seed=3).double()
        for config in (config_of("M*-{ngram_memory}"), config_of("M*-"))
    )
    tokens_BT, labels_BT, ids_BT = packed_batch()
    losses = [loss_of(each(tokens_BT, meta_of(ids_BT), labels_BT)) for each in (model, plain)]
    assert_bitwise(losses[0].detach(), losses[1].detach(), "loss")
    losses[0].backward()
    assert float(model.blocks[3].mixer.value_proj.weight.grad.abs().max()) > 0


def test_tables_count_as_parameters_and_not_as_products() -> None:
    small, large = (config_of(table_size=size) for size in (20, 2000))
    assert flops_per_token(small, 16) == flops_per_token(large, 16)
    counts = [count_parameters(config) for config in (small, large)]
    assert counts[0].active == counts[1].active and counts[1].total - counts[0].total > 4 * 1900 * 3


@torch.inference_mode()
def test_texts_one_by_one_and_together_read_on_as_the_whole() -> None:
    model = small_model(config_of(), dtype=torch.float32).eval()
    tokens_BT, _, _ = packed_batch(((17,), (17,)))
    whole_BTV = model(tokens_BT).logits_BTV
    text, states = OneText(model), []
    for number, (row, length) in enumerate(zip(tokens_BT.tolist(), (9, 6))):
        states.append(advance(model, model.empty_state(1), row[:length])[0])
        if number == 0:
            found = [text.read(row[:9]), *(text.read([token]) for token in row[9:])]
            assert_near(torch.stack(found), whole_BTV[0, 8:], FLOAT32, "one text")
    together = {0: int(tokens_BT[0, 9]), 1: int(tokens_BT[1, 6])}
    rows = TextRows(model)
    for text_number, state in enumerate(states):
        rows.join(text_number, state)
    after = rows.read(together)
    for text_number, expected_V in enumerate((whole_BTV[0, 9], whole_BTV[1, 6])):
        assert_near(after[text_number], expected_V, FLOAT32, "texts together")


def test_a_layout_without_tokens_is_rejected_and_ranks_that_do_not_divide_columns() -> None:
    mixer = small_model(config_of()).blocks[1].mixer
    with pytest.raises(ValueError, match="this layout has none"):
        mixer(torch.zeros(1, 3, 12, dtype=torch.float64), meta_of(torch.zeros(1, 3, dtype=torch.int64)))
    options = NgramMemoryOptions(**SIZES)
    assert options.cut_evenly() == {"tensor": {"head_dim": 3}}


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(tmp_path: Path) -> None:
    data: DataConfig = tiny_data(tmp_path / "data")
    pattern = MODEL["pattern"] + "{ngram_memory}"
    settings = {"model__pattern": pattern, "model__mixers": {"ngram_memory": SIZES}, "train__recompute": "full"}
    assert_resumes_bitwise(data, tmp_path, **settings)
