"""Activation memory of a block, found by building one and passing it forward and backward without storage.

How it works: a real `Block`, one rank's part of what tensor, expert and context ranks share, runs on the meta device. Its
groups have the sizes of the layout, and every collective in them is over at once (`StandInGroup`). The bodies of Triton
operations run too, whose launches do nothing, so that what they allocate inside is seen. A dispatch mode logs each storage
that is made or let go: what lives after forward is what the block keeps, and the most that lives during backward is that and
its working space. Gradients of weights are left out, since they are counted with the weights.

Why measured: a formula for each kind of block repeats what its code says and goes stale with it, and a plugin says nothing
of what it keeps. The one number that a block reads on the host, how many rows go to which experts, is answered as an even
router would have it. Bytes are in proportion to tokens, so a search over thousands of layouts asks for some hundred blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amfm.kernels.common.custom_op import find_body
from amfm.kernels.common.split_backward import Later, split_backward
from amfm.kernels.low_precision.kept_weights import keep_weights
from amfm.kernels.low_precision.products import codes_of
from amfm.kernels.low_precision.recipe import recipe_of
from amfm.launch.plan.activations import BlockBytes, Storage
from amfm.launch.plan.stand_in_triton import triton_at_hand
from amfm.model.block import Block
from amfm.model.config.low_precision import LowPrecisionConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.low_precision import attach_to_block
from amfm.model.moe.transfer import expected_ranks
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import AXES, ProcessGroupCollection, RowRoom, SingleRankGroup, count_places

# Tokens of a rank's row whose pass is counted: chunks, windows and segments of the usual sizes, and not the width of a weight.
COUNTED_TOKENS = 4608


QUIET = ("detach", "lift_fresh", "_unsafe_view", "alias")  # operations that launch nothing


@dataclass(frozen=True)
class Cut:
    """What of a layout decides how large a block is on a rank: the ranks that share it, and what its experts get.

    `in_slots`: whether rows to experts are in slots of a capacity. Else they have `room` (`RowRoom`), or `sent` rows of a token
    are sent, once to each rank of its experts, and the most loaded rank gets `rows` times the mean. `in_halves`: of a micro-batch. `is_split`: whether weight
    gradients are left for later. `narrow`: the recipe by which its products are made, None without.
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

    def groups(self) -> ProcessGroupCollection:
        """The groups of the first rank, each of its axis' size."""
        inside = self.expert_tensor if self.expert > 1 else self.tensor
        sizes = {"tp": self.tensor, "cp": self.context, "ep": self.expert, "expt_tp": inside}
        groups = ProcessGroupCollection(**{axis: StandInGroup(sizes.get(axis, 1)) for axis in AXES})
        groups.sequence_parallel, groups.overlap_experts = self.is_sequence_parallel, self.in_halves
        groups.row_room = None if self.room is None else RowRoom(self.room, torch.device("meta"))
        return groups


def block_bytes(config: ModelConfig, symbol: str, storage: Storage, cut: Cut = Cut()) -> BlockBytes:
    """Bytes per token of the micro-batch that one block keeps and works with, its norm and its residual stream included.

    `symbol`: that of the block in `model.pattern`. Cached: a search asks for the same blocks again and again. Raises
    ValueError for a mixer with an operation that has no fake function.
    """
    return _block_bytes(without_stretch(config), symbol, storage, cut)


@lru_cache(maxsize=256)
def without_stretch(config: ModelConfig) -> ModelConfig:
    """The model with the rotary frequencies of its first stage: others, for longer texts, change no size."""
    attention = config.attention
    if attention is None or attention.rope.scaling != "ntk":
        return config
    rope = attention.rope.model_copy(update={"scaling": "none", "ntk_alpha": None})
    return config.model_copy(update={"attention": attention.model_copy(update={"rope": rope})})


@lru_cache(maxsize=4096)
def _block_bytes(config: ModelConfig, symbol: str, storage: Storage, cut: Cut) -> BlockBytes:
    dtype = torch.float32 if storage.element_bytes == 4 else torch.bfloat16
    # A run whose chunks or states Triton's kernels do not take has to ask for PyTorch's.
    backend = storage.backend if takes_kernels(config, symbol) else "torch"
    if backend == "torch":
        cut = replace(cut, narrow=None)
    try:
        return _measure(config, symbol, dtype, backend, cut)
    except RuntimeError as error:
        if not lacks_fake(error):
            raise
        raise ValueError(
            f"model.pattern has the mixer {symbol}, which cannot be planned: {error}; its operations need fake functions "
            "(`register_fake`), as those of kernels/ have"
        ) from error


def pass_block(config: ModelConfig, symbol: str, cut: Cut, note_launch: Callable[..., None]) -> None:
    """Pass one block forward and backward in bfloat16 without storage, and hand each launch of a Triton kernel to `note_launch`.

    It is called with the kernel and the arguments of the launch.
    """
    _measure(without_stretch(config), symbol, torch.bfloat16, "triton", cut, note_launch)


