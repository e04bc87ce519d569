"""Every kind of block once forward and backward, on all ranks at once, before the first step.

At their first use kernels are checked (kernels/runtime/first_use.py) and compiled, minutes of it for a large model. Inside the
first step a pipeline would do that stage after stage, each waiting for the one before, until a timeout ends the start. So a
rank builds one block of each kind that it holds, embedding and head where it has them, in the shapes of the run, and passes
numbers only through them: its collectives answer with what it sends itself (alike_group.py). Weights, gradients, generators
and statistics of the run are not touched. Then all ranks meet, and open the communicators that would otherwise be opened one
after the other in the first step.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed
from torch import Tensor

from amfm.data_pipeline.terminal import format_seconds
from amfm.kernels.common.weight_gradients import Later, compute_now, split_backward
from amfm.kernels.low_precision.recipe import keep_weights
from amfm.model.block import Stream
from amfm.model.hybrid import HybridModel
from amfm.model.low_precision import attach_recipes
from amfm.model.packing import FixedLayout
from amfm.model.parallel.groups import AXES, opened
from amfm.model.pipeline_split import Piece, whole_piece
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.engine import restore_buffers
from amfm.pretrain.micro_batch import MicroBatch
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.recompute import recomputed_letters
from amfm.pretrain.startup.alike_group import alike_groups, destroy
from amfm.pretrain.startup.data import example_batch
from amfm.pretrain.startup.model import choose_backend, held_pieces
from amfm.pretrain.step import set_step

_LOG = logging.getLogger(__name__)
SEVERAL = ", sequences of several documents"


def compiles_anything(config: RunConfig, parallel: Parallel) -> bool:
    """Whether the first passes of a run compile: with torch.compile, and Triton's kernels on a GPU.

    Not with torch.compile over tensor ranks, which the first step compiles: a compiled graph holds the group of its
    collectives, and that must be the real one.
    """
    if config.train.compile:
        return parallel.groups.tp.size() == 1
    return parallel.device.type == "cuda" and choose_backend(config, parallel) == "triton"


def compile_first(
    config: RunConfig, parallel: Parallel, real: HybridModel, shape: tuple[int, int], report: Callable[[str], None]
) -> None:
    """Check and compile what the blocks of this rank need, and meet the other ranks. Every rank must call this.

    config: as the model of the run, `real`, was built. shape: rows of the next step's micro-batches, and their tokens. report:
    hears of each part before it is compiled. Raises ValueError if kernels are wrong on this device.
    """
    if not compiles_anything(config, parallel):
        return
    began = time.perf_counter()
    groups = alike_groups(parallel.groups)
    try:
        pass_once(config, replace(parallel, groups=groups), real, shape, report)
    finally:
        destroy(groups)
    own_seconds = time.perf_counter() - began
    report("waiting for the kernels of all ranks")
    meet(parallel)
    if parallel.is_main:
        seconds = time.perf_counter() - began
        _LOG.info("kernels: %s on this rank, %s on all", format_seconds(own_seconds), format_seconds(seconds))
    gc.collect()
    if parallel.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def meet(parallel: Parallel) -> None:
    """Wait for all ranks, with a sum over each group, which opens its communicator. Every rank must call this."""
    if parallel.world_size == 1:
        return
    groups = [getattr(parallel.groups, axis) for axis in AXES]
    one = torch.ones(1, device=parallel.device)
    for group in {id(group): group for group in groups if group is not None and group.size() > 1}.values():
        torch.distributed.all_reduce(one, group=group)
    torch.distributed.all_reduce(one)
    one.item()  # on a GPU the host has queued the sums and not waited for them


def pass_once(
    config: RunConfig, parallel: Parallel, real: HybridModel, shape: tuple[int, int], report: Callable[[str], None]
) -> None:
    """Pass numbers through each kind of block that this rank holds, forward and backward.

    real: the model of the run, whose weights are as those here will be laid. shape: of a micro-batch. Blocks communicate over `parallel.groups`: of
    groups that answer without other ranks, a rank may call this on its own.
    """
    with torch.random.fork_rng(devices=[]):
        model = build_kinds(config, parallel)
    batches = {
        words: MicroBatch.from_batch(
            example_batch(*shape, documents, is_padded=config.data.packing == "best_fit"),
            parallel.groups.cp.rank(),
            parallel.groups.cp.size(),
            config.model.num_depths,
            two_batch=parallel.groups.two_batch,
        ).to(parallel.device)
        for words, documents in (("", 1), (SEVERAL, 3))
    }
    if config.train.cuda_graphs == "blocks":
        several = batches[SEVERAL]
        batches[f"{SEVERAL}, as graphs read them"] = replace(several, meta=FixedLayout(several.meta).meta)
    has_sums = any(hasattr(weight, "gradient_sum") for weight in real.parameters())
    cuts = config.parallel.schedule == "zero_bubble" and config.parallel.pipeline > 1
    keeps = config.low_precision.quantize_weights == "each_step"
    for part in parts_of(model, real, config):
        for offsets in part.find_offsets(real):
            part.lay(model, offsets, has_sums=has_sums)
            for words, batch in batches.items():
                report(f"checking and compiling the kernels of {part.words}{words}")
                later: Later = []
                splits: AbstractContextManager[None] = split_backward(later) if cuts else nullcontext()
                with splits, keep_weights() if keeps else nullcontext(), opened(parallel.groups.row_capacity):
                    total = part.run(batch)
                    if total.requires_grad:  # the embedding of a conversion is frozen
                        total.backward()
                compute_now(later, lambda weight: None)
                model.zero_grad()
    if parallel.device.type == "cuda":
        torch.cuda.synchronize()


def build_kinds(config: RunConfig, parallel: Parallel) -> HybridModel:
    """Build the first block of each kind that this rank holds, with embedding and head where it has them, as the run does.

    Their weights are waves: routers choose all experts about as often.
    """
    model = HybridModel(
        config.model,
        parallel.groups,
        backend=choose_backend(config, parallel),
        seed=config.train.seed,
        device=parallel.device,
        pieces=pieces_of_kinds(config, held_pieces(config, parallel) or (whole_piece(config.model),)),
        draws=False,
    )
    if config.convert is not None:
        from amfm.pretrain.startup.conversion import prepare_stage

        prepare_stage(model, config.convert)
    attach_recipes(model, config.low_precision)
    if config.train.compile:
        model.compile_blocks()
    model.recompute_blocks(recomputed_letters(config))
    set_step(model, 0, 1)
    if config.train.precision == "bf16":
        buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        model.bfloat16()
        restore_buffers(model, buffers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.02 * waves(parameter.shape, parameter.device))
    return model


def pieces_of_kinds(config: RunConfig, held: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Pieces of one block each: the first of each kind among those held."""
    kinds: dict[tuple[str, bool, bool], int] = {}
    for piece in held:
        for index in piece.blocks:
            kinds.setdefault(kind_of(config, index), index)
    has_first, has_last = any(piece.is_first for piece in held), any(piece.is_last for piece in held)
    ends = (min(kinds.values()), max(kinds.values()))
    return tuple(
        Piece(index, index + 1, is_first=has_first and index == ends[0], is_last=has_last and index == ends[1])
        for index in sorted(kinds.values())
    )


