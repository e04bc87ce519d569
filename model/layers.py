"""Linear and embedding layers on Megatron-core's parallel ones: same weights, own initialisation, free at size 1.

On a tensor-parallel group of one rank a layer is a plain product or look-up on the weight that Megatron's layer holds.
On several ranks Megatron's forward and backward run, with its collectives: then every rank of `groups.tp` must call.
A layer holds its part of a whole parameter; which part is a `Shard`, from which initialisation and checkpoints cut and
join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import layers as megatron_layers
from torch import Tensor, nn
from torch.nn import functional

from kernels.linear.op import linear
from kernels.norm.op import rms_norm
from model.groups import ProcessGroupCollection


@dataclass(frozen=True)
class Shard:
    """How a whole parameter is cut over the tensor-parallel ranks: along `dim`, each segment by itself.

    `segments` are the whole sizes of the parts that stand one after the other along `dim` (a gate and an up matrix, say);
    each rank holds its slice of every segment. `per_expert`: dim 0 counts experts, and each has its own first values.
    """

    dim: int | None = None
    segments: tuple[int, ...] = ()
    per_expert: bool = False

    def take(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The part of a whole tensor that `rank` of `size` holds."""
        if self.dim is None or size == 1:
            return whole
        pieces = whole.split(list(self.segments), dim=self.dim)
        return torch.cat([piece.chunk(size, dim=self.dim)[rank] for piece in pieces], dim=self.dim)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor from the parts of all ranks, in rank order."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        local_segments = [segment // len(parts) for segment in self.segments]
        pieces = [part.split(local_segments, dim=self.dim) for part in parts]
        columns = [torch.cat(column, dim=self.dim) for column in zip(*pieces)]
        return torch.cat(columns, dim=self.dim)


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


def divide(total: int, groups: ProcessGroupCollection, name: str) -> int:
    """This rank's share of `total`. Raises ValueError where the tensor-parallel ranks do not divide it."""
    size: int = groups.tp.size()
    if total % size:
        raise ValueError(f"parallel.tensor={size} must divide {name}={total}; use a divisor of {total}")
    return total // size


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

    `segments` are the whole row counts of the matrices stacked in W; their sum is its rows.
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
    ) -> None:
        for segment in segments:
            divide(segment, groups, name)
        super().__init__(
            input_size,
            sum(segments),
            config=_megatron_settings(),
            init_method=_leave_alone,
            bias=False,
            tp_group=groups.tp,
        )
        self.is_single_rank: bool = groups.tp.size() == 1
        self.shards = {"weight": Shard(0, segments)}
        _drop_extra_state(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.is_single_rank:
            return linear(x, self.weight)
        y: Tensor = super().forward(x)[0]
        return y


class RowLinear(megatron_layers.RowParallelLinear):
    """y = sum over ranks of x W^T with the columns of W cut over the tensor-parallel ranks: [..., in of this rank] -> [..., out]."""

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
        self.is_single_rank: bool = groups.tp.size() == 1
        self.shards = {"weight": Shard(1, (input_size,))}
        _drop_extra_state(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if self.is_single_rank:
            return linear(x, self.weight)
        y: Tensor = super().forward(x)[0]
        return y


class VocabEmbedding(megatron_layers.VocabParallelEmbedding):
    """Rows of a table [V, D] by token, the vocabulary cut over the tensor-parallel ranks: ids [...] -> [..., D]."""

    def __init__(self, vocab_size: int, hidden_size: int, groups: ProcessGroupCollection) -> None:
        divide(vocab_size, groups, "model.vocab_size")
        super().__init__(
            vocab_size, hidden_size, init_method=_leave_alone, config=_megatron_settings(), tp_group=groups.tp
        )
        self.is_single_rank: bool = groups.tp.size() == 1
        self.shards = {"weight": Shard(0, (vocab_size,))}

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [...] -> [..., D]."""
        if self.is_single_rank:
            return functional.embedding(tokens, self.weight)
        rows: Tensor = super().forward(tokens)
        return rows


class Linear(nn.Module):
    """y = x W^T with the whole W on every rank."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight (Zhang and Sennrich 2019, arXiv 1910.07467, section 4), float32 inside."""

    def __init__(self, size: int, epsilon: float, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
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