def _measure(
    config: ModelConfig,
    symbol: str,
    dtype: torch.dtype,
    backend: str,
    cut: Cut,
    note_launch: Callable[..., None] = lambda *_, **__: None,
) -> BlockBytes:
    """Build one block on the meta device, pass it forward and backward, and count its storages."""
    meta = pack_meta(cut.context, has_documents=backend == "triton").map_tensors(lambda tensor: tensor.to("meta"))
    if config.moe is not None and not cut.in_slots:  # a limit moves choices, and no bytes to speak of
        config = config.model_copy(update={"moe": config.moe.model_copy(update={"capacity_factor": None})})
    live = LiveBytes()
    own = COUNTED_TOKENS // (cut.tensor if cut.is_sequence_parallel else 1)
    later: Later = []
    with ExitStack() as stack:
        if backend == "triton":
            stack.enter_context(triton_at_hand())
            stack.enter_context(counted_launches(live, note_launch))
        stack.enter_context(without_device())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(default_dtype(dtype))
        groups = cut.groups()
        block = Block(config.built_letters.index(symbol), config, groups, backend)
        # Whether a mixer rotates its heads stands in a buffer.
        block.mixer.reset_buffers()
        stream = torch.float32 if config.residual_in_fp32 else dtype
        residual_BTD = torch.empty(1, own, config.hidden_size, dtype=stream, requires_grad=True)
        delta_BTD = torch.empty(1, own, config.hidden_size, requires_grad=True)
        if cut.narrow is not None:
            stack.enter_context(codes_at_hand(block, cut.narrow))
        if cut.is_split:
            stack.enter_context(split_backward(later))
        live.stacked = frozenset(weight.shape for weight in block.parameters() if weight.dim() == 3)
        stack.enter_context(live)
        stack.enter_context(HostAnswers(config.moe, cut))
        if groups.row_room is not None:
            stack.enter_context(groups.row_room.opened())
        for parameter in block.parameters():
            parameter.register_hook(live.leave_out)
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
        total_BTD, mixed = block(residual_BTD, delta_BTD, meta)
        outputs = [total_BTD, mixed.y_BTD, *(mixed.auxiliary or {}).values()]
        edges, likes = [get_gradient_edge(each) for each in outputs], [(each.shape, each.dtype) for each in outputs]
        del total_BTD, mixed, outputs
        kept, _ = live.held()
        begin, forward = len(live.log), live.launches
        torch.autograd.backward(edges, [torch.empty(shape, dtype=kind) for shape, kind in likes])
        residual_BTD.grad = delta_BTD.grad = None
        del edges
        left, most = live.held(begin)
    launches = forward, live.launches - forward
    sizes = kept / COUNTED_TOKENS, (most - kept) / COUNTED_TOKENS, left / COUNTED_TOKENS
    return BlockBytes(*sizes, launches, block.mixer.is_graphable)


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@lru_cache(maxsize=64)
def pack_meta(context: int, *, has_documents: bool) -> PackMeta:
    """The layout of a row of COUNTED_TOKENS on each of this many context ranks, of the first of them."""
    documents = 2 if has_documents else 1  # PyTorch's kernels read on the host where documents begin
    tokens = COUNTED_TOKENS * context
    meta = PackMeta.from_document_ids((torch.arange(tokens) * documents // tokens)[None])
    return meta.cut(0, context).find_bounds()


def lacks_fake(error: RuntimeError) -> bool:
    """Whether an error is of an operation without a fake function; torch says it in three ways."""
    known = isinstance(error, (UnsupportedOperatorException, NotImplementedError))
    return known or "no fake impl registered" in str(error)


def takes_kernels(config: ModelConfig, symbol: str) -> bool:
    """Whether Triton's kernels take the chunks and states of a mixer, and of one that it wraps."""
    options = config.block_options(symbol)
    inside = options.wraps()
    wrapped = None if inside is None else getattr(config.mixers, inside)
    scans = [each.scan() for each in (options, wrapped) if each is not None]
    return all(scan[0].takes_chunk(scan[1]) and scan[0].takes_state(*scan[2]) for scan in scans if scan is not None)


class StandInGroup(SingleRankGroup):
    """The first rank's process group of any size; a collective is over at once, its result as it was allocated."""

    def __init__(self, size: int) -> None:
        self._size = size

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
        return lambda *_, **__: self


@contextmanager
def codes_at_hand(block: Block, settings: LowPrecisionConfig) -> Iterator[None]:
    """Inside, a block multiplies by a recipe; codes of weights are there, since they do not grow with tokens."""
    with keep_weights():
        for weight in attach_to_block(block, settings):
            recipe = recipe_of(weight)
            if recipe is not None:
                codes_of(recipe).quantize_weight(weight)
        yield


def counted_launches(live: LiveBytes, note_launch: Callable[..., None]) -> AbstractContextManager[None]:
    """Inside the block, launches of Triton kernels are counted and noted, and do nothing."""
    from triton.runtime.jit import JITFunction

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        live.launches += 1
        return partial(note_launch, kernel)

    return replaced([(JITFunction, "__getitem__", launch)])


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

    def __init__(self, moe: MoeConfig | None, cut: Cut) -> None:
        super().__init__()
        self.cut, tokens = cut, COUNTED_TOKENS // cut.tensor
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


class LiveBytes(TorchDispatchMode):
    """Inside its block, logs the storages that are made and let go, in order.

    `stacked`: shapes of weights that a pass may read more than once, of which all that is made is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stacked: frozenset[torch.Size] = frozenset()
        self.launches = 0
        self.log: list[tuple[int, int]] = []  # number of a storage, and its bytes, negative when it goes
        self.numbers: dict[int, int] = {}
        self.left_out: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, or the body of one of Triton kernels, and note what it gives that is not a view."""
        body, kwargs = find_body(func), kwargs or {}
        if body is None:
            out = func(*args, **kwargs)
            self.launches += not (func.is_view or "empty" in func._opname or func._opname in QUIET)
        else:
            with self:
                out = body(*args, **kwargs)
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id_of(tensor) not in given and id_of(tensor) not in self.numbers:
                self._note(tensor)
        return out

    def leave_out(self, tensor: Tensor | None) -> None:
        """Count the storage of a weight's gradient in no sum."""
        if tensor is not None and id_of(tensor) in self.numbers:
            self.left_out.add(self.numbers[id_of(tensor)])

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
