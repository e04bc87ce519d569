"""Blocks of a model as CUDA graphs (`train.cuda_graphs`), captured before the first pass of a run and then replayed.

Graphs are lists of launches that a GPU replays without the host (docs/design/014). A block has a graph of its forward pass, and
one of its backward pass.

A graph reads and writes the memory that it was captured with, so everything is at addresses that stay:

    what flows in      is copied to the graph's inputs. Behind another graph these are that one's outputs, and nothing is copied
    documents          are copied once per micro-batch (`model/packing.py`)
    weights            stay where DeepSpeed has them
    their gradients    are added by the products to float32 sums that are made once per run (`GradientBuckets.keep_sums`);
                       those that autograd is given come in memory of the graph, and are added before it is replayed again

Autograd sees one node per block. Its backward pass replays, and tells the buckets which sums products have added to; hooks of
parameters then fire as before. What a forward pass keeps for its backward pass is in the graph's memory, so one micro-batch is
in flight at a time.

Capturing launches on a GPU.

One pool of memory serves all graphs of a model: what a graph lets go of while it is captured, those captured after it use
again. So graphs must be replayed in the order in which they were captured, forward passes first.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from amfm.model.block import Block
from amfm.model.mixers.interface import BlockState, MixerOutput
from amfm.model.packing import FixedLayout, PackMeta
from amfm.pretrain.engine.buckets import GradientBuckets
from amfm.pretrain.hook import Hook
from amfm.pretrain.micro_batch import LossShare, MicroBatch
from amfm.pretrain.run import Run
from amfm.pretrain.startup.first_passes import pass_once
from amfm.pretrain.step import Scheduled

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


class Capture(Protocol):
    """Runs a function while what it launches is recorded, and gives what launches the same again."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches. On a GPU nothing is computed yet."""
        ...


