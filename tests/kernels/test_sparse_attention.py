"""Sparse attention and the losses of its indexer in blocks of queries against their definitions with whole scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amfm.kernels.attention.op import attention
from amfm.kernels.sparse_attention import torch_impl
from amfm.kernels.sparse_attention.op import choose_keys, chosen_loss, sparse_attention, warm_up_loss
from amfm.kernels.sparse_attention.reference import IndexRows
from tests.helpers.numbers import assert_all_near, assert_bitwise, assert_near

# float64: the same sums in another order.
EXACT = 1e-12
# (queries, keys, heads, key heads, head size, value size, top_k, document lengths of the keys)
SHAPES = [
    (1, 1, 4, 2, 8, 8, 3, None),
    (63, 63, 4, 2, 8, 8, 7, None),
    (63, 63, 4, 1, 12, 5, 7, (20, 1, 29, 13)),
    (30, 63, 6, 3, 4, 4, 9, None),
    (17, 40, 2, 2, 4, 6, 64, (30, 10)),
]


def make_rows(tokens: int, keys: int, heads: int = 5, size: int = 6, seed: int = 0) -> IndexRows:
    """Random rows of an indexer, of two rows of keys."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, tokens, heads, size), (2, keys, size), (2, tokens, heads))
    return IndexRows(*(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes))


