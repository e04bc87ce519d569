"""Padding is neither routed nor counted: a padded batch is, to routers and experts, the batch of only its tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amfm.model.config.moe import MoeConfig
from amfm.model.hybrid import HybridModel, ModelOutput
from amfm.model.packing import Padding
from tests.model.small_models import meta_of, packed_batch, small_config, small_model

LENGTHS = torch.tensor([9, 16, 1])
MOE = MoeConfig(
    num_experts=5,
    top_k=2,
    expert_hidden_size=8,
    shared_expert_hidden_size=6,
    expert_bias=True,
    auxiliary_loss_weight=1.0,
    sequence_loss_weight=1.0,
    z_loss_weight=1.0,
)


def passed(model: HybridModel, tokens_BT: Tensor, labels_BT: Tensor, lengths_B: Tensor | None) -> ModelOutput:
    """Loss and routing of rows with these lengths; None: no row is padded."""
    meta = meta_of(torch.zeros_like(tokens_BT))
    if lengths_B is not None:
        meta = replace(meta, padding=Padding.of_lengths(lengths_B, tokens_BT.shape[1]))
    model.zero_grad()
    output: ModelOutput = model.train()(tokens_BT, meta, labels_BT)
    assert output.loss is not None
    (output.loss.total + sum(output.auxiliary.values())).backward()
    return output


def gradients(model: HybridModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def batch() -> tuple[Tensor, Tensor]:
    tokens_BT, labels_BT, _ = packed_batch(((16,),) * 3)
    is_padding_BT = torch.arange(16) >= LENGTHS[:, None] - 1  # a row's last token has no label
    return tokens_BT, labels_BT.masked_fill(is_padding_BT, -100)


@pytest.mark.parametrize("balance_counts", ["scores", "routed"])
def test_losses_counts_and_gradients_are_those_of_the_tokens_alone(balance_counts: str) -> None:
    moe = MOE.model_copy(update={"balance_counts": balance_counts})
    model = small_model(small_config("E", moe=moe), seed=3).double()
    tokens_BT, labels_BT = batch()
    padded = passed(model, tokens_BT, labels_BT, LENGTHS)
    own = gradients(model)
    # Blocks that do not mix tokens: one row of the 26 tokens is the same batch, but for losses by row.
    is_token_BT = torch.arange(16) < LENGTHS[:, None]
    joined = passed(model, tokens_BT[is_token_BT][None], labels_BT[is_token_BT][None], None)
    assert torch.equal(padded.expert_counts[0], joined.expert_counts[0])
    assert int(padded.expert_counts[0].sum()) == 2 * 26
    for name in ("balance", "router_z"):
        torch.testing.assert_close(padded.auxiliary[name], joined.auxiliary[name], rtol=1e-12, atol=0)
    rows = [
        passed(model, tokens_BT[row, None, :length], labels_BT[row, None, :length], None)
        for row, length in enumerate(LENGTHS.tolist())
    ]
    mean = sum(row.auxiliary["sequence_balance"] for row in rows) / 3
    torch.testing.assert_close(padded.auxiliary["sequence_balance"], mean, rtol=1e-12, atol=0)
    # What stands in the padding changes nothing.
    changed = passed(model, tokens_BT.where(is_token_BT, (tokens_BT + 7) % 40), labels_BT, LENGTHS)
    assert torch.equal(changed.expert_counts[0], padded.expert_counts[0])
    for name, gradient in gradients(model).items():
        if name != "embedding.weight":  # rows of other tokens get zeros
            torch.testing.assert_close(gradient, own[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("overflow", ["drop", "recycle"])
def test_a_capacity_is_a_share_of_the_tokens_and_padding_takes_none_of_it(overflow: str) -> None:
    moe = MOE.model_copy(update={"capacity_factor": 1.0, "overflow": overflow})
    model = small_model(small_config("E", moe=moe), seed=3).double()
    tokens_BT, labels_BT = batch()
    padded = passed(model, tokens_BT, labels_BT, LENGTHS)
    own = gradients(model)
    assert padded.loss is not None
    # Tokens take their turn by place in the row, then by row.
    order = sorted((place, row) for row, length in enumerate(LENGTHS.tolist()) for place in range(length))
    places, rows = torch.tensor(order).T
    joined = passed(model, tokens_BT[rows, places][None], labels_BT[rows, places][None], None)
    assert joined.loss is not None
    torch.testing.assert_close(padded.loss.total, joined.loss.total, rtol=1e-12, atol=0)
    assert torch.equal(padded.expert_counts[0], joined.expert_counts[0])
    name = "blocks.0.mixer.experts.down"
    torch.testing.assert_close(own[name], gradients(model)[name], rtol=1e-10, atol=1e-14)
