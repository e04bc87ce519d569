"""Balancing: the bias moves by the sign rule, shifts only the choice, and evens out a skewed load. Capacity: who is over
it, what choices then weigh, and when it holds."""

import pytest
import torch

from amfm.kernels.moe.op import route
from amfm.model.config.moe import MoeConfig
from amfm.model.hybrid import HybridModel
from amfm.model.moe.balance import auxiliary_losses
from amfm.model.moe.block import PRUNED_BIAS
from amfm.model.moe.capacity import limit_choices
from amfm.model.parallel.groups import single_rank_groups
from tests.model.small_models import StandInGroup, meta_of, packed_batch, small_config, small_model

SKEWED = MoeConfig(num_experts=4, top_k=1, expert_hidden_size=4, expert_bias=True, bias_update_rate=0.01)


def test_bias_falls_for_the_busy_and_rises_for_the_idle():
    model = small_model(small_config("-E", moe=SKEWED))
    before = model.blocks[1].mixer.expert_bias.clone()
    model.update_expert_bias({1: torch.tensor([7, 1, 4, 4])})
    moved = model.blocks[1].mixer.expert_bias - (before - before.mean())
    torch.testing.assert_close(moved, torch.tensor([-0.01, 0.01, 0.0, 0.0]))


def test_the_mean_of_living_experts_stays_where_it_is_put_and_nothing_else_changes():
    model = small_model(small_config("E", moe=SKEWED.model_copy(update={"num_experts": 5})))
    bias_E = model.blocks[0].mixer.expert_bias
    # As a long run had left it before means were taken out, with a pruned expert.
    bias_E.copy_(torch.tensor([5.02, 5.0, PRUNED_BIAS, 4.97, 5.01]))
    for counts in ([9, 1, 0, 1, 1], [9, 1, 0, 1, 1], [2, 3, 0, 9, 1]):
        before_E = bias_E.clone()
        model.update_expert_bias({0: torch.tensor(counts)})
        living = [0, 1, 3, 4]
        assert bias_E[2] == PRUNED_BIAS and abs(float(bias_E[living].mean())) < 1e-6
        moved_E = (bias_E - before_E)[living]
        mean = sum(counts) / 4
        signs = torch.tensor([mean - counts[expert] for expert in living]).sign()
        # Between experts, the step is only that of the rule.
        torch.testing.assert_close(moved_E - moved_E[0], 0.01 * (signs - signs[0]), rtol=0, atol=2e-6)