def make_heads(tokens: int, keys: int, heads: int, kv_heads: int, size: int, value: int) -> list[Tensor]:
    """Random q, k and v."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, tokens, heads, size), (2, keys, kv_heads, size), (2, keys, kv_heads, value))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def make_ids(lengths: tuple[int, ...] | None) -> Tensor | None:
    """Document ids of two rows, of which the second is one document."""
    if lengths is None:
        return None
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.stack([ids, torch.zeros_like(ids)])


def run(shape: tuple, backend: str) -> list[Tensor]:
    """The choice, output and weights of attention, both losses, and all gradients."""
    tokens, keys, heads, kv_heads, size, value, top_k, lengths = shape
    index = IndexRows(*(x.requires_grad_() for x in make_rows(tokens, keys)))
    q, k, v = (x.requires_grad_() for x in make_heads(tokens, keys, heads, kv_heads, size, value))
    ids = make_ids(lengths)
    places = choose_keys(index, top_k=top_k, document_ids_BS=ids, backend=backend)
    highest = torch.full((heads,), -torch.inf, dtype=torch.float64)
    o, mass = sparse_attention(q, k, v, places, scale=0.4, highest_H=highest, backend=backend)
    weight = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(2))
    found = [o, mass, highest, *torch.autograd.grad((o * weight).sum(), (q, k, v))]
    sparse = chosen_loss(index, places, mass, backend=backend)
    warm = warm_up_loss(index, q, k, scale=0.4, document_ids_BS=ids, backend=backend)
    for factor, loss in ((1.5, sparse), (0.5, warm)):
        found += [loss, *torch.autograd.grad(factor * loss, index)]
    return [places, *found]


@pytest.mark.parametrize("numbers", [1 << 23, 2000], ids=["one block", "many blocks"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_equal_the_definition_with_gradients(
    shape: tuple, numbers: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    monkeypatch.setattr(torch_impl, "_NUMBERS", numbers)
    (places, *actual), (expected_places, *expected) = run(shape, "torch"), run(shape, "reference")
    assert_bitwise(places, expected_places, "the choice")
    assert_all_near(actual, expected, EXACT)


def test_a_choice_of_all_keys_is_dense_attention() -> None:
    q, k, v = make_heads(40, 40, 4, 2, 6, 6)
    ids = make_ids((25, 15))
    places = choose_keys(make_rows(40, 40), top_k=40, document_ids_BS=ids)
    o, mass = sparse_attention(q, k, v, places, scale=0.4)
    assert_near(o, attention(q, k, v, document_ids_BS=ids, scale=0.4), EXACT)
    assert_near(mass.sum(-1), torch.full((2, 40), 4.0), EXACT)


def test_values_may_be_channels_of_keys() -> None:
    q, k, _ = (x.requires_grad_() for x in make_heads(20, 20, 4, 1, 12, 5))
    places = choose_keys(make_rows(20, 20), top_k=6)
    found = [sparse_attention(q, k, v, places, scale=0.4)[0] for v in (5, k[..., :5])]
    assert_bitwise(*found)
    assert_all_near(*(list(torch.autograd.grad(o.square().sum(), (q, k))) for o in found), 0.0)


def test_of_equal_scores_the_earlier_key_is_chosen_and_no_other_document_ever() -> None:
    index = IndexRows(*(torch.zeros_like(x) for x in make_rows(12, 12)))
    places = choose_keys(index, top_k=3, document_ids_BS=make_ids((7, 5)))
    assert places[1].tolist() == [[0, -1, -1], [0, 1, -1], *[[0, 1, 2]] * 10]
    assert places[0, 7:].tolist() == [[7, -1, -1], [7, 8, -1], *[[7, 8, 9]] * 3]


def test_gradients_pass_gradcheck() -> None:
    index = IndexRows(*(x.requires_grad_() for x in make_rows(5, 7, heads=2, size=3)))
    q, k, v = (x.requires_grad_() for x in make_heads(5, 7, 2, 1, 3, 2))
    places = choose_keys(index, top_k=4)
    mass = sparse_attention(q, k, v, places, scale=0.7)[1]
    assert torch.autograd.gradcheck(lambda *x: sparse_attention(*x, places, scale=0.7)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: chosen_loss(IndexRows(*x), places, mass), tuple(index))
    assert torch.autograd.gradcheck(lambda *x: warm_up_loss(IndexRows(*x), q, k, scale=0.7), tuple(index))


def test_bfloat16_stays_near_float64() -> None:
    q, k, v = (x.bfloat16() for x in make_heads(33, 33, 4, 2, 16, 16))
    index = make_rows(33, 33)
    places = choose_keys(index, top_k=8)
    o, mass = sparse_attention(q, k, v, places, scale=0.25)
    expected, expected_mass = sparse_attention(q.double(), k.double(), v.double(), places, scale=0.25)
    # The output is rounded to 2^-9, the weights are float32.
    assert_near(o, expected, 5e-3)
    assert_near(mass, expected_mass, 1e-5)


def test_heads_of_other_ranks_join_the_target() -> None:
    index = IndexRows(*(x.requires_grad_() for x in make_rows(30, 30)))
    q, k, _ = make_heads(30, 30, 4, 4, 6, 6)
    whole = warm_up_loss(index, q, k, scale=0.4)
    others = []

    def note(part: Tensor) -> Tensor:
        others.append(part.clone())
        return part

    warm_up_loss(index, q[:, :, 2:], k[:, :, 2:], scale=0.4, sum_heads=note)
    waiting = iter(others)
    half = warm_up_loss(index, q[:, :, :2], k[:, :, :2], scale=0.4, sum_heads=lambda part: part + next(waiting))
    assert_all_near([half, *torch.autograd.grad(half, index)], [whole, *torch.autograd.grad(whole, index)], EXACT)


def test_wrong_shapes_are_refused_by_name() -> None:
    q, k, v = make_heads(6, 8, 4, 2, 4, 4)
    index = make_rows(6, 8)
    places = choose_keys(index, top_k=3)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        choose_keys(index, top_k=0)
    with pytest.raises(ValueError, match="places_BTN must have shape"):
        sparse_attention(q, k, v, places[:, 1:], scale=1.0)
    with pytest.raises(ValueError, match="key heads must divide"):
        sparse_attention(q[:, :, :3], k, v, places, scale=1.0)
    with pytest.raises(ValueError, match="values must be 1 to 4 of the channels of keys; got 5"):
        sparse_attention(q, k, 5, places, scale=1.0)
    with pytest.raises(ValueError, match="mass_BTN must have shape"):
        chosen_loss(index, places, torch.ones(2, 6, 4))
