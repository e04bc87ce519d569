"""Linear and embedding layers on Megatron-core's parallel ones, with our initial values and no cost on one rank.

Megatron's layer holds the weight that this rank's part of the work needs, and the product is ours; the collectives stand
where a block enters and leaves its tensor-parallel part (`model/parallel/regions.py`), once for all layers inside. A layer holds
its part of a whole parameter; which part is a `Shard`, from which initialisation and checkpoints cut and join.

What a fine-tune adds to a matrix: scale B (A x), two thin factors next to a weight that stays as it is (LoRA).

The factors follow the cut of their matrix, so that no collective is added. Next to a column layer A is whole on every
tensor rank, which reads the same tokens, and B is cut as the rows of W. Next to a row layer A is cut as the columns of
W and B is
whole: its parts leave the region in the sum that W's parts need anyway. Of a whole factor each rank has the gradient that
its own rows or columns give, a part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import layers as megatron_layers
from torch import Tensor, nn

from amfm.kernels.common.weight_gradients import embedding
from amfm.kernels.linear.op import linear
from amfm.kernels.norm.op import rms_norm
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.regions import leave_tensor_region, project_stream
from amfm.model.parallel.shards import REPLICATED, Shard, ShardSpec, divide, own_shapes


class LowRankUpdate(nn.Module):
    """The factors down [rank, in of this rank] and up [out of this rank, rank] of scale up (down x).

    `cut`: of the matrix next to it, of dim 0 for a column layer and dim 1 for a row layer. `gates` [..., rank]:
    what the numbers between both factors are multiplied by, token by token (model/routed_updates.py); none: nothing.
    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """

    extra_repr = own_shapes

    def __init__(self, weight_OI: Tensor, cut: ShardSpec, rank: int, scale: float) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        self.scale = scale
        self.gates: Tensor | None = None
        self.down = nn.Parameter(weight_OI.new_empty(rank, inputs))
        self.up = nn.Parameter(weight_OI.new_empty(outputs, rank))
        own, whole = Shard((replace(cut),)), Shard(partial=("tp",))
        self.shards = {"down": whole, "up": own} if cut.dim == 0 else {"down": own, "up": whole}

    def forward(self, x: Tensor) -> Tensor:
        """Compute the update of x [..., in of this rank] -> [..., out of this rank]."""
        return self.raise_rank(linear(x, self.down))

    def raise_rank(self, inner: Tensor) -> Tensor:
        """Compute the update from what `down` gives, [..., rank] -> [..., out of this rank]."""
        return linear(inner if self.gates is None else inner * self.gates, self.up) * self.scale


def _megatron_settings() -> ModelParallelConfig:
    """Settings under which Megatron's layers allocate their weight and do nothing else with it."""
    # CPU initialisation without performing it means "allocate on torch's current default device and do not fill it".
    return ModelParallelConfig(
        params_dtype=torch.get_default_dtype(), use_cpu_initialization=True, perform_initialization=False
    )


def _leave_alone(_: Tensor) -> None:
    """Initialise nothing: initial values come from model/init.py."""


def _drop_extra_state(layer: nn.Module) -> None:
    # Megatron adds a Transformer Engine key to loaded state dicts; our checkpoints have parameters only.
    layer._load_state_dict_pre_hooks.clear()


