"""Initial values of every parameter: each a function of only the seed and the parameter's global name.

No generator runs from one parameter to the next, so a model starts equal on any layout of ranks, a pipeline rank draws its
own blocks only, and a block starts equal wherever else the pattern changes. Experts are drawn one by one under their global
number, so that an expert rank draws only those it holds. A large matrix is drawn in pieces along the dimension that ranks
cut, each from its own generator, and a rank draws the pieces that it holds a part of: no process holds a matrix whole,
and drawing takes the less time the more ranks share it. Values are drawn in float32 on the CPU, whose generator gives
the same numbers on every machine, and are then copied into the parameter's dtype and device.

Matrices are normal with deviation `initializer_range`; those that write into the residual stream are divided by the square
root of the number of blocks if `depth_scaled_init` is set, so that the residual stream's variance does not grow with depth
(Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3). `model.mup` scales them by the
model's width (mup.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from amfm.model.config.moe import BIAS_CHANNELS, MoeConfig
from amfm.model.config.mup import width_scales
from amfm.model.config.schema import ModelConfig
from amfm.model.loss import Head
from amfm.model.mixers.interface import Mixer
from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import Shard, parameter_shards
from amfm.model.structured import StructuredLinear

PIECE_VALUES = (
    2**24
)  # that one generator draws of a matrix, 64 MiB; another number gives larger models other first values

# Matrices that write into the residual stream. A latent expert's last matrix is latent_up, so experts.down is not one then.
_OUTPUT_PROJECTIONS = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "latent_up.weight")


@torch.no_grad()
def initialize_parameters(
    model: nn.Module,
    config: ModelConfig,
    groups: ProcessGroupCollection,
    seed: int,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fill every parameter of a wanted name in place, of a sharded one this rank's part. No collectives."""
    for name, parameter, shard in parameter_shards(model):
        if not wanted(name):
            continue
        shape = shard.whole_shape(parameter.shape)
        own = _own_values(model, name, shape, config, seed)
        if shard.per_expert:
            _fill_experts(name, parameter, shard, shape, config, groups, seed)
        elif own is not None:
            parameter.copy_(shard.shard(own, groups))
        else:
            fill_part(parameter, name, shard, shape, config, groups, seed)


def fill_part(
    part: Tensor,
    name: str,
    shard: Shard,
    shape: tuple[int, ...],
    config: ModelConfig,
    groups: ProcessGroupCollection,
    seed: int,
) -> None:
    """Fill this rank's part of a parameter of `shape`, a piece after the other, of those that it holds anything of."""
    special = _special_values(name, shape, config, seed)
    if special is not None:
        part.copy_(shard.shard(special, groups))
        return
    dim = shard.cuts[0].dim if shard.cuts else 0
    along = Shard(tuple(replace(cut, dim=0) for cut in shard.cuts if cut.dim == dim))
    across = Shard(tuple(cut for cut in shard.cuts if cut.dim != dim))
    own = along.shard(torch.arange(shape[dim]), groups)  # rising: segments stand one after the other
    for start, stop in _pieces(shape, dim):
        first, last = torch.searchsorted(own, torch.tensor([start, stop])).tolist()
        if last > first:
            piece = _normal_piece(name, shape, config, seed, dim, start, stop)
            values = piece.index_select(dim, own[first:last] - start)
            part.narrow(dim, first, last - first).copy_(across.shard(values, groups))


