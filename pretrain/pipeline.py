"""Pipeline parallelism: micro-batches pass through pieces of a model, by a torch.distributed.pipelining schedule.

A rank holds one or several pieces (model/pipeline_split.py; torch calls each a stage). All ranks of a pipeline read the
same micro-batches, so tokens, labels and documents are never sent: a piece looks its micro-batch up by number. Between
pieces one tensor flows, residual + delta [B, T, D] in the dtype of the residual: the next norm adds them anyway, and
two tensors would be twice the bytes. Another kind of residual stream makes one tensor of both itself, [B, T, n, D] of as
many tensors as its section counts at the cut. An auxiliary loss is not sent on to the last piece either: `AddLoss` gives it its
gradient where it arises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules

from amfm.kernels.common.weight_gradients import Later, compute_now, split_backward
from amfm.model.block import Stream
from amfm.model.hybrid import HybridModel, ModelOutput
from amfm.model.parallel.waits import waiting
from amfm.model.pipeline_split import Piece
from amfm.pretrain.config.schema import ParallelConfig
from amfm.pretrain.micro_batch import MicroBatch
from amfm.pretrain.parallel import Parallel

Share = Callable[[ModelOutput], Tensor | None]


@dataclass
class Pass:
    """What the schedule is running now: its micro-batches, what to do with an output, and the outputs so far.

    shape: of each micro-batch's tokens. predicts: the last piece names the most likely tokens too.
    """

    inputs: Sequence[MicroBatch] = ()
    shape: tuple[int, ...] = ()
    share: Share | None = None
    predicts: bool = False
    outputs: list[ModelOutput] = field(default_factory=list)


class PieceModule(nn.Module):
    """One piece of the model as a schedule calls it.

    The residual stream of a micro-batch in, the next stream or the loss out.
    """

    def __init__(self, model: HybridModel, piece: Piece, current: Pass) -> None:
        super().__init__()
        # Registered for `parameters()`, from which a schedule takes those whose gradients it may compute later.
        reads_embedding = piece.is_first or (piece.is_last and (model.head is None or len(model.mtp) > 0))
        self.embedding = model.embedding if reads_embedding else None
        self.blocks = nn.ModuleList([model.blocks[index] for index in piece.blocks])
        self.final_norm = model.final_norm if piece.is_last else None
        self.final_stream = model.final_stream if piece.is_last else None
        self.head = model.head if piece.is_last else None
        self.mtp = model.mtp if piece.is_last else None
        self.piece, self.current = piece, current
        self._model = (model,)  # not registered again

    def forward(self, *received: Tensor, index: Tensor) -> Tensor:
        """Compute the residual stream [B, T, D] after this piece.

        In the last piece the loss that the schedule differentiates.
        """
        model, piece, current = self._model[0], self.piece, self.current
        micro_batch = current.inputs[int(index)]
        assert micro_batch.tokens_BT.shape == current.shape, "buffers have one shape for a whole step"
        stream = model.embed(micro_batch.tokens_BT) if piece.is_first else self._enter(receive(received[0]))
        stream = model.pass_blocks(stream, piece.blocks, micro_batch.meta)
        if piece.is_last:
            output = model.finish(
                stream,
                micro_batch.labels_BT,
                predicts=current.predicts,
                ahead=micro_batch.ahead,
                meta=micro_batch.meta,
            )
        else:
            output = ModelOutput(None, None, stream.auxiliary, stream.expert_counts)
        share = None if current.share is None else current.share(output)
        current.outputs.append(detach_output(output))
        if piece.is_last:
            assert output.loss is not None, "the last piece was given labels"
            return output.loss.total if share is None else share
        residual_BTD, delta_BTD = stream.residual_BTD, stream.delta_BTD
        assert delta_BTD is not None, "a piece has at least one block"
        if share is not None:
            residual_BTD = AddLoss.apply(residual_BTD, share)
        reader = model.blocks[piece.stop - 1].stream
        if reader is not None:
            return reader.send(residual_BTD, delta_BTD)
        return (residual_BTD + delta_BTD.to(residual_BTD.dtype)).contiguous()

    def _enter(self, received: Tensor) -> Stream:
        """The residual stream of what the piece before has sent."""
        reader = self._model[0].blocks[self.piece.start].stream
        return Stream(received) if reader is None else Stream(*reader.receive(received))


def receive(stream_BTD: Tensor) -> Tensor:
    """View the received stream such that its gradient will be contiguous, as sending it back requires."""
    viewed_BTD = stream_BTD.view_as(stream_BTD)
    if viewed_BTD.requires_grad:
        viewed_BTD.register_hook(Tensor.contiguous)
    return viewed_BTD


class AddLoss(torch.autograd.Function):
    """Identity on x that gives `loss` a gradient of one: a piece's auxiliary loss need not go to the last piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        """Return x unchanged."""
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of x unchanged, and one for the loss."""
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(loss)


def detach_output(output: ModelOutput) -> ModelOutput:
    """Detach an output from its graph, which would keep a micro-batch's activations."""
    loss = None if output.loss is None else replace(output.loss, total=output.loss.total.detach())
    auxiliary = {name: value.detach() for name, value in output.auxiliary.items()}
    mtp = tuple(replace(loss, total=loss.total.detach()) for loss in output.mtp)
    return replace(output, loss=loss, auxiliary=auxiliary, mtp=mtp)