class CudaCapture:
    """Captures on a stream of its own, from which all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        # Whatever Python would free in the middle of a capture, such as an event, is freed before.
        torch.cuda.synchronize(device)
        gc.collect()
        torch.cuda.empty_cache()
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches, in backward passes also from autograd's own thread.

        Raises RuntimeError if it reads a number from the device, or does something else that no graph holds.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            # Other threads, such as NCCL's, may continue to ask the device for what they like.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # which only says that something failed before
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay


@dataclass
class SumInGraph:
    """The sum of one weight's gradients, as products see it while they are captured (kernels/common/weight_gradients.py).

    is_taken: whether one adds to it.
    """

    place: Tensor
    is_taken: bool = False

    def take(self) -> tuple[Tensor, bool]:
        """The place, which is always added to."""
        self.is_taken = True
        return self.place, True


class GraphedBlock:
    """Stands for a block's forward method: in training it replays, else the block computes as before.

    shape: of the residual stream, [B, T, D]. dtypes: of the residual and of the delta, which the first block of a model does not
    get. `before`: the graph of the block before this one, if it has one. Capture forward passes in the order of the blocks, then
    backward passes in reverse.
    """

    def __init__(
        self,
        block: Block,
        buckets: GradientBuckets,
        layout: FixedLayout,
        shape: Sequence[int],
        dtypes: Sequence[torch.dtype],
        before: GraphedBlock | None,
    ) -> None:
        self.block, self.buckets, self.layout = block, buckets, layout
        self.eager = block.forward
        self.weights = [weight for weight in block.parameters() if weight.requires_grad]
        device = layout.meta.document_ids_BT.device
        if before is None:
            inputs = [torch.zeros(*shape, dtype=dtype, device=device) for dtype in dtypes]
        else:
            inputs = before.outputs[:2]
        self.inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        self.outputs: list[Tensor] = []
        self.names: list[str] = []
        self.counts_E: Tensor | None = None
        self.output_gradients: list[Tensor] = []
        self.input_gradients: list[Tensor] = []
        self.weight_gradients: list[Tensor | None] = []
        self.landed: list[nn.Parameter] = []
        self.replay_forward: Callable[[], None]
        self.replay_backward: Callable[[], None]

    def capture_forward(self, capture: Capture) -> None:
        """Capture the forward pass."""
        found: list[tuple[Tensor, MixerOutput]] = []
        delta_BTD = self.inputs[1] if len(self.inputs) > 1 else None

        def run() -> None:
            found.append(self.eager(self.inputs[0], delta_BTD, self.layout.meta, None))

        self.sums = {weight: SumInGraph(self.buckets.gradient_of(weight)) for weight in self.weights}
        with torch.enable_grad(), _hung(self.sums):
            self.replay_forward = capture(run)
        ((residual_BTD, mixed),) = found
        auxiliary = mixed.auxiliary or {}
        self.names, self.counts_E = list(auxiliary), mixed.expert_counts_E
        self.made = [residual_BTD, mixed.y_BTD, *auxiliary.values()]
        self.outputs = [tensor.detach() for tensor in self.made]

    def capture_backward(self, capture: Capture, after: GraphedBlock | None) -> None:
        """Capture the backward pass; `after`: the graph of the block after this one, if it has one."""
        behind = [] if after is None else after.input_gradients
        self.output_gradients = [*behind, *(torch.zeros_like(tensor) for tensor in self.outputs[len(behind) :])]
        pairs = [pair for pair in zip(self.made, self.output_gradients, strict=True) if pair[0].requires_grad]
        made, arriving = zip(*pairs)
        found: list[Tensor | None] = []

        def run() -> None:
            # Weights are asked for too, those whose gradients land in sums: nodes that lead to nothing else must run.
            wanted = [*self.inputs, *self.weights]
            found.extend(torch.autograd.grad(made, wanted, arriving, allow_unused=True))

        self.replay_backward = capture(run)
        self.made.clear()
        places, gradients = found[: len(self.inputs)], found[len(self.inputs) :]
        self.input_gradients = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(self.inputs, places, strict=True)
        ]
        self.weight_gradients = gradients
        self.landed = [weight for weight, total in self.sums.items() if total.is_taken]
        del self.sums

    def __call__(
        self, residual_BTD: Tensor, delta_BTD: Tensor | None, meta: PackMeta, state: BlockState = None
    ) -> tuple[Tensor, MixerOutput]:
        """What the block's forward method gives."""
        if not (self.block.training and torch.is_grad_enabled()):
            return self.eager(residual_BTD, delta_BTD, meta, state)
        self.layout.take(meta)
        given = [residual_BTD] if delta_BTD is None else [residual_BTD, delta_BTD]
        residual_BTD, y_BTD, *losses = _Replay.apply(self, len(given), *given, *self.weights)
        # Of these a step keeps those of a micro-batch until it adds those of the next.
        auxiliary = {name: loss.clone() for name, loss in zip(self.names, losses, strict=True)}
        counts_E = None if self.counts_E is None else self.counts_E.clone()
        return residual_BTD, MixerOutput(y_BTD, None, auxiliary, counts_E)


class _Replay(torch.autograd.Function):
    """A block's graphs, as one node of autograd's."""

    @staticmethod
    def forward(ctx: Any, graphs: GraphedBlock, num_inputs: int, *given: Tensor) -> tuple[Tensor, ...]:
        """Copy what flows in where it is not there already, and replay."""
        ctx.graphs = graphs
        _copy(given[:num_inputs], graphs.inputs)
        graphs.replay_forward()
        return tuple(tensor.detach() for tensor in graphs.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Likewise, of gradients."""
        graphs: GraphedBlock = ctx.graphs
        _copy(gradients, graphs.output_gradients)
        graphs.replay_backward()
        for weight in graphs.landed:
            graphs.buckets.note(weight)
        made = [*graphs.input_gradients, *graphs.weight_gradients]
        return None, None, *(None if gradient is None else gradient.detach() for gradient in made)


def _copy(given: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    """Copy tensors to their places; what is there already, as the output of the graph before, is left."""
    for tensor, place in zip(given, places, strict=True):
        assert tensor.shape == place.shape and tensor.dtype == place.dtype, "graphs are captured again for other rows"
        if tensor.data_ptr() != place.data_ptr():
            place.detach().copy_(tensor)


@contextmanager
def _hung(sums: dict[nn.Parameter, SumInGraph]) -> Iterator[None]:
    """Inside the block products find these sums, in place of those of the run."""
    own: dict[nn.Parameter, Any] = {weight: vars(weight)["gradient_sum"] for weight in sums}
    try:
        for weight, total in sums.items():
            vars(weight)["gradient_sum"] = total
        yield
    finally:
        for weight, total in own.items():
            vars(weight)["gradient_sum"] = total
