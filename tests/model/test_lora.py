"""Low-rank updates start at nothing, merge into what they compute, and are spread over ranks as their matrices are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model.hybrid import HybridModel
from amfm.model.lora import add_lora, merge_lora
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.gradients import find_partial_gradients, sum_partial_gradients
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.numbers import assert_near
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.shards import join_parts
from tests.helpers.spawn import run_ranks
from tests.model.mixers.samples import sample_options
from tests.model.small_models import cut_batch, loss_of, small_config, small_model

# float64: the same sums in another order.
EXACT = 1e-10
DOCUMENTS = ((7, 1, 13, 3), (24,))
MIXERS = {"window_linear": {"window": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "chunk_size": 8}}


def with_updates(groups: Any = None, targets: str = "qkvo", seed: int = 1) -> HybridModel:
    """Attention and window_linear with updates that do something, everything else frozen."""
    model = HybridModel(
        small_config("*{window_linear}", mixers=MIXERS), groups or single_rank_groups(), seed=seed
    ).double()
    model.requires_grad_(False)
    add_lora(model, tuple(targets), rank=2, alpha=6.0)
    for name, parameter, shard in parameter_shards(model):
        if name.endswith("lora.up"):
            # A function of the name, cut as the layout cuts it, so that all layouts have the same.
            shape = torch.Size(shard.whole_shape(parameter.shape))
            whole = torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)
            parameter.data.copy_(shard.shard(whole, model.groups))
    return model


def run_model(model: HybridModel) -> dict[str, Tensor]:
    """Loss and gradients of what is trained, whole and summed over ranks."""
    groups = model.groups
    tokens_BT, labels_BT, meta = cut_batch(DOCUMENTS, groups)
    loss = loss_of(model(tokens_BT, meta, labels_BT))
    loss.backward()
    sum_partial_gradients(find_partial_gradients(model, groups), groups)
    shards = {name: (weight, shard) for name, weight, shard in parameter_shards(model) if weight.requires_grad}
    gradients = {name: join_parts(weight.grad, shard, groups) for name, (weight, shard) in shards.items()}
    return {"loss": loss.detach()} | gradients


def test_an_update_starts_at_nothing_and_everything_else_keeps_its_name() -> None:
    config = small_config("*{window_linear}", mixers=MIXERS)
    plain, updated = small_model(config), small_model(config)
    names = add_lora(updated, ("q", "o"), rank=2, alpha=4.0)
    assert names == [f"blocks.{index}.mixer.{name}" for index in (0, 1) for name in ("q_proj", "o_proj")]
    tokens_BT, _, meta = cut_batch(DOCUMENTS, single_rank_groups())
    assert torch.equal(updated(tokens_BT, meta).logits_BTV, plain(tokens_BT, meta).logits_BTV)
    assert set(plain.state_dict()) < set(updated.state_dict())
    merged = merge_lora(updated.state_dict(), 2.0)
    assert all(torch.equal(merged[name], tensor) for name, tensor in plain.state_dict().items())


def test_merged_weights_compute_what_the_updates_do() -> None:
    updated = with_updates()
    merged = small_model(small_config("*{window_linear}", mixers=MIXERS))
    merged.load_state_dict(merge_lora(updated.state_dict(), 3.0))
    tokens_BT, _, meta = cut_batch(DOCUMENTS, single_rank_groups())
    assert_near(updated(tokens_BT, meta).logits_BTV, merged(tokens_BT, meta).logits_BTV, EXACT, "logits")


def test_gradients_are_those_of_the_merged_weights_factors() -> None:
    updated = with_updates(targets="q")
    found = run_model(updated)
    merged = small_model(small_config("*{window_linear}", mixers=MIXERS))
    merged.load_state_dict(merge_lora(updated.state_dict(), 3.0))
    tokens_BT, labels_BT, meta = cut_batch(DOCUMENTS, single_rank_groups())
    loss_of(merged(tokens_BT, meta, labels_BT)).backward()
    layer = "blocks.0.mixer.q_proj"
    d_weight, lora = merged.get_parameter(f"{layer}.weight").grad, updated.get_submodule(f"{layer}.lora")
    assert_near(found[f"{layer}.lora.up"], 3.0 * d_weight @ lora.down.T, EXACT, "up")
    assert_near(found[f"{layer}.lora.down"], 3.0 * lora.up.T @ d_weight, EXACT, "down")


@pytest.mark.parametrize("symbol", ["M", "gated_deltanet", "gla", "mamba1"])
def test_updates_of_ssm_projections_compute_what_merged_weights_do_with_gradients(symbol: str) -> None:
    if symbol == "M":
        config = small_config("M")
    else:
        config = small_config(f"{{{symbol}}}", mixers={symbol: sample_options(symbol)})
    updated, merged = small_model(config), small_model(config)
    names = add_lora(updated, ("in", "out"), rank=2, alpha=6.0)
    assert names == ["blocks.0.mixer.in_proj", "blocks.0.mixer.out_proj"]
    for name in names:
        torch.nn.init.normal_(updated.get_submodule(name).lora.up, generator=torch.Generator().manual_seed(3))
    merged.load_state_dict(merge_lora(updated.state_dict(), 3.0))
    tokens_BT, labels_BT, meta = cut_batch(DOCUMENTS, single_rank_groups())
    losses = [loss_of(model(tokens_BT, meta, labels_BT)) for model in (updated, merged)]
    assert_near(losses[0], losses[1], EXACT, "loss")
    for loss in losses:
        loss.backward()
    for name in names:
        layer, d_weight = updated.get_submodule(name), merged.get_parameter(f"{name}.weight").grad
        assert_near(layer.lora.up.grad, 3.0 * d_weight @ layer.lora.down.T, EXACT, f"up of {name}")
        assert_near(layer.lora.down.grad, 3.0 * layer.lora.up.T @ d_weight, EXACT, f"down of {name}")


def test_blocks_without_such_projections_get_none() -> None:
    window = small_config("W", mixers={"window": sample_options("window")})
    assert add_lora(small_model(window), ("in", "out"), rank=2, alpha=4.0) == []
    assert add_lora(small_model(small_config("M-")), ("q", "k"), rank=2, alpha=4.0) == []


def run_spread(sections: list[ParallelConfig]) -> list[dict[str, Tensor]]:
    found = []
    for section in sections:
        groups = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1).groups
        found.append(run_model(with_updates(groups)))
    return found


@pytest.mark.slow  # tests of stages run tensor ranks on the way
def test_tensor_ranks_compute_what_one_does_without_more_collectives() -> None:
    sections = [ParallelConfig(tensor=2), ParallelConfig(tensor=2, sequence_parallel=True)]
    expected = run_model(with_updates())
    for results in run_ranks(run_spread, sections):
        for actual in results:
            for name, value in expected.items():
                assert_near(actual[name], value, EXACT, name)
