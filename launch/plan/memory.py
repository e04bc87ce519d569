"""Peak memory of one rank: persistent states, plus the most loaded of building, the passes and the optimizer's step.

How it works: each phase is a table of named parts in bytes. Weights, master weights and moments persist, sharded
by ZeRO. The passes are walked backwards block by block, as activations shrink while gradients grow, to find their
most loaded moment. The optimizer phase adds what DeepSpeed allocates to reduce gradients and to step. Building is counted
as well: a rank's model is made whole, in float32, on the device. Every pipeline stage is estimated; the most loaded
decides.

Under ZeRO-1 gradients are float32 sums that are whole on every rank until the last backward pass of a step; ZeRO-2 reduces
them in every pass and keeps this rank's share and the buckets under way. Under ZeRO-0 and 3 they are whole in the dtype of
the weights, with bf16 and several micro-batches also as float32 sums. tests/launch/plan/real_memory.py measures the estimates against real steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import compress
from operator import mul

from amfm.launch.plan.activations import (
    FLOAT32_BYTES,
    BlockBytes,
    Storage,
    depth_bytes,
    head_bytes,
    made_bytes,
    recomputed_bytes,
    stream_bytes,
)
from amfm.launch.plan.blocks.cut import cut_of
from amfm.launch.plan.blocks.measured import block_bytes
from amfm.launch.plan.exchange import DEEPSPEED_BUCKET_ELEMENTS
from amfm.launch.plan.exchanges.buckets import bucketed_bytes, resting_bytes
from amfm.launch.plan.graphs import with_graphs
from amfm.launch.plan.hardware import GIB, Hardware
from amfm.launch.plan.in_flight import Moment, moments_of, places_of
from amfm.launch.plan.layout import Layout, StageShare, count_routed, distinct_stages, held_by_stages
from amfm.launch.plan.low_precision import code_bytes, narrow_kinds
from amfm.launch.plan.step_memory import gathered_bytes, step_bytes
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.config.schema import RunConfig


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a rank by named part; `phase` says when the peak occurs."""

    parts: dict[str, float]
    phase: str

    def total(self) -> float:
        """Bytes of all parts together."""
        return sum(self.parts.values())


def estimate_memory(
    config: RunConfig,
    layout: Layout,
    storage: Storage,
    *,
    margin: float,
    imbalance: float = 1.0,
    hardware: Hardware | None = None,
) -> Memory:
    """Peak bytes of the most loaded rank. `margin`: fraction added for fragmentation and small allocations.

    `hardware`: of which context and communicators take memory too; None: only what PyTorch allocates.

    `imbalance`: routed rows of the most loaded rank over the mean, where experts are spread.
    """
    stages = distinct_stages(
        held_by_stages(config.model, layout, config.train.sequence_length, config.optimizer.matrix_settings()),
        frozenset(config.low_precision.narrow_blocks(config.model.letters)),
    )
    sizes = block_sizes(config, layout, storage, imbalance, {symbol for held in stages for symbol in held.letters})
    narrow = {held: narrow_kinds(config, held, storage) for held in stages}
    by_recipe = block_sizes(config, layout, storage, imbalance, frozenset().union(*narrow.values()), is_narrow=True)
    found = [
        estimate_stage(
            config, layout, storage, held, imbalance, sizes | {symbol: by_recipe[symbol] for symbol in narrow[held]}
        )
        for held in stages
    ]
    fullest = max(found, key=Memory.total)
    parts = fullest.parts | {"margin": margin * fullest.total()}
    if hardware is not None:
        axes = (
            layout.tensor,
            layout.context,
            layout.pipeline,
            layout.expert,
            layout.dense_sharers,
            layout.expert_sharers,
        )
        groups = sum(size > 1 for size in axes) + (layout.ranks > 1)  # and the one of all ranks
        parts |= {"CUDA context": GIB * hardware.context_gib, "communicators": GIB * hardware.communicator_gib * groups}
    return Memory({name: size for name, size in parts.items() if size > 0}, fullest.phase)


