"""Choices of experts, their weights and the losses that balance them, against definitions and the routers of transformers."""

import pytest
import torch

from amfm.kernels.moe import torch_impl
from amfm.kernels.moe.grouping import balance_loss, count_by_row, router_z_loss, sequence_balance_loss
from amfm.kernels.moe.op import SCORES, route


def test_equal_scores_choose_the_lowest_experts():
    for backend in ("torch", "reference"):
        for score in SCORES:
            routing = route(torch.zeros(4, 6), None, score=score, top_k=3, normalize=True, scaling=1.0, backend=backend)
            assert routing.expert_ids_RK.tolist() == [[0, 1, 2]] * 4
            assert routing.counts_E.tolist() == [4, 4, 4, 0, 0, 0]


def test_the_choice_is_that_of_a_stable_sort_with_ties_and_what_is_not_a_number_first():
    torch.manual_seed(8)
    for dtype in (torch.float32, torch.float64):
        logits = torch.randint(-3, 4, (50, 12)).to(dtype)
        logits[0, 6:], logits[1, 5] = -torch.inf, torch.inf
        wanted = logits.argsort(dim=-1, descending=True, stable=True)[:, :5]
        assert torch.equal(torch_impl.choose_experts(logits, 5, 1, 1), wanted)
    assert torch_impl.choose_experts(torch.tensor([[3.0, torch.nan, 5.0]]), 2, 1, 1).tolist() == [[1, 2]]


def test_scores_of_far_off_logits_are_finite_and_so_are_their_gradients():
    logits = torch.tensor([[-200.0, -80.5, -30.0, 0.0, 25.0, 300.0]], requires_grad=True)
    routing = route(logits, None, score="sqrt_softplus", top_k=2, normalize=True, scaling=1.0)
    (slope,) = torch.autograd.grad(routing.scores_RE.sum(), logits)
    assert slope.isfinite().all() and slope[0, :2].tolist() == [0.0, 0.0]
    wanted = torch.tensor([-30.0, 0.0, 25.0, 300.0], dtype=torch.float64).exp().log1p().sqrt()
    torch.testing.assert_close(routing.scores_RE[0, 2:].double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_groups_are_ranked_by_as_many_of_their_best_as_asked_for(backend):
    # The best expert, the best two and the best three stand in separate groups.
    logits = torch.tensor([[9.0, 0.0, 0.0, 0.0, 6.0, 6.0, 0.0, 0.0, 5.0, 5.0, 5.0, 0.0]]) / 10
    chosen = [
        route(
            logits, None, score="sigmoid", top_k=1, normalize=False, scaling=1.0, num_groups=3, group_top_k=1,
            group_merit=merit, backend=backend,
        ).expert_ids_RK.item()
        for merit in (1, 2, 3)
    ]  # fmt: skip
    assert chosen == [0, 4, 8]


def test_bias_changes_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([-9.0, 0.0, 0.0, 9.0])
    routing = route(logits, bias, score="sigmoid", top_k=2, normalize=False, scaling=1.0)
    assert routing.expert_ids_RK.tolist() == [[3, 1]]
    assert torch.equal(routing.weights_RK, logits.sigmoid()[:, [3, 1]])


def test_softmax_normalized_is_the_softmax_over_the_chosen_logits():
    torch.manual_seed(3)
    logits = torch.randn(50, 64) * 8
    routing = route(logits, None, score="softmax", top_k=10, normalize=True, scaling=1.0)
    chosen, ids = logits.topk(10, dim=-1)
    assert torch.equal(routing.expert_ids_RK, ids)
    torch.testing.assert_close(routing.weights_RK, chosen.softmax(-1), rtol=1e-6, atol=1e-7)


def test_groups_agree_with_the_nemotron_router_of_transformers():
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

    config = NemotronHConfig(
        num_hidden_layers=1, hidden_size=32, n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(4)
    router = NemotronHTopkRouter(config)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.3)
    x = torch.randn(40, 32)
    logits, weights, ids = router(x)
    got = route(
        logits, router.e_score_correction_bias, score="sigmoid", top_k=3, normalize=True, scaling=2.5, num_groups=4,
        group_top_k=2,
    )  # fmt: skip
    order, wanted_order = got.expert_ids_RK.argsort(-1), ids.argsort(-1)
    assert torch.equal(got.expert_ids_RK.gather(1, order), ids.gather(1, wanted_order))
    torch.testing.assert_close(got.weights_RK.gather(1, order), weights.gather(1, wanted_order), rtol=1e-6, atol=0)


def test_balance_losses_are_one_when_balanced_and_more_when_not():
    scores = torch.full((8, 4), 0.25)
    assert balance_loss(scores, torch.full((4,), 4), 2).item() == pytest.approx(1.0)
    ids = torch.tensor([[0, 1], [2, 3]] * 4)
    assert sequence_balance_loss(scores.view(2, 4, 4), count_by_row(ids.view(2, 4, 2), 4)).item() == pytest.approx(1.0)
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(5)) + torch.tensor([3.0, 0, 0, 0])
    skewed = route(logits, None, score="softmax", top_k=1, normalize=True, scaling=1.0)
    assert balance_loss(skewed.scores_RE, skewed.counts_E, 1) > 1.5
    counts_BE = count_by_row(skewed.expert_ids_RK.view(2, 8, 1), 4)
    assert counts_BE.sum(0).tolist() == skewed.counts_E.tolist()
    per_row = sequence_balance_loss(skewed.scores_RE.view(2, 8, 4), counts_BE)
    by_hand = [
        balance_loss(skewed.scores_RE[half], torch.bincount(skewed.expert_ids_RK[half, 0], minlength=4), 1)
        for half in (slice(0, 8), slice(8, 16))
    ]
    assert per_row.item() == pytest.approx(sum(by_hand).item() / 2, rel=1e-6)
    assert router_z_loss(torch.zeros(3, 4)).item() == pytest.approx(torch.tensor(4.0).log().square().item(), rel=1e-6)


def test_settings_that_cannot_choose_are_refused_with_what_was_expected():
    logits = torch.randn(4, 6)
    good = {"score": "softmax", "top_k": 2, "normalize": True, "scaling": 1.0}
    for change, message in (
        ({"score": "tanh"}, "score must be one of"),
        ({"top_k": 7}, "top_k=7 must be between 1 and the 6 experts"),
        ({"num_groups": 4}, "num_groups=4 must divide"),
        ({"num_groups": 3, "group_top_k": 4}, "group_top_k=4"),
        ({"num_groups": 6, "group_top_k": 1}, "fewer than top_k=2"),
    ):
        with pytest.raises(ValueError, match=message):
            route(logits, None, **{**good, **change})