class PieceStage(pipelining.PipelineStage):
    """A pipelining stage with buffers only for what is in flight, which cuts backward passes without recomputing.

    torch keeps a buffer for each micro-batch of a step both ways, and steps of large models have hundreds: here one is
    made where its receive is posted, and let go where the pass that reads it is over. `received`: the stream that comes
    in, and `sent`: that which goes out, on the meta device. `collect`: of a schedule that cuts backward passes in two; called with each weight whose gradient
    the weights' half of a pass has added, past autograd's accumulation (kernels/common/weight_gradients.py).
    """

    def __init__(
        self,
        part: PieceModule,
        collect: Callable[[Tensor], None] | None,
        received: Tensor,
        sent: Tensor,
        *settings: Any,
        **named: Any,
    ) -> None:
        super().__init__(part, *settings, **named)
        self.dw_builder = None if collect is None else self._take_weights_half
        self.collect, self.received, self.sent = collect, received, sent
        self.later: Later = []

    def _splits(self) -> AbstractContextManager[None]:
        return nullcontext() if self.collect is None else split_backward(self.later)

    def _take_weights_half(self) -> Callable[[], None]:
        """Take what the pass that is just over left to compute, as the function that does it."""
        assert self.collect is not None, "a schedule that cuts no pass has no weights' half"
        later, self.later = self.later, []
        return partial(compute_now, later, self.collect)

    def _prepare_forward_infra(self, *given: Any, **named: Any) -> Any:
        found = super()._prepare_forward_infra(*given, **named)
        for received in self.args_recv_info.values():
            self._let_go(received)
        return found

    def _prepare_backward_infra(self, *given: Any, **named: Any) -> Any:
        found = super()._prepare_backward_infra(*given, **named)
        for received in self.grad_recv_info.values():
            self._let_go(received)
        return found

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        """Make the buffer of a micro-batch's stream, and list its receive."""
        self._make_buffers(self.args_recv_info[fwd_chunk_id], self.received)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        """Make the buffer of the gradient of a micro-batch's stream, and list its receive."""
        if self.has_backward and not self.is_last:
            self._make_buffers(self.grad_recv_info[bwd_chunk_id], self.sent)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *given: Any, **named: Any) -> Any:
        """Compute a micro-batch; from now on only its backward pass holds what was received."""
        with self._splits():
            found = super().forward_one_chunk(fwd_chunk_id, *given, **named)
        self._let_go(self.args_recv_info[fwd_chunk_id])
        return found

    def backward_one_chunk(self, bwd_chunk_id: int, *given: Any, **named: Any) -> Any:
        """Differentiate a micro-batch, the whole pass or the inputs' half, and free the gradient that was received."""
        with self._splits():
            found = super().backward_one_chunk(bwd_chunk_id, *given, **named)
        self._let_go(self.grad_recv_info.get(bwd_chunk_id, ()))
        return found

    def _make_buffers(self, received: Sequence[Any], like: Tensor) -> None:
        """Make buffers of a stream's shape if there are none."""
        for entry in received:
            buffer = getattr(entry, "buffer", None)
            if isinstance(buffer, Tensor) and not buffer.numel():
                entry.buffer = torch.empty_like(like, device=self.device, requires_grad=False)

    def _let_go(self, received: Sequence[Any]) -> None:
        """Let buffers go; an empty one stays instead of each."""
        for entry in received:
            buffer = getattr(entry, "buffer", None)
            if isinstance(buffer, Tensor) and buffer.numel():
                entry.buffer = torch.empty(0, dtype=buffer.dtype, device=buffer.device)


@contextmanager
def telling_waits() -> Iterator[None]:
    """Inside, waits of a schedule for what it receives and sends count as such (model/parallel/waits.py).

    A release of torch without the function that all schedules wait by leaves them in the passes.
    """
    module: Any = schedules
    own = getattr(module, "_wait_batch_p2p", None)
    if own is None:
        yield
        return

    def wait(works: Any) -> None:
        with waiting():
            own(works)

    module._wait_batch_p2p = wait
    try:
        yield
    finally:
        module._wait_batch_p2p = own


