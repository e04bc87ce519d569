"""Experts spread over ranks: losses, loads and gradients of one rank, whatever the router does, at any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from amfm_simulate.count_collectives import CommunicationCounter, Traffic
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.kernels.linear.op import linear_float32
from amfm.kernels.moe.capacity import expert_capacity
from amfm.kernels.moe.op import route
from amfm.model.config.core_options import Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.moe.block import MoeMixer
from amfm.model.moe.capacity import slots_for
from amfm.model.moe.transfer import RowTransfer
from amfm.model.parallel.groups import ProcessGroupCollection, RowCapacity, single_rank_groups
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.gradients import find_partial_gradients, sum_partial_gradients
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.shards import join_parts, sum_traffic
from tests.helpers.spawn import run_ranks
from tests.model.small_models import cut_batch, loss_of, small_config

NUM_BATCHES = 4
DOCUMENTS = ((7, 1, 12, 4), (24,))
BASE = MoeConfig(
    num_experts=8,
    top_k=3,
    expert_hidden_size=4,
    shared_expert_hidden_size=12,
    activation="swiglu",
    expert_bias=True,
    auxiliary_loss_weight=0.1,
    sequence_loss_weight=0.2,
    z_loss_weight=0.1,
)


def config_of(**changes: object) -> ModelConfig:
    return small_config(
        "ME",
        moe=BASE.model_copy(update=changes),
        mamba=Mamba2Config(num_heads=4, head_dim=4, state_size=5, num_groups=2, chunk_size=8),
    )


CONFIGS = {
    "dropless": config_of(),
    "latent": config_of(latent_size=6, activation="squared_relu", shared_expert_hidden_size=0),
    "drop": config_of(capacity_factor=1.0),
    "recycle": config_of(capacity_factor=1.0, overflow="recycle"),
    "roomy": config_of(capacity_factor=2.0),  # nothing is over it
    "one each": config_of(num_experts=4, top_k=2),  # of four ranks each has one expert
}


@dataclass(frozen=True)
class Layout:
    """A layout of four ranks, which configs run on it in `make test` and which in `make test-slow`, and which experts no
    one may choose.
    """

    section: ParallelConfig
    quick: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    shunned: tuple[int, ...] = ()


# Those with groups of the same sizes next to each other, and last that of `QUICK_ROOMY`: groups are made once for them.
# Quick: each axis, and experts that tensor ranks cut, once.
LAYOUTS = {
    "ep2": Layout(ParallelConfig(expert=2), ("dropless", "recycle", "roomy"), ("latent", "drop"), shunned=(1,)),
    "ep2, halves": Layout(
        ParallelConfig(expert=2, overlap_experts=True), ("dropless",), ("drop", "recycle"), shunned=(1,)
    ),
    "tp2 ep2": Layout(ParallelConfig(tensor=2, expert=2), slow=("latent", "dropless", "drop")),
    "tp2 sp ep4": Layout(
        ParallelConfig(tensor=2, sequence_parallel=True, expert=4), slow=("recycle", "dropless", "latent")
    ),
    "ep2 etp2": Layout(ParallelConfig(expert=2, expert_tensor=2), slow=("drop", "dropless")),
    "tp2 sp ep2 etp2": Layout(ParallelConfig(tensor=2, sequence_parallel=True, expert=2, expert_tensor=2), ("latent",)),
    "tp2 sp ep2 etp2, halves": Layout(
        ParallelConfig(tensor=2, sequence_parallel=True, expert=2, expert_tensor=2, overlap_experts=True),
        slow=("latent",),
    ),
    "cp2 ep2": Layout(ParallelConfig(context=2, expert=2), ("drop",), ("dropless", "recycle")),
    "tp2 cp2 sp ep4": Layout(
        ParallelConfig(tensor=2, context=2, sequence_parallel=True, expert=4), slow=("dropless", "recycle")
    ),
    "ep4, a rank gets nothing": Layout(ParallelConfig(expert=4), ("dropless", "one each"), ("latent",), shunned=(2, 3)),
}


@dataclass
class Outcome:
    """Sums over the micro-batches, and gradients joined over ranks, by name."""

    loss: torch.Tensor
    auxiliary: dict[str, torch.Tensor]
    counts: dict[int, torch.Tensor]
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def moe_mixers(model: HybridModel) -> list[MoeMixer]:
    return [block.mixer for _, block in model.all_blocks() if isinstance(block.mixer, MoeMixer)]


def run_batches(config: ModelConfig, layout: Layout, groups: ProcessGroupCollection) -> Outcome:
    """Forward and backward of this rank's share of four micro-batches; nothing is reduced yet but partial gradients."""
    model = HybridModel(config, groups, seed=3).double()
    for mixer in moe_mixers(model):
        mixer.expert_bias[list(layout.shunned)] = -100.0
    outcome = Outcome(torch.zeros((), dtype=torch.float64), {}, {})
    for number in range(groups.dp.rank(), NUM_BATCHES, groups.dp.size()):
        tokens_BT, labels_BT, meta = cut_batch(DOCUMENTS, groups, seed=number)
        output = model(tokens_BT, meta, labels_BT)
        loss = loss_of(output)
        loss.backward()
        outcome.loss += loss.detach()
        for name, value in output.auxiliary.items():
            outcome.auxiliary[name] = outcome.auxiliary.get(name, 0) + value.detach()
        for block, counts_E in output.expert_counts.items():
            outcome.counts[block] = outcome.counts.get(block, 0) + counts_E
    sum_partial_gradients(find_partial_gradients(model, groups), groups)
    outcome.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if isinstance(groups.dp_cp, dist.ProcessGroup):
        reduce_outcome(outcome, model, groups)
    return outcome


