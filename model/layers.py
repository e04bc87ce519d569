"""Linear and embedding layers on Megatron-core's parallel ones: same weights, own initialisation, free at size 1.

Megatron's layer holds the weight that this rank's part of the work needs, and the product is ours; the collectives stand
where a block enters and leaves its tensor-parallel part (`model/regions.py`), once for all layers inside. A layer holds
its part of a whole parameter; which part is a `Shard`, from which initialisation and checkpoints cut and join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import layers as megatron_layers
from torch import Tensor, nn
from torch.nn import functional

from kernels.linear.op import linear
from kernels.norm.op import rms_norm
from model.groups import ProcessGroupCollection

Axis = Literal["tp", "expt_tp", "ep", "embd"]


@dataclass(frozen=True)
class Cut:
    """How one dimension of a whole parameter is cut over the ranks of a group: each segment by itself.

    `segments` are the whole sizes of the parts that stand one after the other along `dim` (a gate and an up matrix, say);
    each rank holds its slice of every segment. `units` counts what cannot be cut in each segment (key-value heads, groups
    of B and C); where ranks outnumber them, neighbouring ranks hold copies of one unit. No `units`: any slice will do.
    """

    dim: int
    axis: Axis
    segments: tuple[int, ...]
    units: tuple[int, ...] = ()

    def slices(self, size: int) -> tuple[int, ...]:
        """In how many different slices `size` ranks hold each segment; rank r holds number r * slices // size."""
        units = self.units or self.segments
        for number in units:
            assert number % size == 0 or size % number == 0, f"{size} ranks cannot share {number} units of {self}"
        return tuple(min(number, size) for number in units)

    def local_segments(self, size: int) -> tuple[int, ...]:
        """Sizes of the slices that each of `size` ranks holds."""
        return tuple(segment // slices for segment, slices in zip(self.segments, self.slices(size)))

    def take(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """What `rank` of `size` holds of a tensor that is whole along `dim`."""
        pieces = whole.split(list(self.segments), dim=self.dim)
        own = [
            piece.chunk(slices, dim=self.dim)[rank * slices // size] for piece, slices in zip(pieces, self.slices(size))
        ]
        return torch.cat(own, dim=self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor whole along `dim` from the parts of all ranks of the axis, in rank order; of copies the first."""
        size = len(parts)
        pieces = [part.split(list(self.local_segments(size)), dim=self.dim) for part in parts]
        columns = [
            torch.cat([column[index * size // slices] for index in range(slices)], dim=self.dim)
            for column, slices in zip(zip(*pieces), self.slices(size))
        ]
        return torch.cat(columns, dim=self.dim)


@dataclass(frozen=True)
class Shard:
    """A parameter's place among the ranks: `cuts`, of different dimensions over different axes, and else replicated.

    `partial` names the axes over whose ranks the gradient of a replicated parameter is only a part: it must be summed
    over them before it is one (a norm of sequence-parallel tokens, or over `embd` a tied embedding that the first and the
    last pipeline stage hold). What a cut holds in copies is partial too.
    A cut over `ep` is of dim 0, which counts experts, and each expert has its own first values.
    """

    cuts: tuple[Cut, ...] = ()
    partial: tuple[Axis, ...] = ()

    @property
    def per_expert(self) -> bool:
        """Whether dim 0 counts experts."""
        return any(cut.axis == "ep" for cut in self.cuts)

    def take(self, whole: Tensor, groups: ProcessGroupCollection) -> Tensor:
        """The part of a whole tensor that this rank holds."""
        for cut in self.cuts:
            group = getattr(groups, cut.axis)
            whole = cut.take(whole, group.rank(), group.size())
        return whole

    def whole_shape(self, part_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole parameter, from that of any rank's part."""
        shape = list(part_shape)
        for cut in self.cuts:
            shape[cut.dim] = sum(cut.segments)
        return tuple(shape)


REPLICATED = Shard()


def parameter_shards(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """Every parameter of the model with its global name and how it is cut; a tied parameter comes once."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        shards: dict[str, Shard] = getattr(module, "shards", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{module_name}.{name}" if module_name else name, parameter, shards.get(name, REPLICATED)


# The axes that cut sizes, by the name of their setting below `parallel`.
_GROUPS = {"tensor": "tp", "expert_tensor": "expt_tp", "expert": "ep"}


def divide(total: int, groups: ProcessGroupCollection, name: str, *, axis: str = "tensor") -> int:
    """This rank's share of `total`. Raises ValueError where the ranks of the axis do not divide it."""
    size: int = getattr(groups, _GROUPS[axis]).size()
    if total % size:
        raise ValueError(f"parallel.{axis}={size} must divide {name}={total}; use a divisor of {total}")
    return total // size


def divide_units(total: int, groups: ProcessGroupCollection, name: str) -> int:
    """This rank's number of `total` key-value heads or groups, one where tensor ranks outnumber them.

    Raises ValueError where neither number divides the other.
    """
    size: int = groups.tp.size()
    if total % size and size % total:
        raise ValueError(f"parallel.tensor={size} must divide {name}={total} or be a multiple of it")
    return max(1, total // size)


def _megatron_settings() -> ModelParallelConfig:
    # CPU initialisation without performing it means "allocate on torch's current default device and leave it alone".
    return ModelParallelConfig(
        params_dtype=torch.get_default_dtype(), use_cpu_initialization=True, perform_initialization=False
    )


def _leave_alone(_: Tensor) -> None:
    """First values come from model/init.py."""


def _drop_extra_state(layer: nn.Module) -> None:
    # Megatron adds a Transformer Engine key to loaded state dicts; our checkpoints have parameters only.
    layer._load_state_dict_pre_hooks.clear()


class ColumnLinear(megatron_layers.ColumnParallelLinear):
    """y = x W^T with the rows of W cut over the tensor-parallel ranks: [..., in] -> [..., out of this rank].

    `segments` are the whole row counts of the matrices stacked in W, `units` what cannot be cut in each (see `Cut`).
    Its input comes from `enter_tensor_region`; `project_stream` enters and multiplies, once for all layers that read it.
    """

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
    ) -> None:
        if not units:
            for segment in segments:
                divide(segment, groups, name)
        cut = Cut(0, "tp", segments, units)
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
        _drop_extra_state(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out of this rank]."""
        return linear(x, self.weight)


class RowLinear(megatron_layers.RowParallelLinear):
    """This rank's part of y = x W^T with the columns of W cut over the tensor-parallel ranks: [..., in of this rank] -> [..., out].

    The parts are summed by `leave_tensor_region`.
    """

    get_extra_state: Callable[[nn.Module], object] = nn.Module.get_extra_state
    set_extra_state: Callable[[nn.Module, object], None] = nn.Module.set_extra_state

    def __init__(self, input_size: int, output_size: int, groups: ProcessGroupCollection, *, name: str) -> None:
        divide(input_size, groups, name)
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
        self.shards = {"weight": Shard((Cut(1, "tp", (input_size,)),))}
        _drop_extra_state(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in of this rank] -> [..., out], a part of the sum over ranks."""
        return linear(x, self.weight)


class VocabEmbedding(megatron_layers.VocabParallelEmbedding):
    """Rows of a table [V, D] by token, the vocabulary cut over the tensor-parallel ranks: ids [B, T] -> the stream [B, T, D].

    Under sequence parallel the stream has this rank's share of the tokens. Every rank of `groups.tp` must call.
    """

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
        self.shards = {"weight": Shard((Cut(0, "tp", (vocab_size,)),))}

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token ids [B, T] -> [B, T, D]."""
        if self.is_single_rank:
            return functional.embedding(tokens_BT, self.weight)
        rows: Tensor = super().forward(tokens_BT)
        # Megatron's reduce-scatter puts tokens first.
        return rows.transpose(0, 1) if self.reduce_scatter_embeddings else rows


def stream_shard(groups: ProcessGroupCollection) -> Shard:
    """The place of a whole weight that reads the stream between blocks: under sequence parallel each rank sees its tokens."""
    return Shard(partial=("tp",)) if groups.sequence_parallel else REPLICATED


class Linear(nn.Module):
    """y = x W^T with the whole W on every rank, over the stream between blocks."""

    def __init__(self, input_size: int, output_size: int, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        self.shards = {"weight": stream_shard(groups)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the stream (Zhang and Sennrich 2019, arXiv 1910.07467, section 4), float32 inside."""

    def __init__(self, size: int, epsilon: float, backend: str, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.shards = {"weight": stream_shard(groups)}
        self.epsilon = epsilon
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape, in the dtype of x."""
        y: Tensor = rms_norm(x, self.weight, self.epsilon, backend=self.backend)
        return y

    def add(self, delta: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(delta + residual), delta + residual) in one pass over memory, in the dtype of the residual."""
        delta = delta.to(residual.dtype)
        y, total = rms_norm(delta, self.weight, self.epsilon, residual=residual, backend=self.backend)
        return y, total


class KeepsBuffers(nn.Module):
    """A module whose buffers keep their float32 when its parameters are cast; they do move between devices."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsBuffers:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is None or after is None or after.dtype == before.dtype:
                continue
            # From the values before the cast: going through bf16 and back would round them.
            self._buffers[name] = after.to(before.dtype) if before.is_meta else before.to(after.device)
        return self
