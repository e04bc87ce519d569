"""Reductions start inside the last backward pass, gathers end inside the next forward pass, and nothing else changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.config.schema import OptimizerConfig, ParallelConfig
from amfm.pretrain.engine.buckets import Bucket
from amfm.pretrain.engine.engine import ZeroEngine, build_engine
from amfm.pretrain.engine.optimizer import group_parameters, part_of
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL

ROWS, TOKENS, PASSES, STEPS = 2, 24, 3, 2
STAGES = (1, 2)
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Trained:
    """Losses of this rank's micro-batches, the weights after the last step, what happened when, and bytes held."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    events: list[str]
    num_buckets: int


def build(
    zero_stage: int, bucket_elements: int, events: list[str], *, in_products: bool = True, clip: float | None = 1.0
) -> ZeroEngine:
    parallel = initialize_parallel(ParallelConfig(), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    model = HybridModel(ModelConfig.model_validate(MODEL), parallel.groups)
    engine = build_engine(
        model,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, epsilon=1e-3, clip_grad_norm=clip),
        precision="float32",
        zero_stage=zero_stage,
        parallel=parallel,
        bucket_elements=bucket_elements,
        sums_in_products=in_products,
        record=lambda event, bucket: events.append(f"{event} {bucket}"),
    )
    first = model.blocks[0].norm.weight
    first.register_hook(lambda gradient: events.append("gradient of blocks.0"))
    wait = model.before_use
    model.before_use = lambda part: (wait(part), events.append(f"use {part}"))[0]
    return engine


def train(zero_stage: int, bucket_elements: int = 1, *, in_products: bool = True, keeps: bool = False) -> Trained:
    """Steps on tokens of which data rank r of n takes every n-th micro-batch; `keeps`: with sums at one address."""
    events: list[str] = []
    engine = build(zero_stage, bucket_elements, events, in_products=in_products)
    if keeps:
        assert engine.buckets is not None
        engine.buckets.keep_sums()
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    tokens = torch.randint(0, MODEL["vocab_size"], (STEPS, 2 * PASSES, ROWS, TOKENS), generator=torch.manual_seed(0))
    meta = PackMeta.one_document_a_row(ROWS, TOKENS)
    losses = []
    for step in range(STEPS):
        batches = tokens[step, rank::ranks]
        with engine.accumulate(len(batches)):
            for number, rows in enumerate(batches):
                output = engine.forward(rows, meta, rows)
                losses.append(float(output.loss.nll_sum))
                events.append(f"backward {number}")
                engine.backward(output.loss.total / tokens[step].numel())
                events.append(f"end {number}")
        assert engine.step(LEARNING_RATE).applied
        events.append("step")
    engine.wait_for_weights()
    weights = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    return Trained(losses, weights, events, len(engine.adamw.param_groups))


class Pair(NamedTuple):
    """What a rank of two ended with, which do all of this in one process each."""

    stages: list[Trained]
    kept: Trained
    two_buckets: list[str]
    announced: list[list[dict[str, torch.Tensor]]]


def train_as_two() -> Pair:
    return Pair(
        [train(stage) for stage in STAGES],
        train(1, keeps=True),
        train(2, 1 << 30).events,
        [close_with_less_than_announced(stage) for stage in STAGES],
    )


def train_alone() -> list[list[Trained]]:
    """In products, and by hooks."""
    return [[train(stage, in_products=in_products) for stage in STAGES] for in_products in (True, False)]


@pytest.fixture(scope="module")
def pair() -> list[Pair]:
    return run_ranks(train_as_two, num_ranks=2)


@pytest.fixture(scope="module")
def two_ranks(pair: list[Pair]) -> list[list[Trained]]:
    return [rank.stages for rank in pair]


@pytest.fixture(scope="module")
def alone() -> list[list[Trained]]:
    return run_ranks(train_alone, num_ranks=1)[0]


def test_buckets_train_as_one_rank(two_ranks: list[list[Trained]], alone: list[list[Trained]]) -> None:
    for own, other, whole in zip(*two_ranks, alone[0], strict=True):
        both = [loss for pair in zip(own.losses, other.losses) for loss in pair]
        assert both == pytest.approx(whole.losses, rel=1e-5)
        for name, weight in whole.weights.items():
            torch.testing.assert_close(own.weights[name], weight, rtol=0, atol=1e-6, msg=name)
            assert torch.equal(own.weights[name], other.weights[name]), name


def test_reductions_start_before_the_last_backward_pass_ends(two_ranks: list[list[Trained]]) -> None:
    for once, each_pass in zip(*[iter(two_ranks[0])] * 2):
        last = PASSES - 1
        begun, ended = (once.events.index(f"{place} {last}") for place in ("backward", "end"))
        inside = [event for event in once.events[begun:ended] if event.startswith("reduce ")]
        assert not any(event.startswith("reduce") for event in once.events[:begun])
        # All of them do: the last one when its block's gradients are in, and no pass is left to hide it.
        assert len(inside) == once.num_buckets == len(set(inside)) > 3
        gradient = once.events.index("gradient of blocks.0", begun)
        before = [event for event in once.events[begun:gradient] if event.startswith("reduce ")]
        assert len(before) >= 3, "later blocks' gradients are sent while the first block is differentiated"
        reduced = [event for event in each_pass.events[: each_pass.events.index("step")] if event.startswith("reduce ")]
        assert len(reduced) == PASSES * each_pass.num_buckets