def reduce_outcome(outcome: Outcome, model: HybridModel, groups: ProcessGroupCollection) -> None:
    """What the step and the engine do: sums over the ranks that had other tokens, joins over those that have other parts."""
    for value in (outcome.loss, *outcome.auxiliary.values(), *outcome.counts.values()):
        dist.all_reduce(value, group=groups.dp_cp)
    for name, _, shard in parameter_shards(model):
        gradient = outcome.gradients[name].contiguous()
        dist.all_reduce(gradient, group=groups.expt_dp if shard.per_expert else groups.dp_cp)
        outcome.gradients[name] = join_parts(gradient, shard, groups)


@cache
def alone(config: str, shunned: tuple[int, ...]) -> Outcome:
    """What one rank computes."""
    return run_batches(CONFIGS[config], Layout(ParallelConfig(), shunned=shunned), single_rank_groups())


def run_layouts(is_slow: bool) -> dict[tuple[str, str], Outcome]:
    results = {}
    for name, layout in LAYOUTS.items():
        configs = layout.slow if is_slow else layout.quick
        if configs:
            parallel = initialize_parallel(layout.section, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
        for config in configs:
            results[name, config] = run_batches(CONFIGS[config], layout, parallel.groups)
    return results


def call_each(functions: list[Callable[[], Any]]) -> list[Any]:
    return [function() for function in functions]


@cache
def four_in_turn(is_slow: bool) -> list[list[Any]]:
    """What each of four ranks found in layouts, and of rows with room, one after the other in one set of processes."""
    return run_ranks(call_each, [partial(run_layouts, is_slow), partial(compare_room, is_slow)], num_ranks=4)


@pytest.fixture(scope="module")
def two_in_turn() -> list[list[Any]]:
    """Of each of two ranks: bytes that are sent, the order of events, and rows that are sent."""
    return run_ranks(call_each, [count_bytes, order_of_events, transfer_rows], num_ranks=2)


def assert_as_one_rank(name: str, config: str, four: list[list[Any]]) -> None:
    expected = alone(config, LAYOUTS[name].shunned)
    for ranks, _ in four:
        actual = ranks[name, config]
        # float64: only the order of sums differs.
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(actual.auxiliary, expected.auxiliary, rtol=1e-10, atol=0)
        torch.testing.assert_close(actual.counts, expected.counts, rtol=0, atol=0)
        assert actual.gradients.keys() == expected.gradients.keys()
        for key, gradient in expected.gradients.items():
            torch.testing.assert_close(
                actual.gradients[key], gradient, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
            )
    for expert in LAYOUTS[name].shunned:
        assert all(counts_E[expert] == 0 for counts_E in expected.counts.values())
        # Who has room is given what others cannot take, wanted or not.
        is_used = config == "recycle"
        assert bool(expected.gradients["blocks.1.mixer.experts.up"][expert].any()) == is_used


@pytest.mark.parametrize(("name", "config"), [(name, config) for name in LAYOUTS for config in LAYOUTS[name].quick])
def test_ranks_compute_what_one_does(name: str, config: str) -> None:
    assert_as_one_rank(name, config, four_in_turn(False))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), [(name, config) for name in LAYOUTS for config in LAYOUTS[name].slow])
