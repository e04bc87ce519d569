"""Whole matrices in float64, however ranks and ZeRO cut them: two steps equal those of a plain loop on whole weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.matrices import list_matrices
from amfm.model.parallel.groups import ProcessGroupCollection, single_rank_groups
from amfm.model.parallel.shards import Shard, parameter_shards
from amfm.pretrain.config.optimizers import MuonConfig, PackageMatrices
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.engine.muon.exchange import deal_owners
from amfm.pretrain.engine.muon.optimizer import Muon
from amfm.pretrain.engine.parts import Part, Span, cut_evenly, list_ranks
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.shards import join_parts
from tests.helpers.spawn import run_ranks
from tests.parallel.models import VARIANTS
from tests.pretrain.engine.muon.test_newton_schulz import plain_loop

STEPS, RATE, DECAY = 2, 1e-2, 0.1
# Feed-forward, attention, Mamba2, delta rules and experts; key heads and groups that four tensor ranks must copy.
MODEL = ModelConfig.model_validate(VARIANTS["mixers"] | {"pattern": "MEGK*-P", "moe": VARIANTS["latent"]["moe"]})
UNUSED = "blocks.1.mixer.experts.up"  # its expert of number 3 never has a gradient
# (axes, how ZeRO cuts, one matrix a head)
Case = tuple[dict[str, int], str, bool]
QUICK: list[Case] = [
    ({"tensor": 4}, "flat", False),
    ({"tensor": 2, "expert": 2, "expert_tensor": 2}, "flat", True),
    ({"tensor": 2}, "ranges", False),
    ({"tensor": 2}, "replicas", True),
]
SLOW: list[Case] = [
    *(({"tensor": 4}, kind, True) for kind in ("flat", "ranges", "replicas")),
    *(({}, kind, per_head) for kind in ("flat", "ranges", "replicas") for per_head in (True, False)),
    ({"expert": 2}, "flat", False),
    ({"expert": 4}, "flat", True),
    ({"tensor": 2, "expert": 4}, "flat", True),
    ({"context": 2}, "flat", True),
]


def drawn(name: str, step: int, shape: tuple[int, ...]) -> Tensor:
    """A whole gradient (step 0: weight), the same on every rank."""
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    if name == UNUSED and step:
        values[3] = 0.0
    return values


def build(groups: ProcessGroupCollection) -> HybridModel:
    return HybridModel(MODEL, groups, device="meta")


def expected_weights(per_head: bool) -> dict[str, Tensor]:
    """The steps on whole weights, a matrix at a time."""
    groups = single_rank_groups()
    model, weights = build(groups), {}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for stack in list_matrices(model, groups, per_head=per_head):
        weight = weights.setdefault(stack.name, drawn(stack.name, 0, shapes[stack.name]))
        for number in range(stack.count):
            start = stack.start + number * stack.rows * stack.columns
            own = slice(start, start + stack.rows * stack.columns)
            momentum = torch.zeros(stack.rows, stack.columns, dtype=torch.float64)
            matrix = weight.view(-1)[own].view(momentum.shape)
            for step in range(1, STEPS + 1):
                gradient = drawn(stack.name, step, shapes[stack.name]).view(-1)[own].view(momentum.shape)
                momentum = 0.95 * momentum + gradient
                update = 0.2 * math.sqrt(max(momentum.shape)) * plain_loop(gradient + 0.95 * momentum)
                matrix.mul_(1 - RATE * DECAY).sub_(RATE * update)
    return weights


def cut_in_ranges(lengths: list[tuple[str, int]], size: int, rank: int) -> tuple[Span, ...]:
    """As ZeRO 3 cuts: each parameter in equal ranges, so that the last rank may have none of it."""
    spans, place = [], 0
    for name, length in lengths:
        share = -(-length // size) + 1  # one more than needed: the last range is short, or empty
        low, high = min(length, share * rank), min(length, share * (rank + 1))
        if low < high:
            spans.append(Span(name, low, high - low, place))
        place += share
    return tuple(spans)


def make_parts(weights: dict[str, Tensor], kind: str, group: Any, number: int) -> Iterator[Part]:
    """Master tensors with what they hold of these weights, cut over the ranks of a group in one way."""
    ranks = list_ranks(group)
    own, lengths = group.rank(), [(name, weight.numel()) for name, weight in weights.items()]
    if kind == "replicas":
        for name, weight in weights.items():
            spans = (Span(name, 0, weight.numel(), 0),)
            master = torch.nn.Parameter(weight.clone())
            yield Part(master, number, spans, ranks, True, group, lambda rank, spans=spans: spans)
        return
    total = sum(length for _, length in lengths)
    if kind == "flat":
        share = -(-total // len(ranks)) + 3  # with padding
        spans_of = partial(cut_evenly, lengths, share)
    else:
        share = sum(-(-length // len(ranks)) + 1 for _, length in lengths)
        spans_of = partial(cut_in_ranges, lengths, len(ranks))
    master = torch.nn.Parameter(torch.zeros(share, dtype=torch.float64))
    for span in spans_of(own):
        values = weights[span.name].reshape(-1)[span.start : span.start + span.numel]
        master.data[span.flat_start : span.flat_start + span.numel] = values
    yield Part(master, number, spans_of(own), ranks, False, group, spans_of)


def fill(part: Part, parameters: dict[str, Tensor]) -> None:
    """Give a part the gradient of its ranges."""
    part.master.grad = torch.zeros_like(part.master)
    flat = part.master.grad.view(-1)
    for span in part.spans:
        values = parameters[span.name].reshape(-1)[span.start : span.start + span.numel]
        flat[span.flat_start : span.flat_start + span.numel] = values


def join_ranges(parts: list[Part], weights: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """This rank's whole parameters from the ranges of its data ranks; replicas must agree bitwise."""
    joined = {}
    for name, weight in weights.items():
        own = torch.zeros(weight.numel(), dtype=torch.float64)
        for part in parts:
            for span in part.spans:
                if span.name == name:
                    own[span.start : span.start + span.numel] = part.master.detach().view(-1)[
                        span.flat_start : span.flat_start + span.numel
                    ]
        everyone = [torch.empty_like(own) for _ in range(group.size())]
        torch.distributed.all_gather(everyone, own, group=group)
        if parts[0].replicated:
            assert all(torch.equal(other, own) for other in everyone), f"{name} differs between data ranks"
        joined[name] = own if parts[0].replicated else torch.stack(everyone).sum(0)
    return joined