def test_sums_in_products_are_those_of_hooks_to_the_bit(alone: list[list[Trained]]) -> None:
    for inside, behind in zip(*alone):
        assert inside.losses == behind.losses
        assert inside.events == behind.events, "buckets are complete at the same moments"
        for name, weight in behind.weights.items():
            assert torch.equal(inside.weights[name], weight), name
        assert not any(event.startswith("gather") for event in inside.events), "nothing to gather from one rank"


def test_sums_that_stay_are_those_that_each_step_makes_to_the_bit(pair: list[Pair]) -> None:
    for made, kept in ((rank.stages[0], rank.kept) for rank in pair):
        assert kept.losses == made.losses
        assert kept.events == made.events, "they are sent at the same moments"
        for name, weight in made.weights.items():
            assert torch.equal(kept.weights[name], weight), name


def test_a_sum_that_travelled_is_gone_when_the_next_pass_brings_its_bucket_gradients(pair: list[Pair]) -> None:
    for events in (rank.two_buckets for rank in pair):
        begun, ended = events.index("backward 1"), events.index("end 0")
        gradient = events.index("gradient of blocks.0", begun)
        assert "reduced 0" in events[begun:gradient], "the pass before has sent it"
        first_pass = [event for event in events[:ended] if event.startswith("reduce")]
        assert first_pass == ["reduce 1", "reduce 0", "reduced 1"], "of no more than one bucket a sum is on its way"


def close_with_less_than_announced(zero_stage: int) -> list[dict[str, torch.Tensor]]:
    """Weights after a step of one pass; then of one in which a second was announced, of which only the head came."""
    found = []
    for announced in (1, 2):
        engine = build(zero_stage, 1, [], clip=None)  # or the head would make other steps smaller
        rows = torch.randint(0, MODEL["vocab_size"], (ROWS, TOKENS), generator=torch.manual_seed(0))
        meta = PackMeta.one_document_a_row(ROWS, TOKENS)
        with engine.accumulate(announced):
            engine.backward(engine.forward(rows, meta, rows).loss.total / rows.numel())
            if announced == 2:
                head = engine.module.head.weight
                head.grad = torch.full_like(head, 1.0)
                engine.take_gradient(head)
        assert engine.step(LEARNING_RATE).applied
        engine.wait_for_weights()
        found.append({name: weight.detach().clone() for name, weight in engine.module.named_parameters()})
    with engine.accumulate(1):
        pass
    assert engine.step(LEARNING_RATE).applied, "no gradient is a gradient of zero"
    return found


@pytest.mark.parametrize("zero_stage", STAGES)
def test_what_is_left_when_a_step_ends_is_reduced(pair: list[Pair], zero_stage: int) -> None:
    for whole, more in (rank.announced[STAGES.index(zero_stage)] for rank in pair):
        for name, weight in whole.items():
            assert torch.equal(more[name], weight) == (name != "head.weight"), name


def test_gathers_end_inside_the_next_forward_pass(two_ranks: list[list[Trained]]) -> None:
    for trained in two_ranks[0]:
        begun = trained.events.index("step") + 1
        following = trained.events[begun : trained.events.index("backward 0", begun)]
        awaited = [event for event in following if event.startswith("gathered")]
        assert len(awaited) == trained.num_buckets
        # The weights of the last block are awaited after the first one has computed.
        assert following.index("use blocks.0") < following.index(awaited[-1])
        assert all(f"gather {event.split()[1]}" in trained.events[:begun] for event in awaited)


def test_the_first_gradient_of_a_product_is_left_in_the_sum_itself() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    bucket = Bucket(0, ["weight"], [weight], [0], 8, torch.distributed.group.WORLD, False, [0])
    place, adds = bucket.take(0)
    assert not adds and place.data_ptr() == bucket.view(0).data_ptr()


def test_no_compiler_of_deepspeed_is_asked_for_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where each rank would import all of Inductor for them."""
    monkeypatch.setattr(deepspeed.runtime.engine, "is_deepcompile_supported", lambda: True)
    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "register_compile_pass", lambda *_: pytest.fail("it was asked"))
    build(1, 1, [])


class Names(TorchDispatchMode):
    """Notes the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._opname)
        return func(*args, **(kwargs or {}))


def test_the_norm_finds_gradients_that_are_not_finite_without_a_pass_before_it() -> None:
    engine = build(1, 1, [])
    rows = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    before = [weight.detach().clone() for weight in engine.module.parameters()]
    for factor in (torch.nan, -torch.inf, 1.0):
        with engine.accumulate(1):
            output = engine.forward(rows, PackMeta.one_document_a_row(ROWS, TOKENS), rows)
            engine.backward(output.loss.total * factor)
        with Names() as names:
            assert engine.step(LEARNING_RATE).applied == math.isfinite(factor)
        assert "_foreach_norm" in names.seen and not {"amax", "amin"} & names.seen
        after = list(engine.module.parameters())
        assert all(map(torch.equal, before, after)) == (not math.isfinite(factor))


def test_a_group_is_closed_behind_a_whole_block() -> None:
    model = HybridModel(ModelConfig.model_validate(MODEL), initialize_parallel(timeout_seconds=PATIENCE_SECONDS).groups)
    groups = group_parameters(model, 0.1, bucket_elements=1)
    parts = [{part_of(name) for name in group["parameter_names"]} for group in groups if group["label"] == "decay"]
    assert parts == [{"embedding"}, *({f"blocks.{number}"} for number in range(4)), {"head"}]
    assert [group["label"] for group in groups].count("no_decay") == 1
    kept = dict(model.named_parameters())["blocks.1.mixer.router.weight"]
    apart = group_parameters(model, 0.1, bucket_elements=10**9, apart=[kept])
    assert ["blocks.1.mixer.router.weight"] in [group["parameter_names"] for group in apart]
    assert len(apart) == 3