def _own_values(model: nn.Module, name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor | None:
    """Ask a factored matrix, a stream's reader or a mixer for the initial value of its parameter; None if that is this file's."""
    place, _, own_name = name.rpartition(".")
    layer = model.get_submodule(place)
    if isinstance(layer, StructuredLinear):
        deviation = _deviation(f"{place}.weight", config)
        gain = deviation / config.initializer_range
        return layer.first_values(own_name, lambda own: _generator(seed, f"{place}.{own}"), deviation, gain)
    first_value = getattr(layer, "first_value", None)  # of what reads a residual stream that is not a sum
    if first_value is not None:
        return cast(Tensor, first_value(own_name, shape))
    if isinstance(layer, Head):
        return layer.init_parameter(own_name, shape, _generator(seed, name))
    place, inside, own_name = name.partition(".mixer.")
    if not inside:
        return None
    return cast(Mixer, model.get_submodule(f"{place}.mixer")).init_parameter(own_name, shape, _generator(seed, name))


def _fill_experts(
    name: str,
    stack: Tensor,
    shard: Shard,
    shape: tuple[int, ...],
    config: ModelConfig,
    groups: ProcessGroupCollection,
    seed: int,
) -> None:
    """Fill a stack [experts of this rank, ...], each expert by its global number."""
    # The cut over experts comes first (see `Experts`); the others apply to one expert, which has one dimension less.
    by_expert, *inner = shard.cuts
    own = by_expert.shard(torch.arange(shape[0]), groups.ep.rank(), groups.ep.size())
    each = Shard(tuple(replace(cut, dim=cut.dim - 1) for cut in inner))
    for row, expert in zip(stack, own.tolist(), strict=True):
        fill_part(row, f"{name}.{expert}", each, shape[1:], config, groups, seed)
    dim = {"up": 2, "down": 1}.get(name.rpartition(".experts.")[2])
    moe = _experts_of(name, config)
    if dim is not None and moe is not None and moe.bias:
        # Biases begin at 0, and so does what fills their channels up (see `Experts`).
        stack.narrow(dim, -BIAS_CHANNELS, BIAS_CHANNELS).zero_()


def initial_values(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, *, dim: int = 0) -> Tensor:
    """Draw the whole initial value of a parameter (of one expert's, with `.{expert}` at the name's end), float32 on the CPU.

    `dim`: the one that ranks cut. Norms and D start at 1, biases of convolutions at 0, their taps uniform within
    1 / sqrt(W), a low-rank update at 0 (its first factor of unit gain), everything else normal; what a mixer draws itself
    (`Mixer.init_parameter`) is not asked for here.
    """
    special = _special_values(name, shape, config, seed)
    if special is not None:
        return special
    pieces = _pieces(shape, dim)
    return torch.cat([_normal_piece(name, shape, config, seed, dim, *piece) for piece in pieces], dim=dim)


def _pieces(shape: tuple[int, ...], dim: int) -> list[tuple[int, int]]:
    """Start and stop along `dim` of each piece of a matrix; the same on every layout."""
    length = max(1, PIECE_VALUES * shape[dim] // math.prod(shape))
    return [(start, min(start + length, shape[dim])) for start in range(0, shape[dim], length)]


def _normal_piece(
    name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, dim: int, start: int, stop: int
) -> Tensor:
    """Draw one piece of a matrix; the first goes only by the matrix's name, which is that of a matrix of one piece."""
    size = (*shape[:dim], stop - start, *shape[dim + 1 :])
    generator = _generator(seed, f"{name}/{start}" if start else name)
    return torch.empty(size).normal_(0.0, _deviation(name, config), generator=generator)


def _special_values(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor | None:
    """The first value of a parameter that is not drawn from `_deviation`'s normal distribution; None for one that is."""
    generator = _generator(seed, name)
    if name.endswith(("norm.weight", ".D")):
        return torch.ones(shape)
    if name.endswith("conv.bias") and config.megatron_init:
        assert config.mamba is not None, "only Mamba2's convolution has a bias"
        bound = config.mamba.conv_kernel**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name.endswith(("conv.bias", "norm.bias", "up_proj.bias", "down_proj.bias", "lora.up")):
        return torch.zeros(shape)
    if name.endswith("lora.down"):
        return torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator)
    if name.endswith("conv.weight"):
        bound = shape[-1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return None


def named_seed(seed: int, name: str) -> int:
    """Derive a number below 2^63, what torch's generators take, only from the seed and the name.

    A hash and not `seed + index`: neighbouring seeds must not give one parameter the values of another.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(named_seed(seed, name))


def _experts_of(name: str, config: ModelConfig) -> MoeConfig | None:
    """The section of the block of a parameter, where that has routed experts."""
    symbols = config.letters if name.startswith("blocks.") else config.parsed_pattern.depth_letters
    options = config.block_options(symbols[int(name.partition("blocks.")[2].partition(".")[0])])
    return options if isinstance(options, MoeConfig) else None


def _deviation(name: str, config: ModelConfig) -> float:
    is_output = name.endswith(_OUTPUT_PROJECTIONS)
    if ".experts.down." in name:
        moe = _experts_of(name, config)
        is_output = moe is None or moe.latent_size is None or config.megatron_init
    deviation = config.initializer_range * width_scales(name, config).deviation
    if config.depth_scaled_init and is_output:
        return deviation / math.sqrt(len(config.letters))
    return deviation
