"""What stands in where one block is measured: a cut of the layout, groups, answers of the host, a device, and Triton.

Triton has a stand-in where it is not installed, as on macOS, so that a plan for GPUs can be made there too. Measuring a block runs the Python bodies of Triton operations and launches nothing. For that a kernel need not be
compiled: its file has to be imported, and its launches counted. So while blocks are measured, and only where Triton is
missing, an importer at the end of the list answers for `triton` and all modules below it. A name that it is asked for is
a class that takes what it is given; what host code computes with is real (`cdiv`, `next_power_of_2`), and a kernel is an
object whose launches can be counted. Nothing runs on a device through it, and it is gone again afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from amfm.kernels.runtime import backend
from amfm.kernels.runtime.compiling import use_deterministic_algorithms
from amfm.model.config.low_precision import LowPrecisionConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.moe.transfer import expected_ranks
from amfm.model.parallel.groups import AXES, ProcessGroupCollection, RowCapacity, SingleRankGroup, count_places

# Collectives by a part of the names that torch has for them.
COLLECTIVES = {
    "reduce_scatter": "reduce_scatter",
    "gather": "all_gather",
    "all_to_all": "all_to_all",
    "alltoall": "all_to_all",
    "reduce": "all_reduce",
}
NoteHanded = Callable[[str, str, Tensor], None]
# Tokens of a rank's row whose pass is counted: chunks, windows and segments of the usual sizes, and not the width of a weight.
COUNTED_TOKENS = 4608


@dataclass(frozen=True)
class Cut:
    """What of a layout decides how large a block is on a rank: the ranks that share it, and what its experts get.

    `in_slots`: whether rows to experts are in slots of a capacity. Else they have `room` (`RowCapacity`), or `sent` rows of a token
    are sent, once to each rank of its experts, and the most loaded rank gets `rows` times the mean. `in_halves`: of a micro-batch. `is_split`: whether weight
    gradients are left for later. `narrow`: the recipe by which its products are made, None without.
    `context_rank`: whose part of a row it is.
    """

    tensor: int = 1
    is_sequence_parallel: bool = False
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    in_halves: bool = False
    in_slots: bool = False
    sent: float = 0.0
    rows: float = 1.0
    room: float | None = None
    is_split: bool = False
    narrow: LowPrecisionConfig | None = None
    context_rank: int = 0

    def groups(self, note: NoteHanded = lambda *_: None) -> ProcessGroupCollection:
        """The groups of the first rank, each of its axis' size; `note` gets what is handed to their collectives."""
        inside = self.expert_tensor if self.expert > 1 else self.tensor
        sizes = {"tp": self.tensor, "cp": self.context, "ep": self.expert, "expt_tp": inside}
        groups = ProcessGroupCollection(**{axis: StandInGroup(sizes.get(axis, 1), axis, note) for axis in AXES})
        groups.sequence_parallel, groups.overlap_experts = self.is_sequence_parallel, self.in_halves
        groups.row_capacity = None if self.room is None else RowCapacity(self.room, torch.device("meta"))
        return groups


WHOLE = Cut()


class JITFunction:
    """A kernel that is launched and computes nothing; `measured.py` counts its launches."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn, self.__name__ = function, function.__name__

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Make a kernel of a function, as a decorator with or without options."""
    return JITFunction if function is None else JITFunction(function)


def cdiv(number: int, divisor: int) -> int:
    """Divide, rounding up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Find the least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


class _AnyName(type):
    """Of a class that any name is: `tl.float32`, `tl.constexpr`, an error that is caught."""

    def __getattr__(cls, name: str) -> Any:
        return _make_name(name)


def _make_name(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyName(name, (Exception,), {"__init__": lambda self, *_, **__: None})


class _Module(ModuleType):
    """A module of the stand-in: real where host code computes with it, else any name."""

    def __getattr__(self, name: str) -> Any:
        known = {"jit": jit, "cdiv": cdiv, "next_power_of_2": next_power_of_2, "JITFunction": JITFunction}
        return known[name] if name in known else _make_name(name)


class _Importer(MetaPathFinder, Loader):
    """Finds `triton` and all modules below it, if nothing else has found them; private ones, which torch probes for, it has not."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """A specification with this object as its loader, for names below `triton`."""
        package, *names = fullname.split(".")
        is_public = package == "triton" and not any(name.startswith("_") for name in names)
        return ModuleSpec(fullname, self, is_package=True) if is_public else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make a module of any names."""
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: there is no code."""


@contextmanager
def assume_triton() -> Iterator[None]:
    """Let kernels' files be imported inside of the block, whether Triton is installed or not."""
    if find_spec("triton") is not None:
        yield
        return
    importer, refuse = _Importer(), backend.refuse_triton
    sys.meta_path.append(importer)
    backend.refuse_triton = lambda device: None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.meta_path.remove(importer)
        backend.refuse_triton = refuse
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            del sys.modules[name]