def test_without_a_bias_counts_change_nothing():
    config = small_config("E", moe=SKEWED.model_copy(update={"expert_bias": False}))
    model = small_model(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.update_expert_bias({0: torch.tensor([7, 1, 4, 4])})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_updates_even_out_a_skewed_load():
    config = small_config("E", moe=SKEWED)
    model = small_model(config)
    tokens_BT = torch.arange(40).repeat(4)[None]
    mixer = model.blocks[0].mixer
    mixer.expert_bias.copy_(torch.tensor([0.8, 0.0, 0.0, -0.5]))

    def load():
        return model(tokens_BT, meta_of(torch.zeros_like(tokens_BT))).expert_counts[0]

    assert load().max() > 120
    for _ in range(120):
        model.update_expert_bias({0: load()})
    assert load().max() <= 2 * load().float().mean() and load().min() > 0


def test_balance_losses_can_count_the_choices_of_the_scores_alone_as_their_equations_do():
    moe = MoeConfig(
        num_experts=6,
        top_k=2,
        expert_hidden_size=4,
        expert_bias=True,
        auxiliary_loss_weight=1.0,
        sequence_loss_weight=1.0,
    )
    generator = torch.Generator().manual_seed(3)
    logits_RE = torch.randn(2 * 63, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    bias_E = torch.randn(6, generator=generator, dtype=torch.float64)
    settings = {"score": "sigmoid", "top_k": 2, "normalize": True, "scaling": 1.0}
    shares_RE = logits_RE.sigmoid() / logits_RE.sigmoid().sum(-1, keepdim=True)

    def by_equation(chosen_RE, rows):
        # f_i = E / (K T) times the choices of expert i, P_i the mean share of its score; a row, then the mean of rows.
        f_BE = chosen_RE.view(rows, -1, 6).sum(1) * 6 / (2 * 126 / rows)
        return (f_BE * shares_RE.view(rows, -1, 6).mean(1)).sum(-1).mean()

    found = {}
    for counted, scores_RE in (("scores", logits_RE), ("routed", logits_RE.sigmoid() + bias_E)):
        chosen_RE = torch.zeros_like(scores_RE).scatter(1, scores_RE.detach().topk(2, dim=-1).indices, 1.0)
        routing = route(logits_RE, bias_E, **settings)
        counts = moe.model_copy(update={"balance_counts": counted})
        losses = auxiliary_losses(logits_RE, routing, 2, counts, single_rank_groups())
        for name, rows in (("balance", 1), ("sequence_balance", 2)):
            expected = by_equation(chosen_RE, rows)
            torch.testing.assert_close(losses[name], expected, rtol=1e-12, atol=0)
            gradients = [
                torch.autograd.grad(loss, logits_RE, retain_graph=True)[0] for loss in (losses[name], expected)
            ]
            torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)
            found[counted, name] = gradients[0].flatten()
    for name in ("balance", "sequence_balance"):
        assert torch.cosine_similarity(found["scores", name], found["routed", name], dim=0) < 0.9


def test_bias_changes_who_is_chosen_but_not_the_weight_of_a_choice():
    config = small_config("E", moe=SKEWED.model_copy(update={"normalize_probabilities": False}))
    model = small_model(config)
    tokens_BT = torch.arange(10)[None]
    meta = meta_of(torch.zeros_like(tokens_BT))
    mixer = model.blocks[0].mixer
    mixer.expert_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    output = model(tokens_BT, meta)
    assert output.expert_counts[0].tolist() == [10, 0, 0, 0]
    mixer.expert_bias[0] = 19.0
    assert torch.equal(model(tokens_BT, meta).logits_BTV, output.logits_BTV)


CROWDED = MoeConfig(num_experts=6, top_k=2, expert_hidden_size=4, routed_scaling=2.5, capacity_factor=1.0)


def limited(logits_RE, moe, rows=3):
    routing = route(
        logits_RE, None, score="sigmoid", top_k=moe.top_k, normalize=moe.normalize_probabilities, scaling=2.5
    )
    ids_BT = torch.zeros(rows, len(logits_RE) // rows, dtype=torch.int32)
    return routing, limit_choices(routing, meta_of(ids_BT), moe, single_rank_groups(), torch.tensor(3))


def crowded_logits(tokens=21):
    generator = torch.Generator().manual_seed(2)
    skew = torch.tensor([2.0, 1.5, 0, 0, 0, 0], dtype=torch.float64)
    return (torch.randn(tokens, 6, generator=generator, dtype=torch.float64) + skew).requires_grad_()


def test_earlier_places_of_all_rows_come_before_later_ones():
    routing, chosen = limited(crowded_logits(), CROWDED)
    seen, capacity = [0] * 6, 7  # 21 tokens, 2 choices, 6 experts
    for place in range(7):
        for row in range(3):
            token = 7 * row + place
            for choice in range(2):
                expert = int(routing.expert_ids_RK[token, choice])
                seen[expert] += 1
                kept = expert if seen[expert] <= capacity else 6
                assert int(chosen.expert_ids_RK[token, choice]) == kept
    assert max(seen) > capacity


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("overflow", ["drop", "recycle"])
def test_weights_and_their_gradients_are_those_of_the_experts_that_work(overflow, normalize):
    moe = CROWDED.model_copy(update={"overflow": overflow, "normalize_probabilities": normalize})
    logits_RE = crowded_logits()
    routing, chosen = limited(logits_RE, moe)
    factors_RK = torch.linspace(0.5, 2.0, chosen.weights_RK.numel(), dtype=torch.float64).view_as(chosen.weights_RK)
    (gradient,) = torch.autograd.grad((chosen.weights_RK * factors_RK).sum(), logits_RE)

    again_RE = logits_RE.detach().requires_grad_()
    scores_RE, total = again_RE.sigmoid(), torch.zeros((), dtype=torch.float64)
    for token, (ids, first) in enumerate(zip(chosen.expert_ids_RK.tolist(), routing.expert_ids_RK.tolist())):
        kept = [expert for expert in ids if expert < 6]
        among = kept if overflow == "recycle" else first
        divisor = scores_RE[token, among].sum() if normalize else 1.0
        for choice, expert in enumerate(ids):
            weight = 2.5 * scores_RE[token, expert] / divisor if expert < 6 else 0 * divisor
            assert float(weight) == pytest.approx(float(chosen.weights_RK[token, choice]), rel=1e-12)
            total = total + factors_RK[token, choice] * weight
    (expected,) = torch.autograd.grad(total, again_RE)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    assert (chosen.expert_ids_RK != routing.expert_ids_RK).sum() >= 5


def test_capacity_holds_while_training_alone():
    tokens_BT, _, ids_BT = packed_batch()
    models = [
        small_model(small_config("E", moe=CROWDED.model_copy(update={"capacity_factor": factor})))
        for factor in (0.5, None)
    ]
    training = [model.train()(tokens_BT, meta_of(ids_BT)).logits_BTV for model in models]
    evaluating = [model.eval()(tokens_BT, meta_of(ids_BT)).logits_BTV for model in models]
    assert not torch.equal(*training)
    assert torch.equal(*evaluating)


def test_each_block_draws_its_own_seats_and_the_same_ones_in_every_model_of_a_seed():
    config = small_config("EME", moe=CROWDED.model_copy(update={"overflow": "recycle"}))
    seeds = [
        [int(block.mixer.draw_seed) for block in small_model(config, seed=seed).blocks if block.letter == "E"]
        for seed in (1, 1, 2)
    ]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len(set(seeds[0] + seeds[2])) == 4


def test_groups_that_leave_parts_of_experts_to_nobody_are_refused():
    groups = single_rank_groups()
    groups.expt_tp = StandInGroup(2)
    with pytest.raises(ValueError, match=r"expt_tp group has 2 ranks and the tp group 1; .*give both the same ranks"):
        HybridModel(small_config("E", moe=CROWDED), groups)