class ColumnLinear(megatron_layers.ColumnParallelLinear):
    """y = x W^T with the rows of W sharded over the tensor-parallel ranks: [..., in] -> [..., out of this rank].

    `segments` are the whole row counts of the matrices stacked in W, `units` what cannot be cut in each (see `ShardSpec`).
    Its input comes from `enter_tensor_region`; `project_layers` enters and multiplies, once for all layers that read it.
    `bias`: one number per row, cut as the rows. `lora`: what a fine-tune adds to W (model/lora.py).
    """

    lora: LowRankUpdate | None

    get_extra_state: Callable[[nn.Module], object] = nn.Module.get_extra_state
    set_extra_state: Callable[[nn.Module, object], None] = nn.Module.set_extra_state

    def __init__(
        self,
        input_size: int,
        segments: tuple[int, ...],
        groups: ProcessGroupCollection,
        *,
        name: str,
        units: tuple[int, ...] = (),
        bias: bool = False,
    ) -> None:
        # Without units any slice will do, but slices must be equal; with units `ShardSpec` allows copies of a unit.
        if not units:
            for segment in segments:
                divide(segment, groups, name)
        cut = ShardSpec(0, "tp", segments, units)
        num_ranks = groups.tp.size()
        super().__init__(
            input_size,
            sum(cut.local_segments(num_ranks)) * num_ranks,
            config=_megatron_settings(),
            init_method=_leave_alone,
            bias=False,
            tp_group=groups.tp,
        )
        self.shards = {"weight": Shard((cut,))}
        if bias:
            self.bias = nn.Parameter(torch.empty(len(self.weight)))
            self.shards["bias"] = Shard((cut,))
        self.lora = None
        _drop_extra_state(self)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] -> [..., out of this rank]."""
        y = add_bias(linear(x, self.weight), self.bias)
        return y if self.lora is None else y + self.lora(x)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias [out] where a layer has one."""
    return y if bias is None else y + bias


def project_layers(x_BTD: Tensor, layers: Sequence[ColumnLinear], groups: ProcessGroupCollection) -> tuple[Tensor, ...]:
    """Enter the tensor region and multiply all tokens by each layer, as `project_stream` does by weights: [B, T, out].

    The first factor of a low-rank update reads the residual stream next to the layer's own weight.
    """
    read = [
        weight
        for layer in layers
        for weight in ([layer.weight] if layer.lora is None else [layer.weight, layer.lora.down])
    ]
    products = iter(project_stream(x_BTD, read, groups))
    outputs = []
    for layer in layers:
        y_BTX = add_bias(next(products), layer.bias)
        outputs.append(y_BTX if layer.lora is None else y_BTX + layer.lora.raise_rank(next(products)))
    return tuple(outputs)