def run_case(case: Case, settings: MuonConfig | PackageMatrices | None = None) -> dict[str, Tensor]:
    """Two steps in one layout; whole weights by name, the same on every rank."""
    axes, kind, per_head = case
    parallel = initialize_parallel(
        ParallelConfig(zero_stage=1, **axes), timeout_seconds=PATIENCE_SECONDS, num_threads=1
    )
    groups = parallel.groups
    model = build(groups)
    stacks = list_matrices(model, groups, per_head=per_head)
    names = {stack.name for stack in stacks}
    shards: dict[str, tuple[tuple[int, ...], Shard]] = {
        name: (shard.whole_shape(parameter.shape), shard)
        for name, parameter, shard in parameter_shards(model)
        if name in names
    }

    def own_part(name: str, step: int) -> Tensor:
        shape, shard = shards[name]
        return shard.shard(drawn(name, step, shape), groups).contiguous()

    spread = {name for name, (_, shard) in shards.items() if shard.per_expert and groups.ep.size() > 1}
    sets = [
        (group, members) for group, members in ((groups.dp_cp, names - spread), (groups.expt_dp, spread)) if members
    ]
    parts: list[list[Part]] = []
    for number, (group, members) in enumerate(sets):
        weights = {name: own_part(name, 0) for name in shards if name in members}
        parts.append(list(make_parts(weights, kind, group, number)))
    label = "muon" if settings is None else "matrices"
    labelled = [
        {"label": label, "weight_decay": DECAY, "params": [part.master for part in members]} for members in parts
    ]
    muon = Muon(labelled, settings or MuonConfig(per_head=per_head), lr=0.0, betas=(0.9, 0.95), fused=True)
    muon.attach([part for members in parts for part in members], stacks, groups, "float32")
    for step in range(1, STEPS + 1):
        gradients = {name: own_part(name, step) for name in shards}
        for group, members in zip(muon.param_groups, parts):
            group["lr"] = RATE
            for part in members:
                fill(part, gradients)
        muon.step()
    found = {}
    for (group, members), own in zip(sets, parts):
        weights = {name: own_part(name, 0) for name in shards if name in members}
        for name, flat in join_ranges(own, weights, group).items():
            found[name] = join_parts(flat.view(weights[name].shape), shards[name][1], groups)
    return found


def run_cases(cases: list[Case]) -> list[dict[str, Tensor]]:
    return [run_case(case) for case in cases]


def assert_same_steps(cases: list[Case], num_ranks: int) -> None:
    found = run_ranks(run_cases, cases, num_ranks=num_ranks)[0]
    expected = {per_head: expected_weights(per_head) for per_head in {case[2] for case in cases}}
    for case, weights in zip(cases, found, strict=True):
        assert weights.keys() == expected[case[2]].keys()
        for name, weight in weights.items():
            error = float((weight - expected[case[2]][name]).abs().max())
            assert error < 1e-10, f"{case}: {name} is off by {error}"


def test_matrices_cut_by_tensor_expert_and_data_ranks_step_as_whole_ones() -> None:
    assert_same_steps(QUICK, 4)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_cut_steps_as_whole_matrices(num_ranks: int) -> None:
    cases = SLOW if num_ranks == 4 else [case for case in SLOW if not case[0]]
    assert_same_steps(cases, num_ranks)


def test_owners_share_the_work_and_all_ranks_know_them() -> None:
    groups = single_rank_groups()
    stacks = list_matrices(build(groups), groups, per_head=True)
    owners = deal_owners(stacks, 3)
    assert owners == deal_owners(stacks, 3) and set(owners) == {0, 1, 2}
    # More ranks than matrices: some own none.
    assert len(set(deal_owners(stacks[:2], 5))) == 2
