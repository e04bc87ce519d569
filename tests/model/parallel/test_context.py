"""Rows cut over two and four context ranks: the outputs and all gradients of one rank, and how much ranks tell each other."""

import functools

import pytest
import torch
import torch.distributed as dist
from amfm_simulate.count_collectives import CommunicationCounter

from amfm.model.config.moe import MoeConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.context import SegmentExchange, receive_states, receive_windows
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.model.small_models import StandInGroup, cut_batch, loss_of, meta_of, packed_batch, small_config

MOE = MoeConfig(
    num_experts=5,
    top_k=2,
    expert_hidden_size=8,
    auxiliary_loss_weight=0.1,
    sequence_loss_weight=0.1,
    z_loss_weight=0.1,
)
# Four ranks have segments of three tokens, the least that a convolution of width 4 can look back on.
DOCUMENTS = {
    "documents across, at and inside segment borders": (
        (24,),
        (3, 3, 6, 12),
        (1,) * 24,
        (7, 1, 12, 4),
        (2, 1, 20, 1),
        (11, 1, 1, 11),
    ),
    "one document per row": ((24,), (24,)),
}
CONFIGS = {
    "mamba": small_config("MM"),
    "whole": small_config("M*E-M", moe=MOE, logits_z_loss_weight=0.05),
    "tied": small_config("*M", tie_embeddings=True),
}
CASES = [(config, documents) for config in CONFIGS for documents in DOCUMENTS]
CUT, WHOLE = DOCUMENTS
COMPILED = ("whole", CUT)
# Of each number of ranks, in float64; one of them in the number format of most runs, too.
QUICK = {2: [("mamba", WHOLE), ("whole", CUT), ("tied", WHOLE)], 4: [("mamba", CUT)]}
QUICK_FLOAT32 = {2: [("whole", CUT)], 4: []}
# Only the order of sums differs.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5}


def run_model(case, groups, dtype=torch.float64, *, compiled=False):
    """Loss and logits of this rank's part of the rows, and what it adds to each gradient."""
    config, documents = CONFIGS[case[0]], DOCUMENTS[case[1]]
    model = HybridModel(config, groups, seed=3).to(dtype)
    if compiled:
        model.compile_blocks(compiler="aot_eager")
        model.recompute_blocks("M*E-")
    tokens_BT, labels_BT, meta = cut_batch(documents, groups)
    output = model(tokens_BT, meta, labels_BT)
    loss = loss_of(output)
    loss.backward()
    with torch.no_grad():
        logits_BTV = model(tokens_BT, meta).logits_BTV
    gradients = {name: parameter.grad for name, parameter, _ in parameter_shards(model)}
    return {"loss": loss.detach(), "logits": logits_BTV, "counts": output.expert_counts, "gradients": gradients}


def assert_exchange_is_that_of_autograd(groups):
    """Mamba2's one operation asks for windows, states and their gradients itself, on Triton: of the same numbers."""
    _, _, meta = cut_batch(DOCUMENTS[CASES[0][1]], groups)
    segments, generator = meta.segments, torch.Generator().manual_seed(groups.cp.rank())
    exchange, rows = SegmentExchange(segments, groups), 2 * len(meta.document_ids_BT)
    inputs, final, d_windows, d_states = (
        torch.randn(rows, *shape, generator=generator) for shape in ((segments.length, 5), (2, 3, 4), (3, 5), (2, 3, 4))
    )
    factor = torch.rand(rows, 2, generator=generator)
    inputs.requires_grad_(), final.requires_grad_()
    windows = receive_windows(inputs, 3, segments, groups)
    states = receive_states(final.unflatten(0, (-1, 2)), factor.unflatten(0, (-1, 2)), segments, groups).flatten(0, 1)
    d_inputs, d_final = torch.autograd.grad((windows, states), (inputs, final), (d_windows, d_states))
    found, kept = exchange.states(final.detach(), factor)
    assert torch.equal(exchange.windows(inputs.detach(), 3), windows) and torch.equal(found, states)
    assert torch.equal(exchange.windows_back(d_windows), d_inputs[:, segments.length - 3 :])
    assert torch.equal(exchange.states_back(d_states, kept), d_final)


