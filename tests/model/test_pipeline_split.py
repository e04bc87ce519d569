import itertools
import random

import pytest
import torch
import torch.distributed as dist

from amfm.model.flops import flops_per_token
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.pipeline_split import (
    Piece,
    balanced_edges,
    cut_pieces,
    edges_by_rank,
    piece_costs,
    pieces_of_rank,
    sums_of_ranks,
)
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.gradients import find_partial_gradients, sum_partial_gradients
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.numbers import assert_near, relative_rms
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.model.small_models import MOE, loss_of, meta_of, packed_batch, small_config, small_model

FLOAT64 = 1e-12  # the same operations in the same order, apart from where the residual is added
BALANCED = MOE.model_copy(update={"auxiliary_loss_weight": 0.1, "z_loss_weight": 0.01})


def largest_and_squares(costs, edges):
    sums = [sum(costs[start:stop]) for start, stop in itertools.pairwise(edges)]
    return max(sums), sum(value**2 for value in sums)


def test_balanced_edges_are_the_best_of_all_cuts():
    generator = random.Random(0)
    for length, num_pieces in itertools.product(range(1, 9), range(1, 6)):
        if num_pieces > length:
            continue
        costs = [float(generator.randint(0, 9)) for _ in range(length)]
        cuts = itertools.combinations(range(1, length), num_pieces - 1)
        best = min(largest_and_squares(costs, (0, *inner, length)) for inner in cuts)
        edges = balanced_edges(costs, num_pieces)
        assert edges[0] == 0 and edges[-1] == length and all(a < b for a, b in itertools.pairwise(edges))
        assert largest_and_squares(costs, edges) == best


def test_costs_are_the_operations_of_the_whole_model_with_the_head_last():
    config = small_config("MM*E-")
    assert sum(piece_costs(config, 64)) == pytest.approx(sum(flops_per_token(config, 64).values()), rel=1e-12)
    without_head = piece_costs(small_config("MM*E-", vocab_size=1), 64)
    assert piece_costs(config, 64)[:4] == without_head[:4]
    assert piece_costs(config, 64)[4] - without_head[4] == pytest.approx(6 * 39 * 12, rel=1e-9)


def test_a_large_head_takes_blocks_away_from_the_last_piece():
    assert [piece.blocks for piece in cut_pieces(small_config("MMMM", vocab_size=2), 2, 64)] == [range(2), range(2, 4)]
    heavy = cut_pieces(small_config("MMMM", vocab_size=10_000), 2, 64)
    assert heavy == (Piece(0, 3, True, False), Piece(3, 4, False, True))


def test_bars_decide_the_cuts():
    pieces = cut_pieces(small_config("M|*E-|M"), 3, 64)
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 1), (1, 4), (4, 5)]
    assert [(piece.is_first, piece.is_last) for piece in pieces] == [(True, False), (False, False), (False, True)]
    assert cut_pieces(small_config("M|*E-|M"), 1, 64) == (Piece(0, 5, is_first=True, is_last=True),)


def test_every_second_piece_is_a_ranks_own():
    pieces = cut_pieces(small_config("MMMMMM"), 6, 64)
    assert [piece.start for piece in pieces_of_rank(pieces, 1, 2)] == [1, 3, 5]


@pytest.mark.parametrize(("num_pieces", "num_ranks"), [(3, 3), (4, 2), (6, 2)])
def test_edges_are_the_best_of_all_where_few_blocks_are_cut(num_pieces, num_ranks):
    costs = [3.0, 1.0, 2.5, 0.5, 4.0, 1.5, 2.0, 5.0]
    found = edges_by_rank(costs, num_ranks, [balanced_edges(costs, num_pieces)])
    every = [(0, *inner, len(costs)) for inner in itertools.combinations(range(1, len(costs)), num_pieces - 1)]
    assert sums_of_ranks(costs, found, num_ranks)[0] == min(
        sums_of_ranks(costs, edges, num_ranks)[0] for edges in every
    )


def test_other_pieces_of_the_last_rank_make_up_for_the_head():
    costs = piece_costs(small_config("M" * 12, vocab_size=400), 64)
    largest = []
    for balance in ("ranks", "chunks"):
        pieces = cut_pieces(small_config("M" * 12, vocab_size=400), 8, 64, balance, 2)
        largest.append(sums_of_ranks(costs, (0, *(piece.stop for piece in pieces)), 2)[0] / costs[0])
    assert largest == pytest.approx([7.86, 8.86], abs=0.01)