def kind_of(config: RunConfig, index: int) -> tuple[str, bool, bool]:
    """What blocks have in common that launch the same kernels: letter, whether they are being converted, and have a recipe."""
    converted = () if config.convert is None else config.convert.blocks or ()
    narrow = config.low_precision.narrow_blocks(config.model.letters)
    return config.model.built_letters[index], index in converted, index in narrow


@dataclass
class SumAlone:
    """The sum of one weight's gradients, as products of a run find one in its buckets (kernels/common/weight_gradients.py).

    The first pass overwrites it and those after add to it, which are two kernels.
    """

    place: Tensor
    is_filled: bool = False

    def take(self) -> tuple[Tensor, bool]:
        """The place for a gradient, and whether to add to it."""
        was_filled, self.is_filled = self.is_filled, True
        return self.place, was_filled


@dataclass(frozen=True)
class Part:
    """A part of the model in words, what computes a number to differentiate from a micro-batch, and which weights it reads.

    prefix: of its weights' names. alike: those prefixes in the model of the run whose weights belong to the same kind.
    """

    words: str
    run: Callable[[MicroBatch], Tensor]
    prefix: str
    alike: Sequence[str]

    def find_offsets(self, real: HybridModel) -> list[dict[str, int]]:
        """By how many numbers weights are off the 16 bytes by which Triton tells addresses, in each way that there is.

        DeepSpeed keeps weights end to end, so that one after an odd number of others starts anywhere, and kernels are compiled
        again for it.
        """
        named = dict(real.named_parameters())
        found = [
            {
                name.removeprefix(prefix): int(weight.storage_offset()) % (16 // weight.element_size())
                for name, weight in named.items()
                if name.startswith(prefix)
            }
            for prefix in self.alike
        ]
        return [offsets for place, offsets in enumerate(found) if offsets not in found[:place]]

    def lay(self, model: HybridModel, offsets: dict[str, int], *, has_sums: bool) -> None:
        """Move its weights so that they are off by as much, and with `has_sums` give them sums for their gradients likewise."""
        for name, weight in model.named_parameters():
            offset = offsets.get(name.removeprefix(self.prefix), 0) if name.startswith(self.prefix) else 0
            if offset != weight.storage_offset():
                storage = weight.new_empty(weight.numel() + offset)
                weight.data = storage[offset:].view(weight.shape).copy_(weight.data)
            if has_sums and name.startswith(self.prefix):
                sums = torch.zeros(weight.numel() + offset, dtype=torch.float32, device=weight.device)
                weight.gradient_sum = SumAlone(sums[offset:].view(weight.shape))  # type: ignore[attr-defined]


def parts_of(model: HybridModel, real: HybridModel, config: RunConfig) -> Iterator[Part]:
    """The parts of a model of one block of each kind."""
    for index in model.blocks.indices():
        alike = [
            f"blocks.{other}." for other in real.blocks.indices() if kind_of(config, other) == kind_of(config, index)
        ]
        run = partial(pass_block, model, index)
        yield Part(f"block {model.blocks[index].letter}", run, f"blocks.{index}.", alike)
    if any(piece.is_last for piece in model.pieces):
        yield Part("the head", partial(pass_head, model), "", [""])
    if any(piece.is_first for piece in model.pieces):
        yield Part("the embedding", partial(pass_embedding, model), "embedding.", ["embedding."])


def pass_embedding(model: HybridModel, batch: MicroBatch) -> Tensor:
    """The first stream."""
    return model.embed(batch.tokens_BT).residual_BTD.float().sum()


def pass_block(model: HybridModel, index: int, batch: MicroBatch) -> Tensor:
    """Pass a block twice, as the first of a piece and after another one, whose norms add what came before or do not."""
    stream = model.pass_blocks(Stream(enter(model, batch)), [index, index], batch.meta)
    assert stream.delta_BTD is not None, "a block was passed"
    total = stream.residual_BTD.float().mean() + stream.delta_BTD.float().mean()
    return sum(stream.auxiliary.values(), start=total)


def pass_head(model: HybridModel, batch: MicroBatch) -> Tensor:
    """The loss of a stream, with all MTP layers."""
    residual_BTD = enter(model, batch)
    delta_BTD = enter(model, batch).to(next(model.parameters()).dtype)
    output = model.finish(Stream(residual_BTD, delta_BTD), batch.labels_BT, ahead=batch.ahead, meta=batch.meta)
    assert output.loss is not None, "the micro-batch has labels"
    return sum([*(loss.total for loss in output.mtp), *output.auxiliary.values()], start=output.loss.total)


def enter(model: HybridModel, batch: MicroBatch) -> Tensor:
    """A stream [B, T, D] that wants a gradient; under sequence parallelism of this rank's tokens."""
    rows, tokens = batch.tokens_BT.shape
    if model.groups.sequence_parallel:
        tokens //= model.groups.tp.size()
    shape = (rows, tokens, model.config.hidden_size)
    return waves(shape, batch.tokens_BT.device).to(model.stream_dtype()).requires_grad_()


def waves(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers between -1 and 1 of which few are alike, from no generator: a run's draws stay what they are."""
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float32, device=device).mul_(0.7).sin_().view(shape)
