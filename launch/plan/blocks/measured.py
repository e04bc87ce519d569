"""Activation memory of a block, found by building one and passing it forward and backward without storage.

How it works: a real `Block`, one rank's part of what tensor, expert and context ranks share, runs on the meta device. Its
groups have the sizes of the layout, and every collective in them is over at once (`StandInGroup`). The bodies of Triton
operations run too, whose launches do nothing, so that what they allocate inside is seen. A dispatch mode logs each storage
that is made or let go: what lives after forward is what the block keeps, and the most that lives during backward is that and
its working space. Gradients of weights are left out, since they are counted with the weights.

Why measured: a formula for each kind of block repeats what its code says and goes stale with it, and a plugin says nothing
of what it keeps. The one number that a block reads on the host, how many rows go to which experts, is answered as an even
router would have it. Bytes are in proportion to tokens, so a search over thousands of layouts asks for some hundred blocks.

A mixer that loops over tokens in PyTorch would launch some hundred thousand operations: after MOST_OPERATIONS the pass is given
up, and bytes and launches follow from those of three short rows, which a line reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial

import torch
import torch.distributed
from torch import Tensor
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.autograd.graph import get_gradient_edge

from amfm.kernels.common.weight_gradients import Later, split_backward
from amfm.kernels.low_precision.products import codes_of
from amfm.kernels.low_precision.recipe import keep_weights, recipe_of
from amfm.launch.console import say
from amfm.launch.plan.activations import BlockBytes, Handed, Storage
from amfm.launch.plan.blocks.seen import LiveBytes, LoopOverTokensError, counted_launches
from amfm.launch.plan.stand_ins import (
    COUNTED_TOKENS,
    WHOLE,
    Cut,
    HostAnswers,
    any_order,
    assume_triton,
    default_dtype,
    without_device,
)
from amfm.model.block import Block
from amfm.model.config.low_precision import LowPrecisionConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.low_precision import attach_to_block
from amfm.model.packing import PackMeta

MOST_OPERATIONS = 20_000  # of a block's forward pass, which takes about a second; ours have at most some thousand
LOOPED_TOKENS, FEWEST_TOKENS = (
    512,
    64,
)  # of the longest row on which a loop over tokens is counted, at first and at least


def block_bytes(
    config: ModelConfig, symbol: str, storage: Storage, cut: Cut = WHOLE, *, tokens: int = COUNTED_TOKENS
) -> BlockBytes:
    """Bytes per token of the micro-batch that one block keeps and works with, its norm and its residual stream included.

    `symbol`: that of the block in `model.pattern`. `tokens`: of a rank's part of a row. Cached: a search asks for the same blocks
    again and again. Raises ValueError for a mixer with an operation that has no fake function.
    """
    return _block_bytes(without_stretch(config), symbol, storage, cut, tokens)


@lru_cache(maxsize=256)
def without_stretch(config: ModelConfig) -> ModelConfig:
    """The model with the rotary frequencies of its first stage: others, for longer texts, change no size."""
    attention = config.attention
    if attention is None or attention.rope.scaling != "ntk":
        return config
    rope = attention.rope.model_copy(update={"scaling": "none", "ntk_alpha": None})
    return config.model_copy(update={"attention": attention.model_copy(update={"rope": rope})})


@lru_cache(maxsize=4096)
def _block_bytes(config: ModelConfig, symbol: str, storage: Storage, cut: Cut, tokens: int) -> BlockBytes:
    dtype = torch.float32 if storage.element_bytes == 4 else torch.bfloat16
    # A run whose chunks or states Triton's kernels do not take has to ask for PyTorch's.
    backend = storage.backend if takes_kernels(config, symbol) else "torch"
    if backend == "torch":
        cut = replace(cut, narrow=None)
    measure = partial(_measure, config, symbol, dtype, backend, cut)
    try:
        return measure(tokens=tokens, most_operations=MOST_OPERATIONS)
    except LoopOverTokensError:
        return _count_loop(symbol, measure, tokens)
    except RuntimeError as error:
        if not lacks_fake(error):
            raise
        raise ValueError(
            f"model.pattern has the mixer {symbol}, which cannot be planned: {error}; its operations need fake functions "
            "(`register_fake`), as those of kernels/ have"
        ) from error


def _count_loop(symbol: str, measure: Callable[..., BlockBytes], wanted: int) -> BlockBytes:
    """What a loop over `wanted` tokens keeps, from rows of three lengths; says so, and where the longest does not follow from the others."""
    tokens = LOOPED_TOKENS
    while tokens > FEWEST_TOKENS:
        try:
            longest = measure(tokens=tokens, most_operations=MOST_OPERATIONS)
            break
        except LoopOverTokensError:
            tokens //= 2
    else:
        longest = measure(tokens=tokens)
    short, middle = (measure(tokens=tokens // part) for part in (4, 2))
    guess, found = line_through(short, middle, tokens // 4, tokens), longest.kept
    differs = "" if abs(guess.kept - found) <= 0.05 * found else "; what it keeps is not in proportion to them"
    say_once(f"block {symbol} launches operations token by token: counted on {tokens} tokens{differs}")
    return line_through(middle, longest, tokens // 2, wanted)


@lru_cache(maxsize=64)
def say_once(text: str) -> None:
    """Print a line that many layouts would repeat."""
    say(text)


def line_through(short: BlockBytes, long: BlockBytes, tokens: int, wanted: int) -> BlockBytes:
    """What a row of `wanted` tokens has, by those of `tokens` and of twice as many; sizes are per token."""

    def per_token(before: float, after: float) -> float:
        slope = 2 * after - before
        return max(0.0, slope + (before - slope) * tokens / wanted)

    def pair(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
        return per_token(before[0], after[0]), per_token(before[1], after[1])

    def started(before: int, after: int) -> int:
        return round(before + (after - before) * (wanted - tokens) / tokens)

    return replace(
        long,
        kept=per_token(short.kept, long.kept),
        working=per_token(short.working, long.working),
        left=per_token(short.left, long.left),
        launches=(started(short.launches[0], long.launches[0]), started(short.launches[1], long.launches[1])),
        between=pair(short.between, long.between),
        kernels=pair(short.kernels, long.kernels),
        mixed=pair(short.mixed, long.mixed),
    )


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
    *,
    tokens: int = COUNTED_TOKENS,
    most_operations: int | None = None,
) -> BlockBytes:
    """Build one block on the meta device, pass it forward and backward, and count its storages."""
    meta = pack_meta(cut.context_rank, cut.context, tokens, has_documents=backend == "triton").map_tensors(
        lambda tensor: tensor.to("meta")
    )
    if config.moe is not None and not cut.in_slots:  # a limit moves choices, and no bytes to speak of
        config = config.model_copy(update={"moe": config.moe.model_copy(update={"capacity_factor": None})})
    live = LiveBytes()
    live.tokens = tokens
    own = tokens // (cut.tensor if cut.is_sequence_parallel else 1)
    later: Later = []
    with ExitStack() as stack:
        if backend == "triton":
            stack.enter_context(assume_triton())
            stack.enter_context(counted_launches(live, note_launch))
        stack.enter_context(without_device())
        stack.enter_context(any_order())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(default_dtype(dtype))
        groups = cut.groups(live.hand)
        block = Block(config.built_letters.index(symbol), config, groups, backend)
        # Whether a mixer rotates its heads stands in a buffer.
        block.mixer.reset_buffers()
        residual_BTD, delta_BTD = _make_inputs(config, block, own, dtype)
        if cut.narrow is not None:
            stack.enter_context(assume_codes(block, cut.narrow))
        if cut.is_split:
            stack.enter_context(split_backward(later))
        live.watch(block.mixer)
        live.stacked = frozenset(weight.shape for weight in block.parameters() if weight.dim() == 3)
        stack.enter_context(live)
        stack.enter_context(HostAnswers(config.moe, cut, tokens))
        if groups.row_capacity is not None:
            stack.enter_context(groups.row_capacity.opened())
        for parameter in block.parameters():
            parameter.register_hook(live.leave_out)
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
        live.most_operations = most_operations
        total_BTD, mixed = block(residual_BTD, delta_BTD, meta)
        live.most_operations = None
        outputs = [total_BTD, mixed.y_BTD, *(mixed.auxiliary or {}).values()]
        edges, likes = [get_gradient_edge(each) for each in outputs], [(each.shape, each.dtype) for each in outputs]
        del total_BTD, mixed, outputs
        kept, _ = live.held()
        begin, forward, live.pass_index = len(live.log), live.launches, 1
        torch.autograd.backward(edges, [torch.empty(shape, dtype=kind) for shape, kind in likes])
        residual_BTD.grad = None
        if delta_BTD is not None:
            delta_BTD.grad = None
        del edges
        left, most = live.held(begin)
    between, kernels, mixing, scans = (
        (found[0] / tokens, found[1] / tokens) for found in (live.between, live.kernels, live.mixed, live.scans)
    )
    return BlockBytes(
        kept / tokens,
        (most - kept) / tokens,
        left / tokens,
        (forward, live.launches - forward),
        block.mixer.is_graphable,
        between,
        kernels,
        mixing,
        scans,
        tuple(live.products),
        tuple(Handed(*key, len(each), sum(each), tokens) for key, each in live.handed.items()),
    )


def _make_inputs(config: ModelConfig, block: Block, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The residual stream of a block and what is to be added to it."""
    stream = torch.float32 if config.residual_in_fp32 else dtype
    residual_BTD = torch.empty(1, tokens, config.hidden_size, dtype=stream)
    delta_BTD: Tensor | None = torch.empty(1, tokens, config.hidden_size)
    if block.stream is not None:
        # As large as it becomes, and joined: what joins it is counted where blocks do so (`made_bytes`).
        sent = torch.empty(1, tokens, config.stream_tensors(len(config.letters)), config.hidden_size, dtype=stream)
        residual_BTD, delta_BTD = block.stream.add(*block.stream.receive(sent))
    return (
        residual_BTD.detach().requires_grad_(),
        None if delta_BTD is None else delta_BTD.detach().requires_grad_(),
    )


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@lru_cache(maxsize=64)
def pack_meta(rank: int, context: int, own_tokens: int, *, has_documents: bool) -> PackMeta:
    """The layout of a row of so many tokens on each of this many context ranks, of one of them."""
    documents = 2 if has_documents else 1  # PyTorch's kernels read on the host where documents begin
    tokens = own_tokens * context
    meta = PackMeta.from_document_ids((torch.arange(tokens) * documents // tokens)[None])
    meta = meta.cut(rank, context).find_bounds()
    return meta.with_tokens(torch.zeros_like(meta.document_ids_BT, dtype=torch.int64))


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


@contextmanager
def assume_codes(block: Block, settings: LowPrecisionConfig) -> Iterator[None]:
    """Inside, a block multiplies by a recipe; codes of weights are there, since they do not grow with tokens."""
    with keep_weights():
        for weight in attach_to_block(block, settings):
            recipe = recipe_of(weight)
            if recipe is not None:
                codes_of(recipe).quantize_weight(weight)
        yield