class RowLinear(megatron_layers.RowParallelLinear):
    """This rank's part of y = x W^T, the columns of W sharded over the tensor-parallel ranks: [..., in of this rank] -> [..., out].

    `segments`: sizes of what the input joins, each cut on its own; by default it is one.

    The parts are summed by `leave_tensor_region`, once for all that a block computes, and not in this layer: under sequence
    parallelism the sum is a reduce-scatter over tokens, which is the business of the region and not of a matrix.
    `bias` [out] is whole on every rank, and added once, to the sum: `leave` does both. `lora`: what a fine-tune adds to W (model/lora.py).
    """

    lora: LowRankUpdate | None

    get_extra_state: Callable[[nn.Module], object] = nn.Module.get_extra_state
    set_extra_state: Callable[[nn.Module, object], None] = nn.Module.set_extra_state

    def __init__(
        self,
        input_size: int,
        output_size: int,
        groups: ProcessGroupCollection,
        *,
        name: str,
        segments: tuple[int, ...] = (),
        bias: bool = False,
    ) -> None:
        segments = segments or (input_size,)
        for segment in segments:
            divide(segment, groups, name)
        super().__init__(
            input_size,
            output_size,
            config=_megatron_settings(),
            init_method=_leave_alone,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=groups.tp,
        )
        self.shards = {"weight": Shard((ShardSpec(1, "tp", segments),))}
        if bias:
            self.bias = nn.Parameter(torch.empty(output_size))
            self.shards["bias"] = stream_shard(groups)
        self.lora = None
        _drop_extra_state(self)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in of this rank] -> [..., out], one addend of the sum over ranks."""
        y = linear(x, self.weight)
        return y if self.lora is None else y + self.lora(x)

    def leave(self, x: Tensor, groups: ProcessGroupCollection) -> Tensor:
        """Multiply, sum over ranks into the residual stream, and add the bias. Every rank of `groups.tp` must call."""
        return add_bias(leave_tensor_region(self(x), groups), self.bias)


class VocabEmbedding(megatron_layers.VocabParallelEmbedding):
    """Embedding table [V, D], the vocabulary sharded over the tensor-parallel ranks: ids [B, T] -> the residual stream [B, T, D].

    Under sequence parallel the residual stream has this rank's share of the tokens. Every rank of `groups.tp` must call.
    """

    extra_repr = own_shapes

    def __init__(self, vocab_size: int, hidden_size: int, groups: ProcessGroupCollection) -> None:
        divide(vocab_size, groups, "model.vocab_size")
        super().__init__(
            vocab_size,
            hidden_size,
            init_method=_leave_alone,
            reduce_scatter_embeddings=groups.sequence_parallel and groups.tp.size() > 1,
            config=_megatron_settings(),
            tp_group=groups.tp,
        )
        self.is_single_rank: bool = groups.tp.size() == 1
        self.groups = groups
        self.shards = {"weight": Shard((ShardSpec(0, "tp", (vocab_size,)),))}

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Look up token ids [B, T] -> [B, T, D]."""
        if self.is_single_rank:
            return embedding(tokens_BT, self.weight)
        # As Megatron's layer does, whose look-up is torch's. A row that another rank has is one of zeros.
        is_other_BT = (tokens_BT < self.vocab_start_index) | (tokens_BT >= self.vocab_end_index)
        own_BTD = embedding((tokens_BT - self.vocab_start_index).masked_fill(is_other_BT, 0), self.weight)
        own_BTD = own_BTD.masked_fill(is_other_BT[..., None], 0.0)
        return leave_tensor_region(own_BTD, self.groups)


def stream_shard(groups: ProcessGroupCollection) -> Shard:
    """Shard of a replicated weight that reads the residual stream: under sequence parallelism each rank sees only its tokens."""
    return Shard(partial=("tp",)) if groups.sequence_parallel else REPLICATED


class Linear(nn.Module):
    """y = x W^T (plus a bias) with the whole W on every rank, over the residual stream between blocks.

    For narrow outputs (router logits, latents), where a collective would cost more than computing them on every rank.
    """

    def __init__(
        self, input_size: int, output_size: int, groups: ProcessGroupCollection, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        self.bias = nn.Parameter(torch.empty(output_size)) if bias else None
        self.shards = {name: stream_shard(groups) for name in ("weight", "bias")[: 1 + bias]}

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] -> [..., out]."""
        return add_bias(linear(x, self.weight), self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the residual stream (Zhang and Sennrich 2019, arXiv 1910.07467, section 4), float32 inside."""

    extra_repr = own_shapes

    def __init__(self, size: int, epsilon: float, backend: str, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.shards = {"weight": stream_shard(groups)}
        self.epsilon = epsilon
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size], keeping shape and dtype."""
        y: Tensor = rms_norm(x, self.weight, self.epsilon, backend=self.backend)
        return y

    def add(self, delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (norm(delta + residual), delta + residual) in one pass over memory, in the dtype of the residual."""
        delta = delta.to(residual.dtype)
        y, total = rms_norm(delta, self.weight, self.epsilon, residual=residual, backend=self.backend)
        return y, total


class Float32Buffers(nn.Module):
    """A module whose buffers stay float32 when its parameters are cast; they do move between devices.

    Balancing biases and rotary frequencies lose what they are for in bf16: steps of 0.001 and angles of distant positions.
    """

    extra_repr = own_shapes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is None or after is None or after.dtype == before.dtype:
                continue
            # From the values before the cast: going through bf16 and back would round them.
            self._buffers[name] = after.to(before.dtype) if before.is_meta else before.to(after.device)
        return self
