"""Blocks of a model as CUDA graphs (`train.cuda_graphs`, pretrain/cuda_graphs/): captured before the first pass of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from amfm.model.block import Block
from amfm.model.scheduled import Scheduled
from amfm.pretrain.cuda_graphs.block import Capture, CudaCapture, GraphedBlock
from amfm.pretrain.cuda_graphs.layout import FixedLayout
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.run import Run
from amfm.pretrain.startup.first_passes import pass_once

_LOG = logging.getLogger(__name__)


class CudaGraphs(Hook):
    """Captures the blocks whose mixer `is_graphable` and depends on no step, and again when a stage gives them other rows.

    capture: how; by default on the run's GPU.
    """

    def __init__(self, run: Run, capture: Capture | None = None) -> None:
        self.run, self.capture = run, capture
        self.graphs: dict[int, GraphedBlock] = {}
        self.addresses: tuple[int, ...] = ()

    def before_passes(self, micro_batches: Sequence[MicroBatch], share: LossShare) -> None:
        """Capture, if there are no graphs for what is in memory now."""
        addresses = self.find_addresses(micro_batches[0])
        if addresses != self.addresses:
            self.close()
            if self.addresses:  # not of the first step, before which a run has compiled
                self.recompile(micro_batches[0])
            self.capture_blocks(micro_batches[0])
            self.addresses = addresses

    def recompile(self, batch: MicroBatch) -> None:
        """Compile kernels for rows of another shape: inside a capture, they could not be loaded."""
        run, (rows, tokens) = self.run, batch.tokens_BT.shape
        config = run.built.config_of(run.config, run.stage)
        step = run.progress.step
        pass_once(config, run.parallel, run.model, (rows, tokens), lambda part: run.heartbeat.at(step, "compile"))

    def find_addresses(self, batch: MicroBatch) -> tuple[int, ...]:
        """What graphs hold that is not theirs: sizes of rows, and where weights and buffers are."""
        tensors: list[Tensor] = [*self.run.model.parameters(), *self.run.model.buffers()]
        return (*batch.tokens_BT.shape, *(tensor.data_ptr() for tensor in tensors))

    def capture_blocks(self, batch: MicroBatch) -> None:
        """Capture all forward passes in order, then all backward passes in reverse: the order of every step."""
        model, buckets, groups = self.run.model, self.run.engine.buckets, self.run.model.groups
        assert buckets is not None, "checked: graphs are for ZeRO 1"
        buckets.keep_sums()
        capture = self.capture or CudaCapture(self.run.parallel.device)
        layout = FixedLayout(batch.meta)
        rows, tokens = batch.tokens_BT.shape
        shape = (rows, tokens // (groups.tp.size() if groups.sequence_parallel else 1), model.config.hidden_size)
        before: GraphedBlock | None = None
        for index in model.blocks.indices():
            block = model.blocks[index]
            if not block.mixer.is_graphable or any(isinstance(part, Scheduled) for part in block.modules()):
                before = None
                continue
            dtypes = [model.stream_dtype(), block.norm.weight.dtype][: 1 if index == 0 else 2]
            before = self.graphs[index] = GraphedBlock(block, buckets, layout, shape, dtypes, before)
            with naming(index, block):
                before.capture_forward(capture)
        for index in reversed(self.graphs):
            with naming(index, model.blocks[index]):
                self.graphs[index].capture_backward(capture, self.graphs.get(index + 1))
        for index, graphs in self.graphs.items():
            put_forward(model.blocks[index], graphs)
        if self.run.parallel.is_main:
            _LOG.info("%d of %d blocks are CUDA graphs", len(self.graphs), len(model.blocks))

    def close(self) -> None:
        """Let go of all graphs and their memory; blocks compute as before."""
        for index in self.graphs:
            put_forward(self.run.model.blocks[index], None)
        self.graphs.clear()


@contextmanager
def naming(index: int, block: Block) -> Iterator[None]:
    """Say of what a block does that no graph holds in which block it was."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"block {index} ({block.letter}) could not be captured as a CUDA graph; use train.cuda_graphs=none: {error}"
        ) from error


def put_forward(block: Block, graphs: GraphedBlock | None) -> None:
    """Let graphs stand for a block's forward method, or none."""
    vars(block).pop("forward", None)
    if graphs is not None:
        vars(block)["forward"] = graphs
