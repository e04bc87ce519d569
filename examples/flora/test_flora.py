"""FLoRA's update is its formula, begins at nothing, trains alone, and merges into weights of the same names."""

from __future__ import annotations

import pytest
import torch
from amfm_flora.flora import TuckerUpdate, add_flora, check_ranks, merge_flora

from amfm.model.config.feed_forward import FeedForwardConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups


def make_model(pattern: str = "EE") -> HybridModel:
    moe = MoeConfig(num_experts=4, top_k=2, expert_hidden_size=8)
    config = ModelConfig(
        pattern=pattern,
        vocab_size=20,
        hidden_size=12,
        initializer_range=0.3,
        moe=moe,
        feed_forward=FeedForwardConfig(hidden_size=8),
    )
    return HybridModel(config, single_rank_groups()).double()


def test_the_update_is_its_formula_with_gradients_and_a_tenth_of_a_lora_of_each_expert() -> None:
    stack = torch.randn(16, 32, 24, dtype=torch.float64)
    update = TuckerUpdate(stack, 4, 0.5, torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in update.parameters()) == 352
    assert torch.equal(update(stack), stack)
    with torch.no_grad():
        update.core.copy_(torch.randn(4, 4, 4))
    products = torch.einsum("abc,ea,ob,ic->eoi", update.core, update.experts, update.outputs, update.inputs)
    torch.testing.assert_close(update(stack), stack + 0.5 * products, rtol=1e-12, atol=1e-12)
    leaves = list(update.parameters())
    found = torch.autograd.grad(update(stack).square().sum(), leaves)
    for actual, right in zip(found, torch.autograd.grad((stack + 0.5 * products).square().sum(), leaves)):
        torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-10)


def test_it_trains_alone_and_merges() -> None:
    model = make_model()
    names = list(model.state_dict())
    tokens, meta = torch.arange(16)[None], PackMeta.one_document_a_row(1, 16)
    before, weights = model(tokens, meta).logits_BTV, {k: v.clone() for k, v in model.state_dict().items()}
    assert add_flora(model, rank=2, alpha=4.0)[0] == "blocks.0.mixer.experts.up"
    assert torch.equal(model(tokens, meta).logits_BTV, before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.1)
    losses = []
    for _ in range(12):
        loss = model(tokens, meta, tokens.roll(-1, 1)).loss.total
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    unmerged = model(tokens, meta).logits_BTV
    merge_flora(model)
    torch.testing.assert_close(model(tokens, meta).logits_BTV, unmerged, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == names
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert moved == {name for name in names if ".experts." in name}


def test_what_it_cannot_update_is_refused() -> None:
    with pytest.raises(ValueError, match="no block E"):
        add_flora(make_model("--"), rank=2, alpha=4.0)
    with pytest.raises(ValueError, match=r"rank=9 must be in 1\.\.4"):
        add_flora(make_model(), rank=9, alpha=4.0)
    with pytest.raises(ValueError, match=r"over 2 expert and 1 tensor ranks.*use parallel\.expert=1"):
        check_ranks(2, 1)
