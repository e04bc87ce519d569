"""A model that is only read, over all ranks: in the layout of tensor and expert ranks that their memory asks for.

Ranks that hold the whole model share nothing but the questions, so that is taken where it fits. Else experts are spread
over data ranks first, which costs two exchanges per block of experts, and then every block over tensor ranks, which costs
two per block.

Forward passes over rows that all data ranks share: of a run's engine, of a model on one rank or over several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from amfm.data_pipeline.loader.loader import batch_of_rows
from amfm.data_pipeline.memory import available_bytes
from amfm.data_pipeline.samples.packing import IGNORED_LABEL, Row
from amfm.kernels.runtime.backend import resolve_for_run
from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel, ModelOutput
from amfm.model.loss import LOGITS_SLICE
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.parallel.shards import parameter_shards
from amfm.pretrain.checks.blocks import refusal_problems, refuse_native_model
from amfm.pretrain.checks.parallel import size_problems
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.inference.weights import Weights
from amfm.pretrain.micro_batch import MicroBatch
from amfm.pretrain.parallel import DataParallelUnit, Parallel, initialize_parallel, start_process_group
from amfm.pretrain.ranks.group import RankGroup

TIMEOUT_SECONDS = 3600.0  # ranks wait for each other that long: the first loads the data of tasks
USED = 0.9  # of a rank's memory, for weights and work
STREAMS = 48  # numbers per token and channel that a block holds while it computes, at most
Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Work:
    """What ranks are to hold next to weights: tokens of a micro-batch; whole_rows: a rank computes all tokens of a row, as
    continuations do.
    """

    tokens: int
    whole_rows: bool = False


@dataclass(frozen=True)
class Layout:
    """Tensor and expert ranks of a model that is only read, and why these."""

    section: ParallelConfig
    reason: str


def join_ranks(num_ranks: int) -> RankGroup:
    """Join the ranks that a launcher started, or be the only one. Every rank must call this."""
    return RankGroup(0 if num_ranks == 1 else start_process_group(TIMEOUT_SECONDS)[0], num_ranks)


def open_model(
    weights: Weights,
    ranks: RankGroup,
    work: Work,
    *,
    device: str = "cpu",
    backend: str = "auto",
    precision: Precision = "float32",
    announce: Callable[[str], None] = lambda text: None,
) -> tuple[HybridModel, Parallel]:
    """Build this rank's part of a model in eval mode, in a layout that is chosen and announced. Every rank must call this.

    Weights are rounded to `precision`; buffers, such as the balancing bias of routers, stay float32 as in training. device:
    of only one rank; several take a GPU each if there are any. Raises ValueError if no layout fits.
    """
    if ranks.world_size == 1:
        parallel = alone(torch.device(device))
    else:
        local_ranks = start_process_group(TIMEOUT_SECONDS)[3]
        memory = min(ranks.all_gather(memory_of_rank(local_ranks)))
        layout = choose_layout(weights.model, ranks.world_size, memory, work, precision)
        if ranks.rank == 0:
            announce(layout.reason)
        parallel = initialize_parallel(layout.section, timeout_seconds=TIMEOUT_SECONDS)
    dtype = dtype_of(precision)
    chosen = resolve_for_run(backend, parallel.device, dtype, unfit=refuse_native_model(weights.model))
    return weights.build(backend=chosen, device=parallel.device, groups=parallel.groups, dtype=dtype), parallel


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of weights and activations."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def choose_layout(model: ModelConfig, num_ranks: int, memory: float, work: Work, precision: Precision) -> Layout:
    """The layout of fewest tensor ranks, and then expert ranks, whose parts fit a rank's memory in bytes.

    The memory of work is a rule of thumb. Raises ValueError if none fits, naming the smallest.
    """
    width = dtype_of(precision).itemsize
    whole = HybridModel(model, single_rank_groups(), device="meta")
    needs: list[tuple[float, ParallelConfig]] = []
    for section in sections(model, num_ranks, work):
        need = width * numbers_of_rank(whole, section) + memory_of_work(model, work, section, width)
        needs.append((need, section))
        if need <= USED * memory:
            break
    smallest, section = min(needs, key=lambda each: each[0])
    words = f"tensor {section.tensor}, expert {section.expert}"
    had = f"{memory / 1e9:.1f} GB that a rank has"
    if smallest > USED * memory:
        only = ", and tasks that generate need whole sequences on each rank" if work.whole_rows else ""
        raise ValueError(
            f"--nproc {num_ranks}: in {precision} the smallest layout, {words}, needs {smallest / 1e9:.1f} of the {had}{only}; "
            f"start more ranks{'' if precision == 'bf16' else ', or use --precision bf16'}"
        )
    before = f"; {describe(needs[-2])} do not fit" if len(needs) > 1 else ", the whole model on each"
    return Layout(
        section,
        f"{num_ranks} ranks in {precision}: {words}, data {num_ranks // section.tensor}, because {smallest / 1e9:.1f} of the "
        f"{had} suffice{before}",
    )


def describe(need: tuple[float, ParallelConfig]) -> str:
    """A layout that was passed over, in words."""
    return f"the {need[0] / 1e9:.1f} GB of tensor {need[1].tensor}, expert {need[1].expert}"


def sections(model: ModelConfig, num_ranks: int, work: Work) -> Iterator[ParallelConfig]:
    """Layouts that the model's sizes allow, those with least communication first."""
    for tensor in range(1, num_ranks + 1):
        for expert in range(1, num_ranks + 1):
            if num_ranks % tensor or num_ranks % expert or (work.whole_rows and tensor > 1 and expert > 1):
                continue
            if expert > 1 and not model.expert_sections():
                continue
            section = ParallelConfig(tensor=tensor, expert=expert)
            if not any(size_problems(model, section)) and not any(refusal_problems(model, section)):
                yield section