@contextmanager
def any_order() -> Iterator[None]:
    """Let libraries choose kernels inside of the block whose sums have any order, whatever this process asks of its own."""
    asked, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    use_deterministic_algorithms(False, warn_only=warns)
    try:
        yield
    finally:
        use_deterministic_algorithms(asked, warn_only=warns)


class StandInGroup(SingleRankGroup):
    """The first rank's process group of any size; a collective is over at once, its result as it was allocated.

    `note` gets the group's axis, the collective, and what is handed in.
    """

    def __init__(self, size: int, axis: str = "", note: NoteHanded = lambda *_: None) -> None:
        self._size, self._axis, self._note = size, axis, note

    def size(self) -> int:
        """Ranks in the group."""
        return self._size

    def wait(self) -> bool:
        """Wait for a collective, which its caller takes this group for."""
        return True

    def __getattr__(self, name: str) -> Callable[..., StandInGroup]:
        # Releases of torch call a group's collectives by different names.
        if name.startswith("__"):
            raise AttributeError(name)
        collective = next((known for part, known in COLLECTIVES.items() if part in name), None)

        def finish(*given: Any, **_: Any) -> StandInGroup:
            if collective is not None and self._size > 1:
                # What is handed in comes last, after what is given back.
                self._note(
                    self._axis, collective, [each for each in tree_leaves(given) if isinstance(each, Tensor)][-1]
                )
            return self

        return finish


def without_device() -> AbstractContextManager[None]:
    """Let blocks run without GPU and ranks: Megatron-core's layers believe their groups.

    PyTorch implementations cut their work by threads of the process; a rank is taken to have one, as torchrun starts it, so
    that a plan is the same wherever it is made.
    """
    return replaced(
        [
            (torch.distributed, "is_initialized", lambda: True),
            (torch.cuda, "current_device", lambda: torch.device("meta")),
            (torch, "get_num_threads", lambda: 1),
        ]
    )


@contextmanager
def replaced(attributes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Give objects other attributes inside the block: (object, name, value) each."""
    before = [getattr(owner, name) for owner, name, _ in attributes]
    try:
        for owner, name, value in attributes:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(attributes, before):
            setattr(owner, name, value)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new parameters in this dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class HostAnswers(TorchFunctionMode):
    """Answers what the host asks of values that meta tensors do not have, and what PyTorch asks of their device."""

    def __init__(self, moe: MoeConfig | None, cut: Cut, counted_tokens: int = COUNTED_TOKENS) -> None:
        super().__init__()
        self.cut, tokens = cut, counted_tokens // cut.tensor
        self.sent, self.choices = tokens * cut.sent, 0 if moe is None else tokens * moe.top_k
        self.places = 0  # for choices of a part's rows, under room
        if cut.room is not None and moe is not None:
            share, held = expected_ranks(moe, cut.expert) / cut.expert, moe.num_experts // cut.expert
            own = tokens // (2 if cut.in_halves else 1)
            self.places = count_places(cut.room, own, moe.top_k, share, cut.expert, held)[1] * cut.expert_tensor

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Call the function, or give what it would on a device."""
        if func is Tensor.tolist:
            return self._routed(args[0].shape)
        if func is scaled_dot_product_attention:  # which PyTorch chooses by device
            return _attend_as_cpu(*args, **kwargs)
        return func(*args, **(kwargs or {}))

    def _routed(self, shape: torch.Size) -> list[Any]:
        """Rows and choices by rank, of this rank and of those that send to it (model/moe/by_rank.py), or ends of experts."""
        if len(shape) == 1:
            rows = self.places or round(self.choices * self.cut.rows)
            return list(accumulate(rows // shape[0] + (number < rows % shape[0]) for number in range(shape[0])))
        sides, parts, ranks, _ = shape
        means = self.sent / parts / ranks, self.choices / parts / ranks
        sent, come = ([[[round(mean * factor) for mean in means]] * ranks] * parts for factor in (1.0, self.cut.rows))
        return [sent, *[come] * (sides - 1)]


def _attend_as_cpu(
    *given: Tensor, attn_mask: Tensor | None = None, enable_gqa: bool = False, **settings: Any
) -> Tensor:
    """PyTorch's attention of meta tensors in the implementation that it takes for such tensors of a CPU."""
    real = [torch.empty(each.shape, dtype=each.dtype, device="cpu") for each in given]
    mask = None if attn_mask is None else torch.empty(attn_mask.shape, dtype=attn_mask.dtype, device="cpu")
    choose: Any = torch._fused_sdp_choice
    choice = choose(*real, attn_mask=mask, enable_gqa=enable_gqa, **settings)
    if attn_mask is not None:  # which becomes addends
        attn_mask = attn_mask.to(given[0].dtype)
    if choice == SDPBackend.FLASH_ATTENTION.value:
        ops = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return ops(*given, attn_mask=attn_mask, **settings)[0]
    ops = torch.ops.aten._scaled_dot_product_attention_math
    return ops(*given, attn_mask=attn_mask, enable_gqa=enable_gqa, **settings)[0]
