"""The few values that a simulated rank knows: integers and masks that come from the host, carried along on the CPU.

A fake tensor has a shape and no values, but what a step asks of the device (how many documents, how many rows for each
rank) follows from small integer tensors that began on the host. Their storages have a real twin here. A twin is dropped
as soon as something unknown is written into it. Collectives answer as if every rank held what this one holds.

The choices that a simulated router makes: even over the ranks that hold experts, and spread as a real router's are.

How it works: each block of as many tokens as there are expert ranks draws K different experts, and each of its tokens has
them moved on by as many ranks as its place says, around the end. So every rank gets equally many tokens, no token has an
expert twice, and how many ranks a token's choices are on, which is how many rows are sent, is that of random draws. A step
has few blocks where ranks are many: then more sets are drawn, sorted by the ranks that they reach, and every k-th is
taken, so that the mean is that of many; and they are put in an order in which the mean of every stretch is near that, since
tensor ranks and halves take stretches. Seeds are fixed: a trace gives the same numbers again.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from amfm.kernels.moe.capacity import drop_overflow

GOLDEN = (math.sqrt(5) - 1) / 2  # Knuth, The Art of Computer Programming 3, section 6.4, theorem S
LEAST_DRAWS = 2048  # then the mean number of ranks is within some tenths of a percent


@lru_cache(maxsize=4)
def spread_choices(
    tokens: int, top_k: int, num_experts: int, expert_ranks: int = 1, num_groups: int = 1, group_top_k: int = 1
) -> Tensor:
    """Expert ids [tokens, K] int64; with router groups of experts those of a token are in `group_top_k` of them."""
    group_size, held = num_experts // num_groups, num_experts // expert_ranks
    blocks = -(-tokens // expert_ranks)
    every = -(-LEAST_DRAWS // blocks)
    seed = torch.Generator().manual_seed(0)
    group_NG = torch.rand(every * blocks, num_groups, generator=seed).argsort(1)[:, :group_top_k]
    place_NK = torch.rand(every * blocks, group_top_k * group_size, generator=seed).topk(top_k).indices
    expert_NK = group_NG.gather(1, place_NK // group_size) * group_size + place_NK % group_size
    rank_NK = (expert_NK // held).sort(1).values
    reached_N = (rank_NK[:, 1:] != rank_NK[:, :-1]).sum(1)
    taken_N = reached_N.argsort(stable=True)[every // 2 :: every]
    # In an order in which every stretch has few and many: steps of the golden part of a circle leave no gaps.
    step = next(step for step in count(round(GOLDEN * blocks)) if math.gcd(step, blocks) == 1)
    expert_NK = expert_NK[taken_N[(blocks // 2 + torch.arange(blocks) * step) % blocks]]
    # By whole ranks, and where those are smaller than a router's group first inside it, then from group to group.
    moved_P = torch.arange(expert_ranks) * held
    inside_NPK = (expert_NK[:, None] + moved_P[:, None]) % group_size
    group_NPK = (expert_NK[:, None] // group_size + moved_P[:, None] // group_size) % num_groups
    return (group_NPK * group_size + inside_NPK).flatten(0, 1)[:tokens]


# Larger ones are data that nothing on the host reads.
MOST_NUMBERS = 1 << 22


class KnownValues:
    """Real CPU twins of fake storages, by storage identity."""

    def __init__(self) -> None:
        self.twins: dict[int, Tensor] = {}
        self.expert_ranks = 1  # over which a router's choices are even

    def of(self, tensor: Tensor) -> Tensor | None:
        """Values of a tensor as a real CPU tensor that shares memory with the twin; None if unknown."""
        if not isinstance(tensor, FakeTensor):
            return tensor if tensor.device.type == "cpu" else None
        if tensor.constant is not None:
            return tensor.constant
        twin = self.twins.get(tensor.untyped_storage()._cdata)
        if twin is None:
            return None
        with real_tensors():
            whole = twin.view(tensor.dtype)
            return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def read(self, tensor: Tensor) -> Any:
        """Values of a tensor as Python numbers, as `tolist` gives them; None if unknown."""
        known = self.of(tensor)
        if known is None:
            return None
        with real_tensors():
            return known.tolist()

    def record(self, tensor: Tensor, values: Tensor) -> None:
        """Set the values of a tensor, and with them its storage's twin; large storages stay unknown."""
        storage = tensor.untyped_storage()
        if storage.nbytes() > 8 * MOST_NUMBERS:
            return
        with real_tensors():
            twin = torch.zeros(-(-storage.nbytes() // 8) * 8, dtype=torch.uint8)
            own = twin.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            own.copy_(values)
        if storage._cdata not in self.twins:
            weakref.finalize(storage, self.twins.pop, storage._cdata, None)
        self.twins[storage._cdata] = twin

    def forget(self, tensor: Tensor) -> None:
        """Drop the twin of a tensor's storage after something unknown was written to it."""
        self.twins.pop(tensor.untyped_storage()._cdata, None)

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Result of an operation on the twins, in-place writes included.

        None if an input is unknown, a float or large: only small integers steer the host.
        """
        if func.namespace == "amfm":
            return None  # kernels do not run here; `assume` says what follows of them
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        values = {}
        for tensor in tensors:
            if tensor.is_floating_point() or tensor.numel() > MOST_NUMBERS or (known := self.of(tensor)) is None:
                return None
            values[id(tensor)] = known
        if not tensors and math.prod(created_shape(func, args, kwargs)) > MOST_NUMBERS:
            return None
        twin_args, twin_kwargs = tree_map_only(Tensor, lambda tensor: values[id(tensor)], (args, kwargs))
        if twin_kwargs.get("device") is not None:
            twin_kwargs = {**twin_kwargs, "device": torch.device("cpu")}
        twin_kwargs.pop("pin_memory", None)
        with real_tensors():
            return func(*twin_args, **twin_kwargs)

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Update twins after an operation on fake tensors.

        Integer results of known inputs become known; what unknown values were written to is dropped.
        """
        written: list[Tensor] = [tensor for tensor in written_tensors(func, args, kwargs) if is_fake(tensor)]
        results: list[Tensor] = [tensor for tensor in leaves(out) if is_fake(tensor)]
        if not any(not tensor.is_floating_point() for tensor in results):
            for tensor in written:
                self.forget(tensor)
            return
        inputs = {
            tensor.untyped_storage()._cdata for tensor in leaves((args, kwargs)) if isinstance(tensor, FakeTensor)
        }
        fresh = [tensor for tensor in results if tensor.untyped_storage()._cdata not in inputs]
        if not fresh and not written:
            return  # views of what is known already
        found = self.compute(func, args, kwargs)
        if found is None:
            for tensor in written:
                self.forget(tensor)
            return
        for tensor, values in zip(leaves(out), leaves(found)):
            if any(tensor is each for each in fresh):
                self.record(tensor, values)

    def assume(self, func: Any, args: Any, out: Any) -> None:
        """Assume balanced routing (`values.py`): all ranks that hold experts get equally many tokens.

        Scores are unknown, so nothing better is known of the choice; `--trace` therefore shows a balanced router's
        memory. How choices fall on experts follows from them.
        """
        if func._opname == "sort_pairs_triton":
            chosen = self.of(args[0])
            if chosen is not None:
                with real_tensors():
                    counts = torch.bincount(chosen.flatten(), minlength=args[1])
                self.record(out[3], counts)
            return
        if func._opname in ("limit_pairs_triton", "recycle_pairs_triton"):
            # Which expert gets a recycled choice is not followed: a balanced router has few, and they are taken for lost.
            chosen = self.of(args[0])
            if chosen is not None:
                with real_tensors():
                    kept = drop_overflow(chosen, *args[1:3])
                self.record(out, kept)
            return
        if func._opname == "route_triton":
            ids_RK, _, counts_E, _ = out
            experts = counts_E.shape[0]
            with real_tensors():
                chosen = spread_choices(*ids_RK.shape, experts, self.expert_ranks, *args[6:8])
                counts = torch.bincount(chosen.flatten(), minlength=experts)
            self.record(ids_RK, chosen)
            self.record(counts_E, counts)
        elif func._opname == "topk" and not out[1].is_floating_point():
            with real_tensors():
                chosen = torch.arange(out[1].shape[-1]).expand(out[1].shape)
            self.record(out[1], chosen)


def real_tensors() -> Any:
    """Inside, operations are real: neither fake nor traced, and without gradients."""
    return _RealTensors()


class _RealTensors:
    """Context that leaves all dispatch modes, gradients and fake tensors for its block."""

    def __enter__(self) -> None:
        self.contexts = (_disable_current_modes(), torch.no_grad(), unset_fake_temporarily())
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is fake: shape and dtype without values."""
    return isinstance(tensor, FakeTensor)


def leaves(value: Any) -> Iterator[Tensor]:
    """Tensors among arguments or results, in order."""
    yield from (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def written_tensors(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Arguments that an operation writes to, by its schema."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from leaves(value)


def created_shape(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Shape of what a factory function makes; for a range the largest bound stands for its length."""
    if func is torch.ops.aten.scalar_tensor.default:
        return ()  # its argument is the number itself
    if args and isinstance(args[0], (list, tuple)):
        return tuple(int(size) for size in args[0])
    numbers = [value for value in args if isinstance(value, (int, float))]
    return (int(max([abs(value) for value in numbers], default=0)),)
