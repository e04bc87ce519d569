"""Attention residuals: the paper's equations block by block in float64, the plain model at first, decoding, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.launch.plan.activations import Storage, made_bytes
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.model.config.schema import ModelConfig
from amfm.model.config.streams import AttentionResidualsConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.streams.attention_residuals import AttentionResiduals
from tests.helpers.numbers import assert_near
from tests.model.small_models import meta_of, packed_batch, small_config
from tests.model.streams.trained import trained_model

PATTERN = "M*E-M-*"
FLOAT64 = 1e-11  # of sums in another order


def config_of(blocks_per_source: int, pattern: str = PATTERN, **changes: Any) -> ModelConfig:
    return small_config(pattern, attention_residuals={"blocks_per_source": blocks_per_source}, **changes)


def read(query_D: Tensor, weight_D: Tensor, sources: list[Tensor], epsilon: float) -> Tensor:
    """Equations 2 to 4 of the paper, times the number of sources."""
    values = torch.stack(sources)
    keys = weight_D * values / (values.square().mean(-1, keepdim=True) + epsilon).sqrt()
    shares = torch.softmax((keys * query_D).sum(-1), dim=0)
    return len(sources) * (shares[..., None] * values).sum(0)


def reference_logits(model: HybridModel, tokens_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """Equations 5 and 6: every block with all outputs before it in a list, group by group."""
    config = model.config
    assert config.attention_residuals is not None and model.embedding is not None and model.final_norm is not None
    size, epsilon = config.attention_residuals.blocks_per_source, config.norm_epsilon
    embedded_BTD = model.embedding(tokens_BT) * config.multipliers.embedding
    outputs: list[Tensor] = []

    def sources() -> list[Tensor]:
        groups = [outputs[start : start + size] for start in range(0, len(outputs), size)]
        return [embedded_BTD, *(torch.stack(group).sum(0) for group in groups)]

    for block in model.blocks:
        assert block.stream is not None
        read_BTD = read(block.stream.query, block.stream.weight, sources(), epsilon)
        normed_BTD = read_BTD if block.norm_after else block.norm(read_BTD)
        y_BTD = block.mixer(normed_BTD, meta_of(ids_BT), None).y_BTD
        last = block.norm if block.norm_after else block.out_norm
        outputs.append((y_BTD if last is None else last(y_BTD)) * config.multipliers.residual)
    assert model.final_stream is not None
    final_BTD = read(model.final_stream.query, model.final_stream.weight, sources(), epsilon)
    return model.final_norm(final_BTD) @ model.head_weight().T


@pytest.mark.parametrize("blocks_per_source", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("changes", [{}, {"norm_placement": "after"}, {"norm_placement": "both"}])
def test_logits_and_gradients_are_those_of_the_equations(blocks_per_source: int, changes: dict[str, Any]) -> None:
    config = config_of(blocks_per_source, multipliers={"embedding": 2.0, "residual": 0.7}, **changes)
    model = trained_model(config).eval()
    tokens_BT, _, ids_BT = packed_batch()
    logits_BTV = model(tokens_BT, meta_of(ids_BT)).logits_BTV
    pull_BTV = torch.randn(logits_BTV.shape, dtype=torch.float64)
    expected_BTV = reference_logits(model, tokens_BT, ids_BT)
    assert_near(logits_BTV, expected_BTV, FLOAT64)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad((logits_BTV * pull_BTV).sum(), list(parameters.values()), allow_unused=True)
    expected = torch.autograd.grad((expected_BTV * pull_BTV).sum(), list(parameters.values()), allow_unused=True)
    for name, gradient, other in zip(parameters, found, expected, strict=True):
        assert (gradient is None) == (other is None), name
        if gradient is not None and name != "blocks.0.stream.query" and name != "blocks.0.stream.weight":
            assert_near(gradient, other, FLOAT64, name)
    # The first block has one source, whatever its query is.
    assert float(parameters["blocks.0.stream.query"].abs().max()) > 0
    assert float(found[list(parameters).index("blocks.0.stream.query")].abs().max()) < FLOAT64


def test_in_bf16_the_mixture_is_that_of_float32_rounded() -> None:
    config = config_of(2)
    reader = AttentionResiduals(AttentionResidualsConfig(blocks_per_source=2), 3, config, single_rank_groups())
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in ((12,), (12,), (2, 5, 3, 12), (2, 5, 12))]
    reader.query, reader.weight = (torch.nn.Parameter(value) for value in values[:2])
    mixed = reader.bfloat16()(values[2], values[3])
    sources = [*values[2].double().unbind(2), values[3].double()]
    expected = read(values[0].double(), values[1].double(), sources, config.norm_epsilon)
    assert mixed.dtype == torch.bfloat16
    assert_near(mixed.double(), expected, 2**-8)  # one rounding


def test_a_plan_counts_what_a_stage_sends_and_what_groups_copy() -> None:
    section = AttentionResidualsConfig(blocks_per_source=3)
    # After block 2 the embedding and one whole sum; block 3 begins the next one.
    assert [section.num_tensors(number) for number in range(8)] == [1, 2, 2, 2, 3, 3, 3, 4]
    assert [section.num_kept([0, index]) for index in range(1, 8)] == [0, 0, 2, 0, 0, 3, 0]
    config = config_of(3, "M*E-M-*")
    stream = config.hidden_size * 4
    # A piece of blocks 2 to 6 receives 2 tensors; blocks 3 and 6 make 2 and 3.
    assert made_bytes(config, Storage(4, "torch"), 1, range(2, 7)) == (2 + 2 + 3) * stream
    assert made_bytes(small_config(), Storage(4, "torch"), 1, range(2, 4)) == 0


def test_what_a_block_keeps_is_measured_with_all_sources() -> None:
    few, many = (block_bytes(config_of(size, "-" * 16), "-", Storage(4, "torch")) for size in (16, 2))
    plain = block_bytes(small_config("-" * 16), "-", Storage(4, "torch"))
    # Of each source three numbers per token, next to the mixture.
    assert many.kept - few.kept == pytest.approx((9 - 2) * 3 * 4)
    assert plain.kept < few.kept < plain.kept + 3 * 12 * 4 and few.working < many.working
