"""Norms that backward passes make again in place of keeping them: bitwise identical results, and nothing keeps them meanwhile."""

import gc
import weakref

import pytest
import torch

from amfm.model.block import Recomputed, run_inside
from amfm.model.config.moe import MoeConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from tests.model.small_models import loss_of, meta_of, packed_batch, small_config

MOE = MoeConfig(num_experts=5, top_k=2, expert_hidden_size=8, shared_expert_hidden_size=12, auxiliary_loss_weight=0.1)


def train_once(*, keeps_norm, wide_stream=False, recomputed=""):
    """Loss, gradients, and whether what each mixer read still lived after the forward pass."""
    config = small_config("M*E-M", moe=MOE).model_copy(update={"residual_in_fp32": wide_stream})
    model = HybridModel(config, single_rank_groups(), seed=3)
    if wide_stream:
        model = model.bfloat16()
    model.recompute_blocks(recomputed)
    read = []
    for block in model.blocks:
        block.keeps_norm = keeps_norm
        block.mixer.register_forward_pre_hook(lambda _, given: read.append(weakref.ref(given[0].untyped_storage())))
    tokens_BT, labels_BT, ids_BT = packed_batch()
    output = model(tokens_BT, meta_of(ids_BT), labels_BT)
    loss = loss_of(output)
    lives = [each() is not None for each in read]
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return loss.detach(), gradients, lives


@pytest.mark.parametrize("options", [{}, {"wide_stream": True}, {"recomputed": "E"}])
def test_norms_that_are_made_again_change_no_bit_and_are_kept_by_no_one(options):
    loss, gradients, lives = train_once(keeps_norm=True, **options)
    other, others, live = train_once(keeps_norm=False, **options)
    assert torch.equal(loss, other)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name
    assert all(kept for kept, letter in zip(lives, "M*E-M", strict=True) if letter not in options.get("recomputed", ""))
    assert not any(live)


def test_a_tensor_is_made_once_for_all_who_kept_it_and_let_go_with_the_last():
    x = torch.linspace(0, 1, 12).view(3, 4).requires_grad_()
    made = []

    def make():
        made.append(x.detach().exp())
        return made[-1]

    gc.disable()  # no cycle may hold what was made
    try:
        normed = x.exp().clone()
        again = Recomputed(normed, make)
        with again:
            first = normed * normed
        with again:  # as a block that pauses
            total = (first.sum() + (normed.t()[1:] * normed.t()[1:]).sum()) / 2
        assert again.readers == 4
        del normed, first
        total.backward()
        assert len(made) == 1 and again.readers == 0 and again.made is None
        freed = weakref.ref(again)
        del again, total
        assert freed() is None
    finally:
        gc.enable()
    doubled = 2 * x.detach().exp() ** 2 / 2
    doubled[:, 1:] *= 2
    assert torch.allclose(x.grad, doubled)


def test_a_generator_that_pauses_leaves_its_context_to_others():
    x = torch.linspace(0, 1, 6).requires_grad_()
    normed = [(x * factor).clone() for factor in (2.0, 3.0)]
    again = [Recomputed(each, (x * factor).detach) for each, factor in zip(normed, (2.0, 3.0), strict=True)]

    def squares(own, other):
        total = own.square().sum() + other.square().sum()  # the other's is kept here
        yield
        return total + own.pow(3).sum()

    steps = [run_inside(again[0], squares(*normed)), run_inside(again[1], squares(*reversed(normed)))]
    results = []
    for each in (*steps, *steps):
        try:
            next(each)
        except StopIteration as end:
            results.append(end.value)
    assert [each.readers for each in again] == [2, 2]
    sum(results).backward()
    assert torch.allclose(x.grad, (4 * (4 + 9) * x + 3 * (8 + 27) * x**2).detach())
    assert all(each.readers == 0 and each.made is None for each in again)
