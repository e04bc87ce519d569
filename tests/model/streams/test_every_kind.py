"""What holds for every kind of residual stream: a new model is the plain one, recomputation keeps bits, decoding, shapes, rejections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from amfm_foreign_states.megatron.blocks import check_fits

from amfm.launch.plan.stand_ins import default_dtype
from amfm.model.config.checks import check_model
from amfm.model.config.schema import ModelConfig
from amfm.model.config.streams import STREAMS
from amfm.model.flops import count_parameters
from amfm.model.huggingface.classes import explain_unfit
from amfm.model.huggingface.own import own_fields
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.shapes import weight_shapes
from amfm.pretrain.export.vllm_plugin.vllm_amfm.served import unserved
from tests.helpers.numbers import assert_near
from tests.model.small_models import decode, loss_of, meta_of, packed_batch, small_config
from tests.model.streams.trained import trained_model

PATTERN = "M*E-M-*"
FLOAT64 = 1e-11  # of sums in another order
KINDS: list[dict[str, Any]] = [
    {"attention_residuals": {"blocks_per_source": 1}},
    {"attention_residuals": {"blocks_per_source": 3}},
    {"hyper_connections": {"streams": 2}},
    {"hyper_connections": {"streams": 4}},
]
ONE_OF_EACH = [KINDS[1], KINDS[2]]


def config_of(kind: dict[str, Any], pattern: str = PATTERN, **changes: Any) -> ModelConfig:
    return small_config(pattern, **kind, **changes)


def test_each_kind_is_tried() -> None:
    assert {name for kind in ONE_OF_EACH for name in kind} == set(STREAMS)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_new_model_is_the_plain_one_and_learns_to_differ(kind: dict[str, Any]) -> None:
    with default_dtype(torch.float64):
        plain, model = (
            HybridModel(config, single_rank_groups(), seed=3) for config in (small_config(PATTERN), config_of(kind))
        )
    tokens_BT, labels_BT, ids_BT = packed_batch()
    losses = [loss_of(each(tokens_BT, meta_of(ids_BT), labels_BT)) for each in (plain, model)]
    for loss in losses:
        loss.backward()
    assert_near(losses[1], losses[0], FLOAT64)
    gradients = {name: value.grad for name, value in model.named_parameters()}
    for name, value in plain.named_parameters():
        assert_near(gradients[name], value.grad, FLOAT64, name)
    (own,) = (name for name in gradients if name.endswith(("final_stream.query", "blocks.2.stream.maps.weight")))
    assert float(gradients[own].norm()) > 1e-6, "it learns from the first step on"
    if "hyper_connections" in kind:
        streams = kind["hyper_connections"]["streams"]
        written_N = gradients["blocks.2.stream.maps.bias"][streams : 2 * streams]
        assert float((written_N - written_N.mean()).abs().max()) > 1e-3 * float(written_N.abs().max()) > 0


@pytest.mark.parametrize(
    ("pattern", "dtype", "wide"), [(PATTERN, torch.float32, False), ("-E---", torch.bfloat16, True)]
)
@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_recomputed_blocks_and_norms_keep_every_bit(
    kind: dict[str, Any], pattern: str, dtype: torch.dtype, wide: bool
) -> None:
    config = config_of(kind, pattern, residual_in_fp32=wide)
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
@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_prefill_then_steps_equal_the_full_forward(kind: dict[str, Any], prefill_lengths: tuple[int, ...]) -> None:
    model = trained_model(config_of(kind)).eval()
    tokens_BT, _, _ = packed_batch()
    logits_BTV, _ = decode(model, tokens_BT, prefill_lengths)
    assert_near(logits_BTV, model(tokens_BT).logits_BTV, FLOAT64)


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_counted_parameters_and_shapes_are_those_of_the_model(kind: dict[str, Any]) -> None:
    config = config_of(kind, "M*E-/*", tie_embeddings=True)
    model = HybridModel(config, single_rank_groups(), device="meta")
    weights = dict(model.named_parameters())
    counts = count_parameters(config)
    assert counts.total == sum(value.numel() for value in weights.values())
    own = sum(value.numel() for name, value in weights.items() if "stream." in name)
    assert counts.total_by_kind["residual_stream"] == own > 0
    assert weight_shapes(config) == {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_settings_and_programs_that_know_only_the_sum_reject_it_by_name(kind: dict[str, Any]) -> None:
    (name,) = kind
    with pytest.raises(ValueError, match=rf"model.mup has no rule for the weights of model.{name}; remove"):
        check_model(config_of(kind, "M*", mup={"base_hidden_size": 12}))
    config = config_of(kind, "*-*-")
    for target in ("qwen3", "granitemoehybrid"):
        (found,) = (reason for reason in explain_unfit(config, target) if name in reason)
        assert found == f"model.{name}: blocks of {target} read the sum of all outputs; use target own"
    assert not explain_unfit(config, "own")
    assert any(name in reason for reason in unserved(own_fields(config)))
    with pytest.raises(ValueError, match=rf"model\.{name}"):
        check_fits(config, "the checkpoint")