def test_ranks_compute_what_one_does_in_further_layouts(name: str, config: str) -> None:
    assert_as_one_rank(name, config, four_in_turn(True))


def test_slots_compute_what_counted_rows_do_where_nothing_is_dropped() -> None:
    capacity = expert_capacity(48, BASE.top_k, BASE.num_experts, 2.0)
    assert slots_for(48, BASE.top_k, BASE.num_experts, capacity) == capacity == 36
    for ranks, _ in four_in_turn(False):
        static, counted = ranks["ep2", "roomy"], ranks["ep2", "dropless"]
        torch.testing.assert_close(static.loss, counted.loss, rtol=1e-12, atol=0)
        for name, gradient in counted.gradients.items():
            torch.testing.assert_close(static.gradients[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_slots_are_not_made_where_most_would_stay_empty() -> None:
    assert slots_for(24, 3, 8, 18) == 18  # two ranks share the tokens
    assert slots_for(12, 3, 8, 18) is None
    assert slots_for(0, 3, 8, 18) is None


def count_bytes() -> dict[str, list[Traffic]]:
    """What two ranks send each other in a forward and backward pass of one block of experts, plain and at half the width."""
    parallel = initialize_parallel(ParallelConfig(expert=2), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    counted = {}
    for name, latent_size in (("plain", None), ("latent", 6)):
        moe = BASE.model_copy(
            update={"latent_size": latent_size, "auxiliary_loss_weight": 0.0, "sequence_loss_weight": 0.0}
        )
        model = HybridModel(small_config("E", moe=moe), parallel.groups, seed=3).double()
        tokens_BT, labels_BT, meta = cut_batch(DOCUMENTS, parallel.groups, seed=parallel.rank)
        goes: list[int] = []
        (mixer,) = moe_mixers(model)
        mixer.register_forward_pre_hook(
            lambda _, given, mixer=mixer, goes=goes: goes.append(count_ranks(mixer, given[0]))
        )
        with CommunicationCounter(parallel.groups) as counter:
            loss_of(model(tokens_BT, meta, labels_BT)).backward()
        counted[name] = counter.traffic(), goes[0]
    return counted


@torch.no_grad()
def count_ranks(mixer: MoeMixer, x_BTD: torch.Tensor) -> int:
    """Pairs of a token and a rank of the two that holds an expert of its choice, token by token."""
    moe = mixer.section
    routing = route(
        linear_float32(x_BTD, mixer.router.weight).flatten(0, 1),
        mixer.expert_bias,
        score=moe.router,
        top_k=moe.top_k,
        normalize=moe.normalize_probabilities,
        scaling=moe.routed_scaling,
    )
    return sum(len({expert // 4 for expert in experts}) for experts in routing.expert_ids_RK.tolist())


def test_a_row_goes_once_to_each_rank_of_a_token_and_bytes_shrink_exactly_with_the_width(
    two_in_turn: list[list[Any]],
) -> None:
    ranks = [found[0] for found in two_in_turn]
    for name, width in (("plain", 12), ("latent", 6)):
        rows, counts = sum_traffic([counted[name][0] for counted in ranks])
        sent = sum(counted[name][1] for counted in ranks)
        assert sent < 2 * 2 * 24 * BASE.top_k  # ranks x rows x tokens
        assert (rows.axis, rows.collective, rows.dtype) == ("ep", "all_to_all", "float64")
        # Rows there and back, forward and backward, with weights and ids there and their gradients back; and how many rows
        # and choices there are for either rank, once.
        assert (rows.calls, rows.handed_bytes) == (2 * 6, 8 * sent * (4 * width + 2 * 2 * BASE.top_k))
        assert counts == Traffic("ep", "all_to_all", "int64", 2, 2 * 4 * 8, 2 * 2 * 8)


ROOMY = {
    "whole": ParallelConfig(expert=2, expert_tensor=2),
    "halves": ParallelConfig(expert=4, overlap_experts=True),
    "tokens of tensor ranks": ParallelConfig(tensor=2, sequence_parallel=True, expert=2),
}
QUICK_ROOMY = "halves"


def compare_room(is_slow: bool) -> list[tuple[str, bool, int, int, list[str]]]:
    """Of counted rows and rows with room, as much as an even router's half more or any router's: what differs, and misses."""
    found = []
    for name, section in ROOMY.items():
        if is_slow == (name == QUICK_ROOMY):
            continue
        parallel = initialize_parallel(section, timeout_seconds=PATIENCE_SECONDS, num_threads=1)
        layout = Layout(section, shunned=(2, 3))  # a rank of four gets nothing
        counted = run_batches(CONFIGS["dropless"], layout, parallel.groups)
        for shares in (1.0, 100.0):
            capacity = parallel.groups.row_capacity = RowCapacity(shares, parallel.device)
            with capacity.opened():
                own = run_batches(CONFIGS["dropless"], layout, parallel.groups)
                used = int(capacity.missed)
            capacity.count_missed(1)
            with capacity.opened():
                run_batches(CONFIGS["dropless"], layout, parallel.groups)
                told = int(capacity.missed)
            differing = [key for key, value in counted.gradients.items() if not torch.equal(own.gradients[key], value)]
            differing += ["loss"] * (not torch.equal(own.loss, counted.loss))
            found.append((name, shares > 1, used, told, differing))
    return found


@pytest.mark.parametrize("is_slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["halves", "others"])
def test_rows_with_room_are_those_that_are_counted_to_the_bit_and_what_has_no_room_is_noted(is_slow: bool) -> None:
    ranks = [found[1] for found in four_in_turn(is_slow)]
    for number, (name, is_enough, *_) in enumerate(ranks[0]):
        used, told = (sum(found[number][place] for found in ranks) for place in (2, 3))
        # What rows with room miss is known before the host counts: where they will, a step begins again.
        assert (used == 0) == (told == 0) == is_enough, (name, used, told)
        assert all(not found[number][4] for found in ranks) or not is_enough, (name, ranks[0][number][4])


def order_of_events() -> list[str]:
    """Collectives over expert ranks, and products of experts, of a forward and backward pass in halves."""
    parallel = initialize_parallel(
        ParallelConfig(expert=2, overlap_experts=True), timeout_seconds=PATIENCE_SECONDS, num_threads=1
    )
    moe = BASE.model_copy(update={"auxiliary_loss_weight": 0.0, "sequence_loss_weight": 0.0})
    model = HybridModel(small_config("E", moe=moe), parallel.groups, seed=3)
    tokens_BT, labels_BT, meta = cut_batch(DOCUMENTS, parallel.groups, seed=parallel.rank)
    with ExpertEvents() as events:
        loss_of(model(tokens_BT, meta, labels_BT)).backward()
    return events.found


class ExpertEvents(TorchDispatchMode):
    """What is started, in order: `rows` an all-to-all of rows, `experts` a feed-forward of routed experts or its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname == "alltoall_base_" and args[1].shape[1:] == (12,):
            self.found.append("rows")
        elif func._opname.startswith("expert_feed_forward_torch"):
            self.found.append("experts")
        return func(*args, **(kwargs or {}))


def test_half_of_the_rows_travel_while_experts_compute_the_other_half(two_in_turn: list[list[Any]]) -> None:
    for _, found, _ in two_in_turn:
        forward = ["rows", "rows", "experts", "rows", "experts", "rows"]
        assert found == 2 * forward, found


def transfer_rows() -> tuple[list[bool], torch.Tensor, torch.Tensor]:
    """Rank 0 sends one row of three to rank 1, which keeps its two."""
    parallel = initialize_parallel(ParallelConfig(expert=2), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    sent, received = (([2, 1], [2, 0]), ([0, 2], [1, 2]))[parallel.rank]
    transfer = RowTransfer(parallel.groups.ep, sent, received)
    rows_SD = (torch.arange(6.0).view(-1, 2)[: sum(sent)] + 10 * parallel.rank).requires_grad_()
    arriving_SD = transfer.start(rows_SD)
    states = [transfer.in_transit is not None]
    arrived_SD = transfer.finish(arriving_SD)
    states.append(transfer.in_transit is not None)
    (arrived_SD * (parallel.rank + 1)).sum().backward()
    states.append(transfer.in_transit is not None)
    return states, arrived_SD.detach(), rows_SD.grad


def test_rows_travel_while_other_work_is_done_and_gradients_travel_back(two_in_turn: list[list[Any]]) -> None:
    (states, first, first_grad), (other_states, second, second_grad) = (found[2] for found in two_in_turn)
    assert states == other_states == [True, False, False]
    assert first.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert second.tolist() == [[4.0, 5.0], [10.0, 11.0], [12.0, 13.0]]
    assert first_grad.tolist() == [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]
    assert second_grad.tolist() == [[2.0, 2.0], [2.0, 2.0]]