def run_cut(num_ranks, compiled, cases=()):
    """Results of cases, which are pairs of one of CASES and a number format."""
    parallel = initialize_parallel(ParallelConfig(context=num_ranks), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    assert_exchange_is_that_of_autograd(parallel.groups)
    if compiled:
        results = {"compiled": run_model(COMPILED, parallel.groups, compiled=True)}
    else:
        results = {(case, dtype): run_model(case, parallel.groups, dtype) for case, dtype in cases}
    for result in results.values():
        for value in [result["loss"], *result["gradients"].values(), *result["counts"].values()]:
            dist.all_reduce(value, group=parallel.groups.cp)
    return results


def run_and_count(num_ranks, cases):
    return run_cut(num_ranks, False, cases), count_bytes(num_ranks)


@functools.cache
def cut_results(num_ranks, is_slow):
    cases = [(case, torch.float64) for case in CASES if is_slow != (case in QUICK[num_ranks])]
    cases += [(case, torch.float32) for case in CASES if is_slow != (case in QUICK_FLOAT32[num_ranks])]
    return run_ranks(run_and_count, num_ranks, cases, num_ranks=num_ranks)


def cases_of(quick):
    """Each case for either number of ranks; those that are not quick are slow."""
    return pytest.mark.parametrize(
        ("num_ranks", "case"),
        [
            pytest.param(
                num_ranks,
                case,
                id=f"{num_ranks}-{'-'.join(case)}",
                marks=[pytest.mark.slow] * (case not in quick[num_ranks]),
            )
            for num_ranks in quick
            for case in CASES
        ],
    )


@functools.cache
def alone(case):
    return run_model(case, single_rank_groups())


def assert_cut_is_whole(num_ranks, case, dtype, quick):
    ranks = cut_results(num_ranks, case not in quick[num_ranks])
    assert_same(case, [results[case, dtype] for results, _ in ranks], TOLERANCES[dtype])


@cases_of(QUICK)
def test_context_ranks_compute_what_one_does(num_ranks, case):
    assert_cut_is_whole(num_ranks, case, torch.float64, QUICK)


@cases_of(QUICK_FLOAT32)
def test_context_ranks_compute_in_float32_what_one_does_in_float64(num_ranks, case):
    assert_cut_is_whole(num_ranks, case, torch.float32, QUICK_FLOAT32)


@pytest.mark.slow
def test_compiled_and_recomputed_blocks_exchange_alike():
    ranks = [results["compiled"] for results in run_ranks(run_cut, 2, True, num_ranks=2)]
    assert_same(COMPILED, ranks, TOLERANCES[torch.float64])


def assert_same(case, ranks, tolerance):
    wanted = alone(case)
    ids_BT = packed_batch(DOCUMENTS[case[1]])[2]
    num_ranks = len(ranks)
    for rank, got in enumerate(ranks):
        segments = meta_of(ids_BT).cut(rank, num_ranks).segments
        assert abs(float(got["loss"] - wanted["loss"])) <= tolerance * float(wanted["loss"])
        logits_BTV = segments.take(wanted["logits"])
        assert (got["logits"] - logits_BTV).norm() <= tolerance * logits_BTV.norm()
        assert all(torch.equal(got["counts"][block], counts) for block, counts in wanted["counts"].items())
        assert got["gradients"].keys() == wanted["gradients"].keys()
        for name, gradient in wanted["gradients"].items():
            error = float((got["gradients"][name] - gradient).norm())
            assert error <= tolerance * float(gradient.norm()), f"{name} is off by {error}"


def test_ranks_share_the_keys_evenly_and_every_token_once():
    ids_BT = torch.zeros(1, 48, dtype=torch.int32)
    for num_ranks in (2, 3, 4):
        parts = [meta_of(ids_BT).cut(rank, num_ranks) for rank in range(num_ranks)]
        positions = [part.positions_BT[0].tolist() for part in parts]
        assert sorted(place for own in positions for place in own) == list(range(48))
        assert len({sum(place + 1 for place in own) for own in positions}) == 1


def test_segments_know_which_go_on_and_what_a_convolution_may_see():
    ids_BT = packed_batch(((5, 3, 1, 7), (4, 4, 8)))[2]
    meta = meta_of(ids_BT).cut(0, 2)
    assert meta.segments.own == (0, 3)
    assert meta.segments.continues_BZ.tolist() == [[False, True, False, True], [False, False, False, True]]
    assert meta.segments.window_mask(3).tolist() == [
        [[False] * 3, [True] * 3],
        [[False] * 3, [True] * 3],
    ]
    assert meta_of(ids_BT).cut(1, 2).segments.window_mask(3)[0].tolist() == [
        [True] * 3,
        [False] * 3,
    ]
    for layout in (meta_of(ids_BT).cut(1, 2), meta_of(ids_BT).cut(1, 2).find_bounds()):
        assert layout.document_starts_BT().tolist() == [[0, 1, 1, 1, 0, 1, 1, 1], [0] * 8]
    assert meta.document_ids_BT[0].tolist() == [0, 0, 0, 0, 3, 3, 3, 3]
    assert meta.positions_BT[0].tolist() == [0, 1, 2, 3, 3, 4, 5, 6]


def test_rows_that_cannot_be_cut_are_refused():
    meta = meta_of(packed_batch(((22,),))[2])
    with pytest.raises(
        ValueError, match="sequences of 22 tokens cannot be cut into 2 x 2 equal segments; use a multiple of 4"
    ):
        meta.cut(0, 2)
    model = HybridModel(small_config("M"), single_rank_groups())
    with pytest.raises(ValueError, match=r"cut for 11 context rank\(s\) and the model's cp group has 1"):
        model(torch.zeros(1, 2, dtype=torch.int64), meta.cut(0, 11))
    groups = single_rank_groups()
    groups.cp = StandInGroup(11)
    with pytest.raises(
        ValueError, match=r"segments of 1 tokens are shorter than the 3 before each .*; use longer sequences"
    ):
        HybridModel(small_config("M"), groups)(torch.zeros(1, 2, dtype=torch.int64), meta.cut(0, 11))


LENGTHS = (24, 48)


def count_bytes(num_ranks):
    """Bytes that this rank sends for a Mamba2 block and for an attention block, forward and backward, by sequence length."""
    parallel = initialize_parallel(ParallelConfig(context=num_ranks), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    groups, sent = parallel.groups, {}
    for pattern in "M*":
        model = HybridModel(small_config(pattern), groups, seed=3)
        for length in LENGTHS:
            meta = PackMeta.one_document_a_row(2, length).cut(groups.cp.rank(), num_ranks)
            x_BTD = torch.randn(2, length // num_ranks, model.config.hidden_size, requires_grad=True)
            with CommunicationCounter(groups) as counter:
                model.blocks[0](x_BTD, None, meta)[1].y_BTD.sum().backward()
            sent[pattern, length] = {row.collective: (row.calls, row.sent_bytes) for row in counter.traffic()}
    return sent


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_row_of_any_length_costs_a_mamba_block_the_same_bytes(num_ranks):
    ranks = [counts for _, counts in cut_results(num_ranks, False)]
    mamba, attention = small_config("M").mamba, small_config("*").attention
    for length in LENGTHS:
        # Once forward and once backward: the states of all segments, and the inputs before them.
        assert {name: row[0] for name, row in ranks[0]["M", length].items()} == {"all_gather": 2, "all_to_all": 2}
        total = sum(row[1] for sent in ranks for row in sent["M", length].values())
        # Of two segments per rank and sequence, states with their gradients, and decays, in float32.
        handed = 2 * 2 * mamba.num_heads * (2 * mamba.head_dim * mamba.state_size + 1) * 4
        # Neighbours are c - 1 pairs, either way, forward and backward.
        channels = mamba.inner_size() + 2 * mamba.num_groups * mamba.state_size
        windows = 4 * (num_ranks - 1) * 2 * (mamba.conv_kernel - 1) * channels * 4
        assert total == num_ranks * (num_ranks - 1) * handed + windows
        keys = 2 * 2 * length * attention.num_kv_heads * attention.head_dim * 4
        sent = sum(row[1] for sent in ranks for row in sent["*", length].values())
        assert sent == 2 * keys * (num_ranks - 1)


def test_nothing_is_asked_of_neighbours_where_nothing_is_read():
    segments = meta_of(torch.zeros(1, 24, dtype=torch.int32)).cut(0, 2).segments
    assert receive_windows(torch.ones(2, 6, 3), 0, segments, single_rank_groups()).shape == (2, 0, 3)
    with pytest.raises(ValueError, match="segments of 6 tokens are shorter than the 7 before each"):
        receive_windows(torch.ones(2, 6, 3), 7, segments, single_rank_groups())