class Pipeline:
    """This rank's pieces and the schedule that runs them. Every rank of the pipeline must make the same calls.

    `collect` gets each weight whose gradient was just added by the weights' half of a backward pass (zero_bubble).
    """

    def __init__(
        self,
        model: HybridModel,
        section: ParallelConfig,
        parallel: Parallel,
        collect: Callable[[Tensor], None],
    ) -> None:
        self.model, self.section, self.parallel, self.collect = model, section, parallel, collect
        self.current = Pass()
        self.parts = [PieceModule(model, piece, self.current) for piece in model.pieces]
        self._shape: tuple[int, ...] = ()
        self._schedule: Any = None

    def train(self, inputs: Sequence[MicroBatch], share: Share) -> list[ModelOutput]:
        """Run forward and backward of all micro-batches, adding to the parameters' gradients.

        `share` makes of an output what is differentiated; on a stage before the last it gets only the auxiliary
        losses. Returns this rank's outputs: a loss on the last stage only, auxiliary losses and counts of each piece's
        blocks.
        """
        self._start(inputs, share)
        numbers = torch.arange(len(inputs))
        with telling_waits():
            self._schedule.step(index=numbers, target=numbers, return_outputs=False)
        return self._finish()

    @torch.no_grad()
    def evaluate(self, inputs: Sequence[MicroBatch], *, predicts: bool = False) -> list[ModelOutput]:
        """Run only forward passes; `predicts`: the last piece's outputs name the most likely tokens."""
        self._start(inputs, None)
        self.current.predicts = predicts
        numbers = torch.arange(len(inputs))
        self._schedule.eval(index=numbers, target=numbers, return_outputs=False)
        return self._finish()

    def _start(self, inputs: Sequence[MicroBatch], share: Share | None) -> None:
        """Set what the pieces look up.

        A schedule, whose buffers have fixed shapes, is rebuilt when the shape changes.
        """
        self.current.shape = rows, tokens = tuple(inputs[0].tokens_BT.shape)
        if self._shape != (len(inputs), rows, tokens):
            self._shape = (len(inputs), rows, tokens)
            self._schedule = self._build_schedule(*self._shape)
        self.current.inputs, self.current.share = inputs, share

    def _finish(self) -> list[ModelOutput]:
        """Take the outputs of the pass and let go of its micro-batches."""
        outputs, self.current.outputs = self.current.outputs, []
        self.current.inputs, self.current.share, self.current.predicts = (), None, False
        return outputs

    def _build_schedule(self, num_micro_batches: int, rows: int, tokens: int) -> Any:
        stages: list[Any] = [self._build_stage(part, rows, tokens) for part in self.parts]
        settings: dict[str, Any] = {"loss_fn": lambda output, target: output, "scale_grads": False}
        if self.section.schedule == "1f1b":
            return pipelining.Schedule1F1B(stages[0], num_micro_batches, **settings)
        if self.section.schedule == "interleaved":
            return pipelining.ScheduleInterleaved1F1B(stages, num_micro_batches, **settings)
        return pipelining.ScheduleInterleavedZeroBubble(stages, num_micro_batches, **settings)

    def _build_stage(self, part: PieceModule, rows: int, tokens: int) -> PieceStage:
        """Wrap a piece, with shapes given beforehand.

        The schedule would else run a forward and a backward pass to find them.
        """
        groups, piece = self.parallel.groups, part.piece
        if groups.sequence_parallel:
            tokens //= groups.tp.size()
        received, sent = (self._stream_after(number, rows, tokens) for number in (piece.start, piece.stop))
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        place = self.model.pieces.index(piece) * groups.pp.size() + groups.pp.rank()
        is_cut = self.section.schedule == "zero_bubble"
        return PieceStage(
            part,
            self.collect if is_cut else None,
            received,
            sent,
            place,
            self.section.num_pieces(),
            self.parallel.device,
            input_args=() if piece.is_first else (received,),
            output_args=(loss if piece.is_last else sent,),
            group=groups.pp,
        )

    def _stream_after(self, num_blocks: int, rows: int, tokens: int) -> Tensor:
        """What is sent on after so many blocks, on the meta device."""
        config = self.model.config
        more = () if config.stream is None else (config.stream.num_tensors(num_blocks),)
        shape, dtype = (rows, tokens, *more, config.hidden_size), self.model.stream_dtype()
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