def block_sizes(
    config: RunConfig,
    layout: Layout,
    storage: Storage,
    imbalance: float,
    letters: Collection[str],
    *,
    is_narrow: bool = False,
) -> dict[str, BlockBytes]:
    """Bytes of each kind of block on a rank, those that are computed again as such; `is_narrow`: by the recipe."""
    sizes = {
        symbol: block_bytes(
            config.model, symbol, storage, cut_of(config, layout, symbol, imbalance, is_narrow=is_narrow)
        )
        for symbol in letters
    }
    for symbol in layout.recompute & sizes.keys():
        sizes[symbol] = recomputed_bytes(sizes[symbol], config.model, storage, layout.stream_ranks)
    return sizes


def estimate_stage(
    config: RunConfig,
    layout: Layout,
    storage: Storage,
    held: StageShare,
    imbalance: float,
    sizes: Mapping[str, BlockBytes] | None = None,
    *,
    is_captured: bool = True,
) -> Memory:
    """Peak bytes of a rank of one pipeline stage, without margin: the most loaded of its three phases.

    `sizes`: those of `block_sizes`, where they are known. `is_captured`: whether passes under `train.cuda_graphs` are captured.
    """
    if sizes is None:
        narrow = narrow_kinds(config, held, storage)
        sizes = block_sizes(config, layout, storage, imbalance, set(held.letters) - narrow)
        sizes |= block_sizes(config, layout, storage, imbalance, narrow, is_narrow=True)
    stays = persistent_bytes(held, layout, storage)
    codes = {"codes of weights": code_bytes(config.model, config.low_precision, layout, held)}
    phases = busiest_pass(config, layout, storage, held, sizes), step_bytes(held, layout, storage)
    passes, step = with_graphs(config, layout, storage, held, sizes, *phases, is_captured=is_captured)
    if config.distill is not None:
        from amfm.launch.plan.teacher import comparison_bytes, teacher_bytes  # where one teaches

        stays |= teacher_bytes(config, layout, storage)
        passes |= comparison_bytes(config, layout, storage)
    moments = {
        "passes": stays | codes | passes,
        "optimizer step": stays | step,
        "building": building_bytes(held, layout, storage),
    }
    phase = max(moments, key=lambda name: sum(moments[name].values()))
    place = f" of pipeline stage {held.stage}" if layout.pipeline > 1 else ""
    return Memory(moments[phase], f"{phase}{place}")


def building_bytes(held: StageShare, layout: Layout, storage: Storage) -> dict[str, float]:
    """Parts at the peak before the first step: the float32 model, or DeepSpeed's states with what it shards from."""
    e, parameters = storage.element_bytes, held.parameters
    first = {"weights in float32": FLOAT32_BYTES * parameters}
    stays = persistent_bytes(held, layout, storage)
    if layout.zero_stage == 0:
        # The wrapper of bf16 steps once, with gradients of zeros, to allocate moments.
        then = stays | ({"gradients": (FLOAT32_BYTES + e) * parameters} if e < FLOAT32_BYTES else {"moments": 0.0})
    elif layout.zero_stage == 3:
        then = stays | {"moments": 0.0}
    else:
        then = stays | {"joined weights": e * parameters, "moments": 0.0}
    return max(first, then, key=lambda parts: sum(parts.values()))


def persistent_bytes(held: StageShare, layout: Layout, storage: Storage) -> dict[str, float]:
    """Parts that live as long as the run: weights, master weights, moments (two of AdamW's, one of Muon's, a package's own), ZeRO-3's buffers."""
    e, stage = storage.element_bytes, layout.zero_stage
    share = held.share(layout) if stage else held.parameters
    matrices = held.own_matrices(layout) if stage else held.matrices
    has_masters = stage > 0 or e < FLOAT32_BYTES
    return {
        "weights": e * (share if stage == 3 else held.parameters),
        "master weights": storage.state_bytes * share if has_masters else 0.0,
        "moments": storage.state_bytes
        * (
            storage.num_moments * (share - matrices.dense - matrices.routed)
            + matrices.dense_state
            + matrices.routed_state
        ),
        "average of weights": FLOAT32_BYTES * share if storage.keeps_average else 0.0,
        "gradient share": e * share if stage == 3 else 0.0,
        "reduction bucket": FLOAT32_BYTES * min(held.parameters, DEEPSPEED_BUCKET_ELEMENTS) if stage == 3 else 0.0,
    }


