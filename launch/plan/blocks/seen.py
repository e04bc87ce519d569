"""What a pass of a block does, as a dispatch mode sees it on the meta device.

The storages that it makes and lets go of; its products with weights; the bytes that Triton kernels and PyTorch's operations
between them move, with those of attention and scans and their FLOPs on their own; and what is handed to collectives.

Each tensor counts once in an operation that reads it and once in one that writes it, with the numbers that it shows: what a
broadcast repeats is read once, what is looked up is read as often as it is written.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from amfm.kernels.common.custom_op import find_body
from amfm.launch.plan.activations import Product
from amfm.launch.plan.flops import KERNELS, name_arguments
from amfm.launch.plan.stand_ins import replaced

QUIET = ("detach", "lift_fresh", "_unsafe_view", "alias")  # operations that launch nothing
PRODUCTS = ("linear", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm")  # of which torch knows no FLOPs
LOOK_UPS = ("index_select", "index", "gather", "embedding", "take")
# Names that torch has for the factors of a product.
FACTORS = ("mat1", "batch1", "input", "self"), ("mat2", "batch2", "weight")
# What they write is all that they touch: `out` of a fill, and the first argument of a copy.
FILLS = (
    "fill_",
    "zero_",
    "zeros",
    "zeros_like",
    "ones",
    "ones_like",
    "full",
    "full_like",
    "new_zeros",
    "new_ones",
    "arange",
)
SCANS = (
    "scan",
    "mamba2",
    "delta",
)  # parts of the names of our operations whose FLOPs do not depend on a sequence's length


def launches(func: Any) -> bool:
    """Whether an operation launches a kernel on a GPU: views and empty tensors do not."""
    return not (func.is_view or "empty" in func._opname or func._opname in QUIET)


def is_between(func: Any) -> bool:
    """Whether an operation that launches is between kernels: one of PyTorch's that is neither product nor exchange.

    What keeps a gradient of the block's input is not: in a model other operations take it.
    """
    if func.namespace != "aten" or func._overloadpacket in flop_registry or func._opname in PRODUCTS:
        return False
    node = torch._C._current_autograd_node()
    return node is None or not node.name().endswith("AccumulateGrad")


def moved_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that one operation reads and writes."""
    read = {name: value for name, value in kwargs.items() if name != "out"}
    inputs = [leaf for leaf in tree_leaves((args, read)) if isinstance(leaf, Tensor)]
    written = shown_bytes(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    if func._opname in FILLS:
        return written
    if func._opname == "copy_":
        return written + shown_bytes(inputs[1:])
    if func._opname in LOOK_UPS:
        return 2 * written + shown_bytes(inputs[1:])
    return written + shown_bytes(inputs)


def shown_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the numbers that tensors show, each view once; dims that a broadcast repeats count once."""
    seen = {(each.untyped_storage()._cdata, each.storage_offset(), each.shape, each.stride()): each for each in tensors}
    total = 0
    for each in seen.values():
        count = each.itemsize
        for length, stride in zip(each.shape, each.stride()):
            count *= length if stride or length == 1 else 1
        total += count
    return total


class LiveBytes(TorchDispatchMode):
    """Inside its block, logs the storages that are made and let go, in order, and notes what is computed.

    `stacked`: shapes of weights that a pass may read more than once, of which all that is made is left out: it does not grow with
    tokens (`add_experts` has the sums of their gradients). Pairs are of the forward
    and of the backward pass, in which `pass_index` is 1: bytes of PyTorch's operations `between` kernels, of `kernels` without products, and
    of what mixes tokens (`mixed`); FLOPs of `scans`. `products`: those with weights, of the forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stacked: frozenset[torch.Size] = frozenset()
        self.launches = self.operations = self.pass_index = 0
        self.between, self.kernels, self.mixed, self.scans = [0, 0], [0, 0], [0, 0], [0, 0]
        self.products: list[Product] = []
        self.tokens = 1  # of the row
        self.most_operations: int | None = None
        self.log: list[tuple[int, int]] = []  # number of a storage, and its bytes, negative when it goes
        self.numbers: dict[int, int] = {}
        self.left_out: set[int] = set()
        self.handed: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
        self.weights: dict[int, str] = {}  # names by their storages
        self.made: dict[int, str] = {}  # and of what is made of weights only
        self.shapes: set[torch.Size] = set()

    def watch(self, mixer: torch.nn.Module) -> None:
        """Learn the weights with which products are noted."""
        for name, weight in mixer.named_parameters():
            self.weights[id_of(weight)] = name
            if weight.dim() > 1:
                self.shapes.add(weight.shape)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, or the body of one of Triton kernels, and note what it gives that is not a view."""
        body, kwargs = find_body(func), kwargs or {}
        self.operations += 1
        if self.most_operations is not None and self.operations > self.most_operations:
            raise LoopOverTokensError
        if body is None:
            out = func(*args, **kwargs)
            if launches(func):
                self.launches += 1
                self._compute(func, args, kwargs, out)
        else:
            if any(part in func._opname for part in SCANS) and func._opname in KERNELS:
                self.scans[self.pass_index] += KERNELS[func._opname](name_arguments(func, args, kwargs))
            with self:
                out = body(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = (
            [self.weight_of(each) for each in given] if self.pass_index == 0 and func._opname not in FILLS else [None]
        )
        known = {id_of(leaf) for leaf in given}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id_of(tensor) not in known and id_of(tensor) not in self.numbers:
                self._note(tensor)
                if names and all(names) and launches(func):
                    self.made[self.numbers[id_of(tensor)]] = str(names[0])
        return out

    def weight_of(self, tensor: Tensor) -> str | None:
        """The name of the weight that a tensor is, or of one that it is made of."""
        key = id_of(tensor)
        return self.weights.get(key) or self.made.get(self.numbers.get(key, -1))

    def _compute(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note an operation that is not ours: between kernels, a product with a weight, or one that mixes tokens."""
        if is_between(func):
            if getattr(out, "shape", None) not in self.stacked:
                self.between[self.pass_index] += moved_bytes(func, args, kwargs, out)
            return
        if func.namespace == "aten" and func._overloadpacket not in flop_registry and func._opname not in PRODUCTS:
            return
        given = name_arguments(func, args, kwargs)
        first, second = (
            next((given[name] for name in names if isinstance(given.get(name), Tensor)), None) for names in FACTORS
        )
        if second is None or first is None:
            self.mixed[self.pass_index] += moved_bytes(func, args, kwargs, out)
        elif self.pass_index == 0:
            name = self.weight_of(second) or self.weight_of(first)
            if name is None or (second.dim() > 2 and "convolution" in func._opname):
                for pass_index, times in ((0, 1), (1, 2)):  # backward has two of each
                    self.mixed[pass_index] += times * moved_bytes(func, args, kwargs, out)
            else:
                self.products.append(self._product(func, name, first, second, out))

    def _product(self, func: Any, name: str, first: Tensor, second: Tensor, out: Tensor) -> Product:
        """A product with a weight, which may be either factor."""
        inputs = first.shape[-1]
        if self.weight_of(second) is None:
            first, outputs = second, first.shape[-2]
            groups, numel = 1, second.numel()
        else:
            outputs = second.numel() // inputs
            groups = second.shape[0] if second.dim() == 3 else 1
            outputs, numel = outputs // groups, first.numel()
        is_wide = out.dtype == torch.float32 and first.dtype != torch.float32
        return Product(name, numel / inputs / self.tokens, inputs, outputs, groups, is_wide)

    def launch(self, kernel: Any, tensors: list[Tensor]) -> None:
        """Note a launch of a Triton kernel: a product with a weight is noted elsewhere, another one mixes tokens."""
        self.launches += 1
        moved = shown_bytes(tensors)
        if not multiplies(kernel):
            self.kernels[self.pass_index] += moved
        elif not any(each.dim() > 1 and (each.shape in self.shapes or self.weight_of(each)) for each in tensors):
            self.mixed[self.pass_index] += moved

    def leave_out(self, tensor: Tensor | None) -> None:
        """Count the storage of a weight's gradient in no sum."""
        if tensor is not None and id_of(tensor) in self.numbers:
            self.left_out.add(self.numbers[id_of(tensor)])

    def hand(self, axis: str, collective: str, tensor: Tensor) -> None:
        """Note what is handed to a collective."""
        self.handed[axis, collective, str(tensor.dtype).removeprefix("torch.")].append(tensor.nbytes)

    def held(self, begin: int = 0) -> tuple[int, int]:
        """Bytes that live now, and the most that lived at once since entry `begin` of the log."""
        sizes = [0 if number in self.left_out else size for number, size in self.log]
        held = list(accumulate(sizes))
        return held[-1], max(held[begin:], default=0)

    def _note(self, tensor: Tensor) -> None:
        storage, number = tensor.untyped_storage(), len(self.log)
        self.numbers[id_of(tensor)] = number
        self.log.append((number, storage.nbytes()))
        if tensor.shape in self.stacked:
            self.left_out.add(number)
        weakref.finalize(storage, self._let_go, id_of(tensor), number, storage.nbytes())

    def _let_go(self, key: int, number: int, size: int) -> None:
        if self.numbers.get(key) == number:
            del self.numbers[key]
        self.log.append((number, -size))


def id_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage, the same for all views of it."""
    return tensor.untyped_storage()._cdata


class LoopOverTokensError(Exception):
    """A pass has more operations than one that does not loop over tokens."""


def counted_launches(live: LiveBytes, note_launch: Callable[..., None]) -> AbstractContextManager[None]:
    """Inside the block, launches of Triton kernels are counted and noted, and do nothing."""
    from triton.runtime.jit import JITFunction

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def note(*args: Any, **named: Any) -> None:
            live.launch(kernel, [each for each in (*args, *named.values()) if isinstance(each, Tensor)])
            note_launch(kernel, *args, **named)

        return note

    return replaced([(JITFunction, "__getitem__", launch)])


@lru_cache(maxsize=1024)
def multiplies(kernel: Any) -> bool:
    """Whether a Triton kernel has products, or one of the functions that it calls."""
    code, known = kernel.fn.__code__, kernel.fn.__globals__
    if "dot" in code.co_names or "dot_scaled" in code.co_names:
        return True
    called = [known.get(name) for name in code.co_names]
    return any(multiplies(each) for each in called if type(each) is type(kernel))