def test_wrong_numbers_of_pieces_are_refused():
    with pytest.raises(ValueError, match=r"has 1 '\|' and so 2 parts.*= 4 are needed; put 3 '\|', or none"):
        cut_pieces(small_config("MM|MM"), 4, 64)
    with pytest.raises(ValueError, match=r"= 5 pieces need a block each, and model.pattern has 4; use at most 4"):
        cut_pieces(small_config("MMMM"), 5, 64)


def output_of(parts, seed=0):
    tokens_BT, labels_BT, ids_BT = packed_batch(seed=seed)
    stream = parts[0].embed(tokens_BT)
    for part in parts:
        stream = part.pass_blocks(stream, part.blocks.indices(), meta_of(ids_BT))
    return parts[-1].finish(stream, labels_BT)


@pytest.mark.parametrize("tied", [False, True])
def test_pieces_after_one_another_are_the_whole_model(tied):
    config = small_config("ME*-M", moe=BALANCED, tie_embeddings=tied)
    tokens_BT, labels_BT, ids_BT = packed_batch()
    whole = small_model(config)
    pieces = cut_pieces(config, 3, tokens_BT.shape[1])
    parts = [HybridModel(config, single_rank_groups(), seed=1, pieces=[piece]).double() for piece in pieces]
    for part in parts:
        own = {name: whole.state_dict()[name] for name in part.state_dict()}
        part.load_state_dict(own)

    output, expected = output_of(parts), whole(tokens_BT, meta_of(ids_BT), labels_BT)
    assert_near(output.loss.total, expected.loss.total, FLOAT64)
    assert output.expert_counts.keys() == expected.expert_counts.keys() == {1}
    loss_of(output).backward()
    loss_of(expected).backward()
    gradients = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    assert gradients.keys() == {name for name, _ in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        assert_near(gradients[name], parameter.grad, FLOAT64)


TIED = small_config("M|*", tie_embeddings=True)


def sum_tied_gradients():
    """What a stage has of the tied embedding's gradient before and after the sum, over all data ranks."""
    groups = initialize_parallel(ParallelConfig(pipeline=2), timeout_seconds=PATIENCE_SECONDS, num_threads=1).groups
    # Every rank computes both stages, and continues with its own.
    parts = [HybridModel(TIED, groups, seed=3, pieces=[piece]).double() for piece in cut_pieces(TIED, 2, 23)]
    loss_of(output_of(parts, seed=groups.dp.rank())).backward()
    own = parts[groups.pp.rank()]
    part = own.embedding.weight.grad.clone()
    sum_partial_gradients(find_partial_gradients(own, groups), groups)
    for gradient in (part, own.embedding.weight.grad):
        dist.all_reduce(gradient, group=groups.dp_cp)
    return part, own.embedding.weight.grad


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_both_ends_of_a_pipeline_get_the_whole_gradient_of_a_tied_embedding(num_ranks):
    model = HybridModel(TIED, single_rank_groups(), seed=3).double()
    for seed in range(num_ranks // 2):
        loss_of(output_of([model], seed)).backward()
    expected = model.embedding.weight.grad
    for part, whole in run_ranks(sum_tied_gradients, num_ranks=num_ranks):
        assert_near(whole, expected, FLOAT64)
        assert relative_rms(part, expected) > 0.01


def test_a_piece_holds_its_own_parameters_under_global_names_and_equal_first_values():
    config = small_config("ME|*-", tie_embeddings=True)
    whole = HybridModel(config, single_rank_groups(), seed=3)
    first, last = (
        HybridModel(config, single_rank_groups(), seed=3, pieces=[piece]) for piece in cut_pieces(config, 2, 64)
    )
    assert first.copied_parameters == whole.copied_parameters == frozenset()
    assert last.copied_parameters == {"embedding.weight"}
    names = [set(dict(model.named_parameters())) for model in (first, last, whole)]
    assert names[0] & names[1] == last.copied_parameters
    assert names[0] | names[1] == names[2]
    assert {name.split(".")[1] for name in names[1] if name.startswith("blocks")} == {"2", "3"}
    for model in (first, last):
        for name, value in model.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), name


def test_balancing_moves_only_the_blocks_that_are_here():
    config = small_config("EE")
    part = HybridModel(config, single_rank_groups(), pieces=[cut_pieces(config, 2, 64)[1]])
    counts_E = torch.tensor([4, 0, 0, 0, 1])
    part.update_expert_bias({0: counts_E, 1: counts_E})
    assert part.blocks.indices() == [1]
    assert part.blocks[1].mixer.expert_bias.tolist() == pytest.approx([-1.4e-3, 6e-4, 6e-4, 6e-4, -4e-4])