def busiest_pass(
    config: RunConfig, layout: Layout, storage: Storage, held: StageShare, sizes: Mapping[str, BlockBytes]
) -> dict[str, float]:
    """Parts at the most loaded moment of forward and backward of a rank, whose blocks have these sizes.

    Walks from the head to the first block: each block's backward pass frees its activations and adds its gradients, so
    the peak is where their sum with the block's working space is largest. A pass that is cut in two leaves what the
    gradients of weights are made of.
    """
    model, tokens, e = config.model, layout.tokens(config), storage.element_bytes
    routed = {symbol for symbol in sizes if model.block_options(symbol).routed_experts()}
    is_bucketed = layout.zero_stage in (1, 2)
    gradient_bytes = e + (FLOAT32_BYTES if layout.micro_batches(config) > 1 and e < FLOAT32_BYTES else 0)
    whole = bucketed_bytes(held, layout) if is_bucketed else held.parameters * gradient_bytes
    between = resting_bytes(held, layout) if is_bucketed else whole
    block_gradients = whole / max(1, len(held.letters))
    accumulates = storage.accumulates and is_bucketed
    kept_head, working_head = 0.0, 0.0
    if held.has_head:
        kept_head, working_head = head_bytes(model, storage, tokens, layout.tensor, accumulates=accumulates)
    kept_head *= held.heads  # the losses of MTP layers stay until the backward pass begins with them
    gathered, arriving = gathered_bytes(layout, storage, held)
    # Of routed experts all gradients are made at once, in the dtype of the weights, before they join the sums; those of halves
    # are next to each other. Where products add to the sums nothing is next to them.
    stored = held.routed_blocks - count_routed(model, repeated_letters(model, held))
    is_apart = storage.backend == "triton" and not accumulates
    expert_gradients = e * held.routed / max(1, stored) if is_apart else 0.0
    waiting = waiting_gradients(model, layout, held, e, expert_gradients, kept_head / max(1, held.heads))
    expert_gradients *= layout.expert_parts

    def summed(passed: tuple[bool, ...], gradients: float) -> float:
        return block_gradients / whole * gradients * sum(map(len, compress(held.pieces, passed)))

    last, is_cut = len(held.pieces) - 1, layout.schedule == "zero_bubble"
    # A block's number of bytes, looked up once for all moments: working space with what its backward pass makes, and what is freed.
    freed = {symbol: tokens * ((size.left if is_cut else 0.0) - size.kept) for symbol, size in sizes.items()}
    works = {symbol: tokens * size.working for symbol, size in sizes.items()}
    for symbol in routed:
        # A pass that is cut in two makes the weights' gradients when the rest of it is over.
        works[symbol] = max(works[symbol], expert_gradients) if is_cut else works[symbol] + expert_gradients
    # The head's gradient is the first of a pass.
    size = FLOAT32_BYTES if is_bucketed else e
    of_head = model.vocab_size * model.hidden_size * size / layout.tensor * held.has_head
    most: dict[tuple[int, bool, tuple[bool, ...]], float] = {}
    for (piece, is_forward, _, _, passed), activations in activations_of(config, layout, storage, held, sizes):
        most[piece, is_forward, passed] = max(activations, most.get((piece, is_forward, passed), 0.0))
    # Gradients, activations, working space, logits and gathered weights at the most loaded moment.
    fullest, fullest_sum = (0.0, 0.0, 0.0, 0.0, 0.0), -1.0
    for (piece, is_forward, passed), activations in most.items():
        if is_forward:
            if piece == last:
                gradients = summed(passed, between)
                if accumulates and layout.tensor > 1:  # the head's product adds to its sum while the logits are there
                    gradients = min(whole, gradients + of_head)
                moment = gradients, activations, 0.0, kept_head + working_head, gathered
                if sum(moment) > fullest_sum:
                    fullest, fullest_sum = moment, sum(moment)
            continue
        made = of_head + summed(passed, whole)
        adds, waits = 0.0 if passed[piece] else block_gradients, piece == last
        for place in range(len(held.pieces[piece]) - 1, -1, -1):
            symbol = held.pieces[piece][place]
            made += adds
            gradients = made if made < whole else whole
            working = works[symbol] + waiting[place] if waits else works[symbol]
            here = gradients + activations + working + gathered + arriving
            if here > fullest_sum:
                fullest, fullest_sum = (gradients, activations, working, 0.0, gathered + arriving), here
            activations += freed[symbol]
    names = ("gradients", "activations", "working space", "logits", "gathered weights")
    return dict(zip(names, fullest))


