"""What every tensor of a block is over tensor ranks, checked by spmd-types while the block computes (no second rank needed).

Types of that package over an axis: invariant (alike on all ranks, and so is its gradient), replicated (alike, and each rank
has a part of the gradient), varying (each rank has its own part). Parameters get theirs from `Shard`: a cut varies, what is
named in `partial` is replicated, the rest is invariant. The collectives of regions.py are the only ways from one type to
another, and what mixes an invariant with another tensor is an error: there a reduction, forward or backward, is missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import spmd_types as spmd
import spmd_types.checker
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from amfm.model.block import Block
from amfm.model.config.kinds import registered_kinds
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel import regions
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import Shard, parameter_shards
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.parallel import initialize_parallel
from tests.model.mixers.samples import mixer_config, registered_name, sample_names
from tests.model.small_models import ATTENTION, MAMBA, MOE, small_config

TOKENS = 16


def join_fake_ranks(num_ranks: int, sequence_parallel: bool) -> ProcessGroupCollection:
    """Groups in which this process is the first of so many tensor ranks and the others are not there."""
    os.environ.update(RANK="0", WORLD_SIZE=str(num_ranks), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(num_ranks))
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    section = ParallelConfig(tensor=num_ranks, sequence_parallel=sequence_parallel)
    return initialize_parallel(section, timeout_seconds=600, num_threads=1).groups


def rule(before: Any, after: Any, name: str = "input_") -> Any:
    """A rule of a collective: its tensor has one type over its group before, and another one after."""

    def check(outputs: Tensor, **given: Any) -> None:
        spmd.assert_type(given[name], {given["group"]: before})
        spmd.assert_type(outputs, {given["group"]: after})

    return check


def copy_rule(outputs: Tensor, *, input_: Tensor, group: Any) -> None:
    """Identity forward, all-reduce of gradients backward."""
    rule(spmd.I, spmd.R)(outputs, input_=input_, group=group)


def reduce_rule(outputs: Tensor, *, input_: Tensor, group: Any) -> None:
    """All-reduce forward, identity backward."""
    rule(spmd.V, spmd.I)(outputs, input_=input_, group=group)


def scatter_rule(outputs: Tensor, *, input_: Tensor, group: Any) -> None:
    """A slice forward, all-gather backward."""
    rule(spmd.I, spmd.V)(outputs, input_=input_, group=group)


def gather_rule(outputs: Tensor, *, input_: Tensor, group: Any, tensor_parallel_output_grad: bool) -> None:
    """All-gather forward; backward a reduce-scatter of parts of gradients, or a slice of whole ones."""
    after = spmd.R if tensor_parallel_output_grad else spmd.I
    rule(spmd.V, after)(outputs, input_=input_, group=group)


def reduce_scatter_rule(outputs: Tensor, *, input_: Tensor, group: Any) -> None:
    """Reduce-scatter forward, all-gather backward."""
    rule(spmd.V, spmd.V)(outputs, input_=input_, group=group)


def project_rule(outputs: tuple[Tensor, ...], *, own_BTD: Tensor, group: Any, weights: tuple[Tensor, ...]) -> None:
    """An all-gather as above, and products with weights that vary or are replicated."""
    spmd.assert_type(own_BTD, {group: spmd.V})
    for weight, product in zip(weights, outputs, strict=True):
        own = spmd.get_axis_local_type(weight, group)
        assert own in (spmd.V, spmd.R), f"a product of gathered tokens has a weight of type {own}"
        spmd.assert_type(weight, {group: own})
        spmd.assert_type(product, {group: own})


RULES = {
    mappings._CopyToModelParallelRegion: copy_rule,
    mappings._ReduceFromModelParallelRegion: reduce_rule,
    mappings._ScatterToSequenceParallelRegion: scatter_rule,
    mappings._GatherFromSequenceParallelRegion: gather_rule,
    mappings._ReduceScatterToSequenceParallelRegion: reduce_scatter_rule,
    regions._ProjectGathered: project_rule,
}


def own_functions(base: type) -> Iterator[type]:
    """All autograd functions of ours, which compute on one rank unless a rule above says otherwise."""
    for each in base.__subclasses__():
        if each.__module__.startswith("amfm.") and each not in RULES:
            yield each
        yield from own_functions(each)


@contextmanager
def typed(groups: ProcessGroupCollection) -> Iterator[None]:
    """Inside the block each operation is checked."""
    for function, check in RULES.items():
        function.spmd_typecheck = staticmethod(check)  # type: ignore[attr-defined]
    for function in own_functions(torch.autograd.Function):
        spmd.register_local_autograd_function(function)
    slice_tokens = regions.slice_tokens

    def slice_varying(alike: Tensor, own: ProcessGroupCollection) -> Tensor:
        part = slice_tokens(alike, own)
        if own.sequence_parallel:
            # A slice that `gather_stream` answers backward.
            spmd.assert_type(alike, {own.tp: spmd.I})
            part = spmd.mutate_type(part, own.tp, src=spmd.I, dst=spmd.V)
        return part

    users = [module for module in list(sys.modules.values()) if vars(module).get("slice_tokens") is slice_tokens]
    for module in users:
        module.slice_tokens = slice_varying  # type: ignore[attr-defined]
    try:
        with spmd_types.checker.typecheck(strict_mode="permissive"):
            yield
    finally:
        for module in users:
            module.slice_tokens = slice_tokens  # type: ignore[attr-defined]


def type_of(shard: Shard) -> Any:
    """What a parameter is over tensor ranks."""
    if any(cut.axis in ("tp", "expt_tp") for cut in shard.cuts):
        return spmd.V
    return spmd.R if {"tp", "expt_tp"} & set(shard.partial) else spmd.I


def annotate(module: nn.Module, groups: ProcessGroupCollection) -> None:
    """Give every parameter its type."""
    for _, parameter, shard in parameter_shards(module):
        spmd.assert_type(parameter, {groups.tp: type_of(shard)})


def check_block(block: Block, config: ModelConfig, groups: ProcessGroupCollection) -> Any:
    """Types of what a block gives the residual stream, checked on the way; raises SpmdTypeError if two do not go together."""
    stream = spmd.V if groups.sequence_parallel else spmd.I
    length = TOKENS // groups.tp.size() if groups.sequence_parallel else TOKENS
    x_BTD = torch.randn(1, length, config.hidden_size, requires_grad=True)
    ids_BT = torch.arange(TOKENS)[None] // 7
    meta = PackMeta.from_document_ids(ids_BT).with_tokens(torch.arange(TOKENS)[None])
    spmd.assert_type(x_BTD, {groups.tp: stream})
    with typed(groups):
        _, output = block(x_BTD, None, meta)
    found = spmd.maybe_get_axis_local_type(output.y_BTD, groups.tp)
    assert found == stream, f"the stream is {found} after the block, {stream} before it"
    return found


def core_config(**changes: Any) -> ModelConfig:
    """Every core kind of block, with what adds tensors to them; `changes`: of the experts."""
    moe = MOE.model_copy(update={"num_experts": 4, "shared_expert_gate": True, "z_loss_weight": 0.1} | changes)
    mamba = MAMBA.model_copy(update={"num_heads": 4, "num_groups": 2})
    attention = ATTENTION.model_copy(update={"num_heads": 4, "sinks": True, "bias": True, "gate": "head"})
    return small_config("M*E-", mamba=mamba, attention=attention, moe=moe)


def check_all(sequence_parallel: bool, some: bool = False) -> dict[str, str]:
    """What is wrong with blocks of all kinds, by name; empty if every type is right. some: one form of each kind."""
    groups = join_fake_ranks(2, sequence_parallel)
    names = [name for name in sample_names() if "tensor" not in registered_kinds()[registered_name(name)].refuses]
    samples = {name: mixer_config(name) for name in names if not some or registered_name(name) == name}
    samples |= {"core": core_config(), "experts with latents and biases": core_config(latent_size=6, bias=True)}
    wrong: dict[str, str] = {}
    for name, config in samples.items():
        for number, block in enumerate(build(config, groups).blocks):
            if config.letters[number] in config.letters[:number]:
                continue
            try:
                check_block(block, config, groups)
            except (spmd.SpmdTypeError, AssertionError) as error:
                wrong[f"{name}, {config.letters[number]}"] = str(error)
    return wrong


def build(config: ModelConfig, groups: ProcessGroupCollection) -> HybridModel:
    """A model in training whose parameters have types."""
    model = HybridModel(config, groups, backend="torch", seed=1).train()
    annotate(model, groups)
    return model
