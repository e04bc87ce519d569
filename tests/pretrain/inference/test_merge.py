"""Factors multiplied out are the same function, and a dense model stays as it is."""

from __future__ import annotations

import pytest
import torch

from amfm.model.config.core_options import FeedForwardConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.inference.merge import multiply_out
from tests.model.small_models import MOE, meta_of, packed_batch, small_config, small_model

FORMS = {
    "lowrank": {"linear_rank": 4},
    "blockshuffle": {"linear_blocks": 2},
    "blockdense": {"linear_rank": 6, "linear_blocks": 2},
}


@pytest.mark.parametrize("kind", FORMS)
def test_factors_multiplied_out_give_the_same_logits(kind: str) -> None:
    settings = {"linear_kind": kind} | FORMS[kind]
    shared = {f"shared_expert_{name}": value for name, value in settings.items()}
    config = small_config(
        "M-E/E",
        feed_forward=FeedForwardConfig(hidden_size=24, activation="swiglu", **settings),
        moe=MoeConfig.model_validate(MOE.model_dump() | shared | {"shared_expert_hidden_size": 24}),
    )
    model = small_model(config).eval()
    dense, state = multiply_out(config, model.state_dict())
    assert not dense.has_factors()
    merged = HybridModel(dense, single_rank_groups()).double().eval()
    merged.load_state_dict(state)
    tokens_BT, _, ids_BT = packed_batch()
    with torch.no_grad():
        found, expected = (each(tokens_BT, meta_of(ids_BT)).logits_BTV for each in (merged, model))
    # Merged matrices are rounded to float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_dense_model_stays_as_it_is() -> None:
    model = small_model(small_config("M-E"))
    config, state = multiply_out(model.config, model.state_dict())
    assert config is model.config and all(torch.equal(state[name], value) for name, value in model.state_dict().items())
