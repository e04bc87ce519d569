"""Choices of experts are replayed: the same numbers and gradients as the router that made them, whatever it would choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amfm.kernels.moe.op import route
from amfm.model.config.moe import MoeConfig
from amfm.model.hybrid import HybridModel, ModelOutput
from amfm.model.packing import PackMeta
from tests.model.small_models import meta_of, packed_batch, small_config, small_model

MOE = MoeConfig(num_experts=5, top_k=2, expert_hidden_size=8, shared_expert_hidden_size=6, expert_bias=True)
SETTINGS = {"score": "sigmoid", "top_k": 2, "normalize": True, "scaling": 2.5}


def trace(model: HybridModel, tokens_BT: Tensor, meta: PackMeta, labels_BT: Tensor) -> tuple[ModelOutput, dict]:
    """A pass in training, and what each router chose in it."""
    chosen: dict[int, Tensor] = {}
    for index, block in model.all_blocks():
        if hasattr(block.mixer, "note_choices"):
            block.mixer.note_choices = lambda ids_RK, index=index: chosen.__setitem__(index, ids_RK)
    output = model.train()(tokens_BT, meta, labels_BT)
    return output, {index: ids_RK.unflatten(0, tokens_BT.shape) for index, ids_RK in chosen.items()}


def backward(model: HybridModel, output: ModelOutput) -> dict[str, Tensor]:
    model.zero_grad()
    output.loss.total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_replayed_choices_give_the_same_bits_and_gradients_whatever_the_router_would_choose() -> None:
    model = small_model(small_config("E*E", moe=MOE), dtype=torch.float32)
    tokens_BT, labels_BT, ids_BT = packed_batch(((7, 9), (16,)))
    meta = meta_of(ids_BT)
    output, choices = trace(model, tokens_BT, meta, labels_BT)
    assert set(choices) == {0, 2}
    expected = backward(model, output)
    replayed = replace(meta, choices=choices)
    assert torch.equal(model.eval()(tokens_BT, replayed).logits_BTV, model(tokens_BT, meta).logits_BTV)
    # The reference of an RL backend has its own bias: without replay it would choose others.
    for index in choices:
        bias_E = model.blocks[index].mixer.expert_bias
        bias_E.copy_(torch.linspace(-1, 1, len(bias_E)))
    other = model.train()(tokens_BT, meta, labels_BT)
    again = model(tokens_BT, replayed, labels_BT)
    assert float(other.loss.total) != float(output.loss.total)
    assert torch.equal(again.loss.total, output.loss.total)
    for index, counts_E in output.expert_counts.items():
        assert torch.equal(again.expert_counts[index], counts_E)
    found = backward(model, again)
    assert found.keys() == expected.keys() and bool(found["blocks.2.mixer.router.weight"].any())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    # A block without choices makes its own.
    own = model(tokens_BT, replace(meta, choices={2: choices[2]}), labels_BT)
    assert torch.equal(own.expert_counts[0], other.expert_counts[0])
    assert torch.equal(own.expert_counts[2], output.expert_counts[2])


def test_choices_are_cut_and_moved_with_the_rows() -> None:
    choices_BTK = torch.arange(2 * 16 * 2).view(2, 16, 2)
    meta = replace(PackMeta.one_document_a_row(2, 16), choices={3: choices_BTK})
    for rank in (0, 1):
        own = meta.cut(rank, 2)
        assert torch.equal(own.of_block(3).own_choices_BTK, own.segments.take(choices_BTK))
    first, second = meta.with_halves().halves
    assert torch.equal(torch.cat([first.choices[3], second.choices[3]]), choices_BTK)
    assert meta.map_tensors(lambda tensor: tensor + 1).choices[3].equal(choices_BTK + 1)
    assert meta.of_block(2).own_choices_BTK is None


def test_weights_and_counts_are_of_the_given_choices() -> None:
    logits_RE = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    choices_RK = torch.tensor([[3, 0], [1, 2], [0, 1], [2, 3], [0, 3]])
    found = route(logits_RE, torch.full((4,), 9.0), choices_RK=choices_RK, **SETTINGS)
    scores_RE = logits_RE.sigmoid()
    chosen = torch.stack([scores_RE[torch.arange(5), column] for column in choices_RK.T], dim=1)
    expected = 2.5 * chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(found.weights_RK, expected, rtol=1e-14, atol=0)
    assert found.counts_E.tolist() == [3, 2, 2, 3] and found.expert_ids_RK is choices_RK
    (gradient,) = torch.autograd.grad(found.weights_RK.square().sum(), logits_RE)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), logits_RE)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("choices_RK", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), "choices_RK"),
        (torch.zeros(5, 2, dtype=torch.int32), "must be int64"),
        (torch.full((5, 2), 4), "has experts 4 to 4; the router has 0 to 3"),
        (torch.full((5, 2), -1), "has experts -1 to -1; the router has 0 to 3"),
    ],
)
def test_choices_that_no_router_makes_are_refused(choices_RK: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(5, 4), None, choices_RK=choices_RK, **SETTINGS)


def test_forced_balance_gives_each_expert_as_many_tokens_in_training_alone() -> None:
    forced = small_model(small_config("E", moe=MOE.model_copy(update={"forced_balance": True})), dtype=torch.float32)
    tokens_BT, labels_BT, ids_BT = packed_batch(((7, 8), (15,)))  # 30 rows of two choices, five experts
    output, choices = trace(forced, tokens_BT, meta_of(ids_BT), labels_BT)
    assert output.expert_counts[0].tolist() == [12.0] * 5
    assert choices[0].flatten().tolist() == [place % 5 for place in range(60)]
    assert bool(backward(forced, output)["blocks.0.mixer.router.weight"].any())
    plain = small_model(small_config("E", moe=MOE), dtype=torch.float32)
    plain.load_state_dict(forced.state_dict())
    logits = [model.eval()(tokens_BT, meta_of(ids_BT)).logits_BTV for model in (forced, plain)]
    assert torch.equal(*logits)
