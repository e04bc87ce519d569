"""How a mixture of memories takes tokens to their memories and back."""

from __future__ import annotations

from dataclasses import replace

import torch
from amfm_mixers.mom import sort_by_memory, take_tokens

from amfm.model.packing import PackMeta, Padding
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.model.mixers.samples import mixer_config
from tests.model.small_models import small_model

# The same few numbers added in another order.
FLOAT64 = 1e-14


def test_copies_are_the_tokens_and_gather_their_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    B, T, K = 2, 21, 3
    memory_BTK = torch.rand(B, T, 5, generator=generator).topk(K, dim=-1).indices
    order_BS = sort_by_memory(memory_BTK, PackMeta.one_document_a_row(B, T)).order_BS
    places_BTK = order_BS.argsort(1).unflatten(1, (T, K))
    wide_BTX = torch.randn(B, T, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    x_BTX = wide_BTX[..., 2:6]
    actual = take_tokens(x_BTX, order_BS // K, places_BTK)
    expected = x_BTX[torch.arange(B)[:, None], order_BS // K]
    assert_bitwise(actual, expected, "copies")
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (actual_BTX,) = torch.autograd.grad((actual * weight).sum(), wide_BTX)
    (expected_BTX,) = torch.autograd.grad((expected * weight).sum(), wide_BTX)
    assert_near(actual_BTX, expected_BTX, FLOAT64, "gradient of the tokens")


def test_padding_is_not_counted_by_the_balance_loss() -> None:
    model = small_model(mixer_config("mom", blocks=1)).train()
    tokens_BT = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(0))
    lengths_B = torch.tensor([9, 16])
    meta = PackMeta.one_document_a_row(2, 16)

    def balance(tokens_BT: torch.Tensor, lengths_B: torch.Tensor | None) -> torch.Tensor:
        padding = None if lengths_B is None else Padding.of_lengths(lengths_B, 16)
        return model(tokens_BT, replace(meta, padding=padding)).auxiliary["memory_balance"]

    padded = balance(tokens_BT, lengths_B)
    (gradient,) = torch.autograd.grad(padded, model.blocks[0].mixer.router)
    changed_BT = tokens_BT.where(torch.arange(16) < lengths_B[:, None], (tokens_BT + 7) % 40)
    assert_bitwise(balance(changed_BT, lengths_B).detach(), padded.detach(), "loss with other padding")
    # By the paper's equation, only from the probabilities of the 25 tokens.
    hidden_BTD = model.blocks[0].norm(model.embed(tokens_BT).residual_BTD)
    probabilities = (hidden_BTD @ model.blocks[0].mixer.router.T).softmax(-1)[torch.arange(16) < lengths_B[:, None]]
    counts = torch.bincount(probabilities.topk(2).indices.flatten(), minlength=4)
    share = counts.double() / (2 * len(probabilities))
    expected = 0.01 * 4 * (share * probabilities.mean(0)).sum()
    assert_near(padded, expected, FLOAT64, "loss")
    (expected_gradient,) = torch.autograd.grad(expected, model.blocks[0].mixer.router)
    assert_near(gradient, expected_gradient, 1e-12, "gradient of the router")
    assert float(balance(tokens_BT, None)) != float(padded)