def repeated_letters(model: ModelConfig, held: StageShare) -> tuple[str, ...]:
    """Letters of the blocks that a stage passes without holding them again: those of an MTP layer that others share."""
    is_shared = model.mtp is not None and model.mtp.shared
    return model.parsed_pattern.depth_letters * max(0, held.depths - 1) if is_shared else ()


def waiting_gradients(
    model: ModelConfig,
    layout: Layout,
    held: StageShare,
    element_bytes: int,
    expert_gradients: float,
    kept_head: float,
) -> list[float]:
    """Bytes that are at each block of the last piece until gradients of the same weights join them.

    Of MTP layers, whose backward passes come before the main model's: the head's gradient and what its pass for the
    main loss keeps; and those of the embedding and of a shared depth's experts, until the first depth has passed.
    """
    letters, depth = held.pieces[-1], model.parsed_pattern.depth_letters
    found = [0.0] * len(letters)
    if not held.depths:
        return found
    table = element_bytes * model.vocab_size * model.hidden_size / layout.tensor
    is_shared = model.mtp is not None and model.mtp.shared
    first, last = len(letters) - held.depths * len(depth), len(letters) - len(depth)
    for place in range(first, len(letters)):
        found[place] = table + kept_head
        if place < last:
            found[place] += table + expert_gradients * count_routed(model, depth) * is_shared
    return found


def activations_of(
    config: RunConfig,
    layout: Layout,
    storage: Storage,
    held: StageShare,
    sizes: Mapping[str, BlockBytes],
) -> Iterator[tuple[Moment, float]]:
    """Bytes of activations at each kind of pass of a rank.

    In a pipeline the residual stream that a piece sends on is there until its backward pass, and one that will be received next is
    there already. Passes that are cut in two leave what the gradients of weights are made of.
    """
    tokens, stage = layout.tokens(config), held.stage
    is_piped, is_cut = layout.pipeline > 1, layout.schedule == "zero_bubble"
    stream = tokens * stream_bytes(config.model, storage, layout.stream_ranks) * is_piped
    kept, cut = [], []
    for number, (letters, places) in enumerate(zip(held.pieces, places_of(held), strict=True)):
        is_end = held.has_head and number == len(held.pieces) - 1
        own = sum(sizes[symbol].kept for symbol in letters)
        if is_end:  # what the projections of MTP layers keep
            own += held.depths * depth_bytes(config.model, storage, layout.tensor, layout.stream_ranks)
        sent = 0 if is_end else config.model.stream_tensors(places[-1] + 1)
        kept.append(tokens * (own + made_bytes(config.model, storage, layout.stream_ranks, places)) + sent * stream)
        cut.append(tokens * sum(sizes[symbol].left for symbol in letters))
    for found in moments_of(layout, stage, layout.micro_batches(config)):
        bytes_held = sum(map(mul, found.held, kept))
        if is_cut:
            bytes_held += sum(map(mul, found.cut, cut))
        yield found, bytes_held + stream * config.model.stream_tensors(places_of(held)[found.piece][0])