def numbers_of_rank(whole: HybridModel, section: ParallelConfig) -> float:
    """Parameters that a rank of a layout holds."""
    ranks = {"tp": section.tensor, "ep": section.expert, "expt_tp": section.expert_tensor_size(), "embd": 1}
    total = 0.0
    for _, parameter, shard in parameter_shards(whole):
        part = float(parameter.numel())
        for cut in shard.cuts:
            part *= sum(cut.local_segments(ranks[cut.axis])) / sum(cut.segments)
        total += part
    return total


def memory_of_work(model: ModelConfig, work: Work, section: ParallelConfig, width: int) -> float:
    """Bytes of activations of a forward pass and of a slice of logits."""
    logits = min(work.tokens * model.vocab_size, LOGITS_SLICE)
    return width * (STREAMS * work.tokens * model.hidden_size + 2 * logits)


def memory_of_rank(local_ranks: int) -> float:
    """Bytes that this rank's GPU has free, or this rank's share of what the host has."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return (available_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / local_ranks


@dataclass(frozen=True)
class RowPasses:
    """How rows pass a model in eval mode.

    forward: forward passes of micro-batches, as validation takes them; of a pipeline the outputs of other pieces than the
    last have no loss. rows_at_once: of a micro-batch; as_in_training: never fewer, for compiled blocks and schedules.
    micro_batches: that `forward` takes at once, on each data rank.
    """

    forward: Callable[[Sequence[MicroBatch]], Iterable[ModelOutput]]
    parallel: Parallel
    rows_at_once: int
    as_in_training: bool = False
    micro_batches: int = 1

    @classmethod
    def of_model(
        cls, model: HybridModel, rows_at_once: int, *, parallel: Parallel | None = None, predicts: bool = False
    ) -> RowPasses:
        """Those of a model without an engine; parallel: the ranks that hold it. predicts: with the most likely tokens."""
        ranks = parallel or alone(model.head_weight().device)
        return cls(partial(pass_model, model, predicts=predicts), ranks, rows_at_once)

    @torch.no_grad()
    def run(
        self, count: int, read: Callable[[int], Row], *, isolated: bool = True
    ) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.int64]], MicroBatch, ModelOutput]]:
        """Pass `count` rows of one length, of which `read` gives each: numbers of rows, micro-batch and output.

        A data rank reads and yields its own share. Rows that fill up a micro-batch have the number -1 and no labels: all
        data ranks run the same number of passes, because experts and ZeRO-3 weights are spread over them. isolated:
        documents do not see each other. Every rank must call this and take all that comes.
        """
        if not count:
            return
        parallel, cp = self.parallel, self.parallel.groups.cp
        ranks, width = parallel.data_world_size, self.rows_at_once
        if not self.as_in_training:
            width = min(width, -(-count // ranks))
        numbers = np.concatenate([np.arange(count), np.full(-count % (self.micro_batches * ranks * width), -1)])
        for turn in numbers.reshape(-1, self.micro_batches, ranks, width):
            inputs, shares = [], turn[:, parallel.data_rank]
            for own in shares:
                rows = [read(int(number)) if number >= 0 else without_labels(read(0)) for number in own]
                batch = batch_of_rows(rows, isolated)
                inputs.append(MicroBatch.from_batch(batch, cp.rank(), cp.size()).to(parallel.device))
            outputs = [output for output in self.forward(inputs) if output.loss is not None]
            yield from zip(shares, inputs, outputs)


def alone(device: torch.device) -> Parallel:
    """This process without any other; needs no process group."""
    return Parallel(0, 1, 0, 1, device, single_rank_groups(), DataParallelUnit())


def pass_model(model: HybridModel, micro_batches: Sequence[MicroBatch], *, predicts: bool) -> Iterator[ModelOutput]:
    """Forward passes of a model that this process calls itself."""
    for given in micro_batches:
        yield model(given.tokens_BT, given.meta, given.labels_BT, predicts=predicts)


def without_labels(row: Row) -> Row:
    """The same row, none of whose tokens is predicted."""
    return row._replace(labels=np.full(len(row.tokens) - 1, IGNORED_LABEL))
