"""The global gradient norm under any layout: every element of the model counts once, however many ranks hold it.

DeepSpeed's wrappers compute norms of what is on a rank. With tensor, expert and pipeline ranks that counts elements twice
that several ranks hold (norms, routers, key-value heads, tied embeddings), and ranks that clip by different norms drift
apart. So each rank divides the squares of its elements by the number of ranks that hold a copy (`count_copies`, from the
shards), one all-reduce adds them up, and `install` puts the result where DeepSpeed would compute its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from amfm.model.parallel.groups import ProcessGroupCollection
from amfm.model.parallel.shards import Shard, parameter_shards
from amfm.pretrain.parallel import Parallel, set_deepspeed_accelerator

set_deepspeed_accelerator()

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # noqa: E402
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402

# A parameter, a range of what is kept for it on this rank, and where in the flat parameter that begins.
Piece = tuple[nn.Parameter, Tensor, int]


class GlobalNorm:
    """Computes the norm of a module's gradients, and gives it to DeepSpeed's wrapper (`install`), so that all ranks agree."""

    def __init__(self, module: nn.Module, parallel: Parallel) -> None:
        self.parallel = parallel
        self.copies = {
            id(parameter): count_copies(shard, tuple(getattr(parameter, "ds_shape", parameter.shape)), parallel.groups)
            for _, parameter, shard in parameter_shards(module)
        }
        self._divisors: dict[tuple[int, ...], Tensor] = {}

    def of_whole(self, parameters: list[nn.Parameter]) -> Tensor:
        """Compute the norm where every data rank holds whole gradients (ZeRO 0). Every rank must call this."""
        pieces = [(p, p.grad, 0) for p in parameters if p.grad is not None]
        return self._reduce(pieces, self.parallel.groups.mp if self.parallel.groups.mp.size() > 1 else None)

    def of_ranges(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute the norm where each element is on one data rank: (parameter, range of its gradient, where it starts)."""
        return self._reduce(pieces, torch.distributed.group.WORLD if self.parallel.world_size > 1 else None)

    def _reduce(self, pieces: Sequence[Piece], group: Any) -> Tensor:
        """Sum squares over copies, in float32, then over the group; returns the root as a scalar on the device."""
        total = torch.zeros((), dtype=torch.float32, device=self.parallel.device)
        for squares, _ in self.squares(pieces):
            total += squares.sum()
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
        return total.sqrt()

    def squares(self, pieces: Sequence[Piece]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """Yield squares of pieces, divided by the number of ranks that hold a copy, with the parameters that they are of.

        In float32, [parameters] each, which are named by `id`. Parameters with one number of copies go through one fused norm; the
        others are divided element by element. Communicates nothing.
        """
        plain = [(id(p), values, own) for p, values, _ in pieces if isinstance(own := self.copies[id(p)], int)]
        if plain:
            names, tensors, copies = zip(*plain)
            squares = torch.stack(torch._foreach_norm([values.float() for values in tensors])).square()
            yield squares / self._divisor(copies, squares.device), names
        for parameter, values, start in pieces:
            held = self.copies[id(parameter)]
            if isinstance(held, Tensor):
                flat = values.flatten().float()
                yield (flat.square() / held[start : start + flat.numel()].to(flat.device)).sum()[None], (id(parameter),)

    def gradient_pieces(self, engine: Any) -> list[Piece]:
        """The reduced gradients on this rank under any ZeRO stage, after `ZeroEngine.accumulate` and before the step."""
        if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
            return list(_ranges_of_stage3(engine.optimizer))
        if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
            return list(_ranges_of_partitions(engine.optimizer))
        return [(p, p.grad, 0) for p in engine.module.parameters() if p.grad is not None]

    def _divisor(self, copies: tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers of copies on the device, made once: the host waits for such a copy."""
        if copies not in self._divisors:
            self._divisors[copies] = torch.tensor(copies, device=device)
        return self._divisors[copies]

    def install(self, engine: Any) -> None:
        """Make DeepSpeed's wrapper ask for this norm; plain AdamW (ZeRO 0 in float32) has no wrapper, and the caller asks."""
        optimizer = engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer._get_norm_groups = lambda: [self.of_ranges(list(_ranges_of_stage3(optimizer)))]
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            optimizer.scaled_global_norm = lambda norm_type=2: self.of_ranges(list(_ranges_of_partitions(optimizer)))
            # DeepSpeed rejects a norm that is not finite, and this one is of all ranks: it need not look for such gradients before.
            optimizer.check_overflow = lambda partition_gradients=True: None
        elif isinstance(optimizer, FP16_UnfusedOptimizer):
            optimizer.unscale_and_clip_grads = self._clip_after(optimizer, optimizer.unscale_and_clip_grads)
        else:
            assert isinstance(optimizer, torch.optim.Optimizer), f"no norm for a {type(optimizer).__name__}"

    def _clip_after(self, optimizer: Any, clip: Callable[..., Any]) -> Callable[..., Any]:
        """Make the unfused wrapper clip by this norm instead of its own."""

        def clip_by_global_norm(total_norm: Any, apply_scale: bool = True) -> Any:
            norm = self.of_whole([parameter for group in optimizer.fp16_groups for parameter in group])
            optimizer._global_grad_norm = norm
            return clip(norm, apply_scale)

        return clip_by_global_norm


def _ranges_of_partitions(optimizer: Any) -> Iterator[Piece]:
    """ZeRO 1 and 2: this rank's range of each parameter in its partition, reduced (engine/buckets.py)."""
    for index, members in enumerate(optimizer.params_in_partition):
        if optimizer.cpu_offload:
            flat = optimizer.single_partition_of_fp32_groups[index].grad
        else:
            flat = optimizer.averaged_gradients[index].flat_partition
        for parameter in members:
            here = parameter._hp_mapping.lp_fragment_address
            place = parameter._hp_mapping.get_hp_fragment_address()
            yield parameter, flat[place.start : place.start + place.numel], here.start


def _ranges_of_stage3(optimizer: Any) -> Iterator[Piece]:
    """ZeRO 3: every parameter is cut into equal ranges, the last of them padded with zeros."""
    for index, members in enumerate(optimizer.fp16_groups):
        for place, parameter in enumerate(members):
            _, flat_start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = length * optimizer._get_param_partition_rank(parameter)
            numel = max(0, min(length, parameter.ds_numel - start))
            if optimizer.offload_optimizer:
                flat = optimizer.fp32_partitioned_groups_flat[index].grad
                yield parameter, flat[flat_start : flat_start + numel], start
            else:
                yield parameter, optimizer.averaged_gradients[index][place].flatten()[:numel], start


def count_copies(shard: Shard, shape: tuple[int, ...], groups: ProcessGroupCollection) -> int | Tensor:
    """Count the ranks within one data share that hold each element: one number, or one for each element of the flat tensor.

    `shape` is that of this rank's part.
    """
    if shard.per_expert:
        return 1
    if not shard.cuts:
        return int(groups.tp.size())
    ends = int(groups.embd.size()) if "embd" in shard.partial else 1
    (cut,) = shard.cuts
    size = getattr(groups, cut.axis).size()
    copies = [ends * size // slices for slices in cut.slices(size)]
    if len(set(copies)) == 1:
        return copies[0]
    along = torch.cat(
        [torch.full((length,), float(number)) for length, number in zip(cut.local_segments(size), copies)]
    )
    return along.view([-1 if dim == cut.dim else 1 for dim in range(len(shape))]).expand(shape).flatten()
