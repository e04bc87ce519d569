"""Attention residuals: the paper's equations block by block in float64, the plain model at first, decoding, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.launch.plan.activations import Storage, made_bytes
from amfm.launch.plan.measured import block_bytes
from amfm.model.config.checks import check_model
from amfm.model.config.schema import ModelConfig
from amfm.model.config.streams import AttentionResidualsConfig
from amfm.model.flops import count_parameters
from amfm.model.huggingface.own import own_fields
from amfm.model.huggingface.targets import explain_unfit
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.shapes import weight_shapes
from amfm.model.streams.attention_residuals import AttentionResiduals
from amfm.pretrain.export.vllm_plugin.vllm_amfm.served import unserved
from amfm.pretrain.foreign_states.megatron_blocks import check_fits
from tests.helpers.numbers import assert_near
from tests.model.small_models import decode, loss_of, meta_of, packed_batch, small_config, small_model

PATTERN = "M*E-M-*"
FLOAT64 = 1e-11  # of sums in another order


def config_of(blocks_per_source: int, pattern: str = PATTERN, **changes: Any) -> ModelConfig:
    return small_config(pattern, attention_residuals={"blocks_per_source": blocks_per_source}, **changes)


def trained_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> HybridModel:
    """A model whose queries and weights of keys are not those that it began with."""
    model = small_model(config, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".stream." in f".{name}":
                value += torch.randn(value.shape, generator=generator).to(value.dtype)
    return model


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


@pytest.mark.parametrize("blocks_per_source", [1, 3])
def test_a_new_model_is_the_plain_one(blocks_per_source: int) -> None:
    plain, model = (
        HybridModel(config, single_rank_groups(), seed=3).double()
        for config in (small_config(PATTERN), config_of(blocks_per_source))
    )
    tokens_BT, labels_BT, ids_BT = packed_batch()
    losses = [loss_of(each(tokens_BT, meta_of(ids_BT), labels_BT)) for each in (plain, model)]
    for loss in losses:
        loss.backward()
    assert_near(losses[1], losses[0], FLOAT64)
    gradients = {name: value.grad for name, value in model.named_parameters()}
    for name, value in plain.named_parameters():
        assert_near(gradients[name], value.grad, FLOAT64, name)
    assert float(gradients["final_stream.query"].norm()) > 1e-6, "queries learn from the first step on"


@pytest.mark.parametrize(
    ("pattern", "dtype", "wide"), [(PATTERN, torch.float32, False), ("-E---", torch.bfloat16, True)]
)
def test_recomputed_blocks_and_norms_keep_every_bit(pattern: str, dtype: torch.dtype, wide: bool) -> None:
    config = config_of(2, pattern, residual_in_fp32=wide)
    kept, again, remade = (trained_model(config, dtype) for _ in range(3))
    again.recompute_blocks("M*E-")
    for _, block in remade.all_blocks():
        block.keeps_norm = False
    tokens_BT, labels_BT, ids_BT = packed_batch()
    losses = [loss_of(each(tokens_BT, meta_of(ids_BT), labels_BT)) for each in (kept, again, remade)]
    for loss in losses:
        loss.backward()
    for other, loss in ((again, losses[1]), (remade, losses[2])):
        assert torch.equal(loss, losses[0])
        for (name, value), same in zip(kept.named_parameters(), other.parameters(), strict=True):
            assert (value.grad is None and same.grad is None) or torch.equal(value.grad, same.grad), name


@pytest.mark.parametrize("prefill_lengths", [(5,), (1, 4)])
def test_prefill_then_steps_equal_the_full_forward(prefill_lengths: tuple[int, ...]) -> None:
    model = trained_model(config_of(2)).eval()
    tokens_BT, _, _ = packed_batch()
    logits_BTV, _ = decode(model, tokens_BT, prefill_lengths)
    assert_near(logits_BTV, model(tokens_BT).logits_BTV, FLOAT64)


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


def test_counted_parameters_and_shapes_are_those_of_the_model() -> None:
    config = config_of(3, "M*E-/*", tie_embeddings=True)
    model = HybridModel(config, single_rank_groups(), device="meta")
    assert count_parameters(config).total == sum(value.numel() for value in model.parameters())
    assert count_parameters(config).total_by_kind["residual_stream"] == 5 * 2 * config.hidden_size
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert weight_shapes(config) == shapes


def test_mup_which_has_no_rule_for_queries_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.mup has no rule for the weights of model.attention_residuals; remove"):
        check_model(config_of(2, "M*", mup={"base_hidden_size": 12}))


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


@pytest.mark.parametrize("target", ["qwen3", "granitemoehybrid"])
def test_classes_whose_blocks_read_the_sum_do_not_hold_it(target: str) -> None:
    config = config_of(2, "*-*-")
    (found,) = (reason for reason in explain_unfit(config, target) if "attention_residuals" in reason)
    assert found == f"model.attention_residuals: blocks of {target} read the sum of all outputs; use target own"
    assert not explain_unfit(config, "own")
    assert any("attention_residuals" in reason for reason in unserved(own_fields(config)))
    with pytest.raises(ValueError, match=r"model\.attention_residuals"):
        check_fits(config, "the checkpoint")
