"""Pipeline parallelism: a rank's micro-batches through the stages, in the order of a schedule of torch.distributed.pipelining.

Every rank of a pipeline reads the same micro-batches, so tokens, labels and documents are never sent: a stage looks its
micro-batch up by number. Between stages one tensor flows, the residual plus the newest delta [B, T, D] in the dtype of
the residual stream: the next norm would add them anyway, and two tensors would be twice the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import pipelining

from model.hybrid import HybridModel, ModelOutput, Stream
from model.pipeline_split import Piece
from pretrain.config.schema import ParallelConfig
from pretrain.micro_batch import MicroBatch
from pretrain.parallel import Parallel

Share = Callable[[ModelOutput], Tensor | None]


@dataclass
class Pass:
    """What the schedule is doing now: its micro-batches, what becomes of an output, and the outputs that were made.

    predicts: the last piece names the most likely tokens too.
    """

    inputs: Sequence[MicroBatch] = ()
    share: Share | None = None
    predicts: bool = False
    outputs: list[ModelOutput] = field(default_factory=list)


class StagePart(nn.Module):
    """One piece of the model as a schedule calls it: the stream of a micro-batch in, the next stream or the loss out."""

    def __init__(self, model: HybridModel, piece: Piece, current: Pass) -> None:
        super().__init__()
        # Registered for `parameters()`, from which a schedule takes those whose gradients it may compute later.
        self.embedding = model.embedding if piece.is_first or (piece.is_last and model.head is None) else None
        self.blocks = nn.ModuleList([model.blocks[index] for index in piece.blocks])
        self.final_norm = model.final_norm if piece.is_last else None
        self.head = model.head if piece.is_last else None
        self.piece, self.current = piece, current
        self._model = (model,)  # not registered again

    def forward(self, *received: Tensor, index: Tensor) -> Tensor:
        """The stream [B, T, D] after this piece, or on the last one what the schedule calls backward on."""
        model, piece, current = self._model[0], self.piece, self.current
        micro_batch = current.inputs[int(index)]
        stream = model.embed(micro_batch.tokens_BT) if piece.is_first else Stream(receive(received[0]))
        stream = model.pass_blocks(stream, piece.blocks, micro_batch.meta)
        if piece.is_last:
            output = model.finish(stream, micro_batch.labels_BT, predicts=current.predicts)
        else:
            output = ModelOutput(None, None, stream.auxiliary, stream.expert_counts)
        share = None if current.share is None else current.share(output)
        current.outputs.append(detach_output(output))
        if piece.is_last:
            assert output.loss is not None, "the last piece was given labels"
            return output.loss.total if share is None else share
        delta_BTD = stream.delta_BTD
        assert delta_BTD is not None, "a piece has at least one block"
        if share is not None:
            delta_BTD = AddLoss.apply(delta_BTD, share)
        return (stream.residual_BTD + delta_BTD.to(stream.residual_BTD.dtype)).contiguous()


def receive(stream_BTD: Tensor) -> Tensor:
    """The stream as it came, whose gradient will lie in memory as it can be sent."""
    viewed_BTD = stream_BTD.view_as(stream_BTD)
    if viewed_BTD.requires_grad:
        viewed_BTD.register_hook(Tensor.contiguous)
    return viewed_BTD


class AddLoss(torch.autograd.Function):
    """Hands x on and gives `loss` a gradient of one, so that what a stage adds to the loss needs not travel to the last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        """x unchanged."""
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of x unchanged, and one."""
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(loss)


def detach_output(output: ModelOutput) -> ModelOutput:
    """The numbers of an output without the graph, which would keep a micro-batch's activations."""
    loss = None if output.loss is None else replace(output.loss, total=output.loss.total.detach())
    auxiliary = {name: value.detach() for name, value in output.auxiliary.items()}
    return ModelOutput(None, loss, auxiliary, output.expert_counts, predictions_BT=output.predictions_BT)


class Stage(pipelining.PipelineStage):
    """A stage that tells when a schedule has computed gradients of weights by themselves, past autograd's accumulation."""

    def __init__(
        self, part: StagePart, after_weights: Callable[[nn.Module], None], *settings: Any, **named: Any
    ) -> None:
        super().__init__(part, *settings, **named)
        self.after_weights = after_weights

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The second half of a backward pass that was cut in two."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        for parameter in self.submod.parameters():
            if parameter.grad is not None and not parameter.grad.is_contiguous():
                # Autograd's accumulation would have given it the layout of the parameter, on which DeepSpeed relies.
                parameter.grad = parameter.grad.contiguous()
        self.after_weights(self.submod)


class Pipeline:
    """The stages of this rank and the schedule that runs them. Every rank of the pipeline must call alike.

    `after_weights` gets the modules whose gradients a schedule has just added to by hand (zero_bubble).
    """

    def __init__(
        self,
        model: HybridModel,
        section: ParallelConfig,
        parallel: Parallel,
        after_weights: Callable[[nn.Module], None],
    ) -> None:
        self.model, self.section, self.parallel, self.after_weights = model, section, parallel, after_weights
        self.current = Pass()
        self.parts = [StagePart(model, piece, self.current) for piece in model.pieces]
        self._shape: tuple[int, ...] = ()
        self._schedule: Any = None

    def train(self, inputs: Sequence[MicroBatch], share: Share) -> list[ModelOutput]:
        """Forward and backward of all micro-batches; gradients are added to those that the parameters have.

        `share` makes of an output what is differentiated; on a stage before the last it gets the auxiliary losses alone.
        Returns this rank's outputs: a loss on the last stage only, auxiliary losses and counts of each piece's blocks.
        """
        self._start(inputs, share)
        numbers = torch.arange(len(inputs))
        self._schedule.step(index=numbers, target=numbers, return_outputs=False)
        return self._finish()

    @torch.no_grad()
    def evaluate(self, inputs: Sequence[MicroBatch], *, predicts: bool = False) -> list[ModelOutput]:
        """The same outputs from forward passes alone; on the last stage with the most likely tokens if asked for."""
        self._start(inputs, None)
        self.current.predicts = predicts
        numbers = torch.arange(len(inputs))
        self._schedule.eval(index=numbers, target=numbers, return_outputs=False)
        return self._finish()

    def _start(self, inputs: Sequence[MicroBatch], share: Share | None) -> None:
        rows, tokens = inputs[0].tokens_BT.shape
        assert all(entry.tokens_BT.shape == (rows, tokens) for entry in inputs), (
            "buffers have one shape for a whole step"
        )
        if self._shape != (len(inputs), rows, tokens):
            self._shape = (len(inputs), rows, tokens)
            self._schedule = self._build_schedule(*self._shape)
        self.current.inputs, self.current.share = inputs, share

    def _finish(self) -> list[ModelOutput]:
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

    def _build_stage(self, part: StagePart, rows: int, tokens: int) -> Stage:
        """With shapes given beforehand: the schedule would else find them with a forward and a backward pass of its own."""
        groups, piece = self.parallel.groups, part.piece
        if groups.sequence_parallel:
            tokens //= groups.tp.size()
        stream_BTD = torch.empty(
            rows,
            tokens,
            self.model.config.hidden_size,
            dtype=self.model.stream_dtype(),
            device="meta",
            requires_grad=True,
        )
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        place = self.model.pieces.index(piece) * groups.pp.size() + groups.pp.rank()
        return Stage(
            part,
            self.after_weights,
            place,
            self.section.num_pieces(),
            self.parallel.device,
            input_args=() if piece.is_first else (stream_BTD,),
            output_args=(loss if piece.is_last else stream_BTD,),
            group=groups.pp,
        )
