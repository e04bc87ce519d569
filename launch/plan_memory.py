"""Bytes that one rank needs for a step: what stays, and the fuller of two phases, the passes and the optimizer's step.

Parallelism is data parallel with ZeRO 0-3 as `pretrain/engine.py` runs it. Gradients lie whole on every rank, in the
dtype of the weights, until the last backward pass of a step (they are reduced once a step, at every stage), and with
bf16 and several micro-batches a rank also as float32 sums. So ZeRO-2 and 3 spare no gradient memory here.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan_activations import FLOAT32_BYTES, Storage, block_bytes, head_bytes, recomputed_bytes
from model.config import ModelConfig
from model.flops import count_parameters
from model.pattern import parse_pattern
from pretrain.config import RunConfig
from pretrain.recompute import recomputed_letters

KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "feed_forward"}
BUCKET_ELEMENTS = 200_000_000  # of a reduction (pretrain/engine.py)
STAGE0_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's own all-reduce
PREFETCH_ELEMENTS = 50_000_000  # that it gathers ahead
LIVE_ELEMENTS = 1_000_000_000  # weights that ZeRO-3 keeps gathered


@dataclass(frozen=True)
class Layout:
    """How the run lies on the machine: data ranks, ZeRO stage, rows a forward pass."""

    ranks: int
    zero_stage: int
    micro_batch_size: int


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank by part, at the moment when they are most; `phase` names that moment."""

    parts: dict[str, float]
    phase: str

    def total(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def storage_of(config: RunConfig, *, on_gpu: bool = True) -> Storage:
    """Bytes an element and kernels that will run; `auto` is Triton on a GPU."""
    backend = config.kernels.backend
    if backend == "auto":
        backend = "triton" if on_gpu else "torch"
    return Storage(2 if config.train.precision == "bf16" else 4, "triton" if backend == "triton" else "torch")


def estimate_memory(config: RunConfig, layout: Layout, storage: Storage, *, margin: float) -> Memory:
    """Peak bytes of a rank. `margin` is the part of the rest that fragmentation and small things take."""
    parameters = count_parameters(config.model).total
    accumulates = config.train.global_batch_size > layout.micro_batch_size * layout.ranks
    stays = lasting_bytes(parameters, layout, storage)
    pass_parts = busiest_pass(config, layout, storage, accumulates=accumulates)
    step_parts = step_bytes(parameters, layout, storage)
    phase = "passes" if sum(pass_parts.values()) >= sum(step_parts.values()) else "optimizer step"
    parts = stays | (pass_parts if phase == "passes" else step_parts)
    parts["margin"] = margin * sum(parts.values())
    return Memory({name: size for name, size in parts.items() if size > 0}, phase)


def lasting_bytes(parameters: int, layout: Layout, storage: Storage) -> dict[str, float]:
    """Weights, float32 masters and moments, and buffers that live as long as the run."""
    e, stage = storage.element_bytes, layout.zero_stage
    share = parameters / layout.ranks if stage else parameters
    has_masters = stage > 0 or e < FLOAT32_BYTES
    return {
        "weights": e * (share if stage == 3 else parameters),
        "masters": FLOAT32_BYTES * share if has_masters else 0.0,
        "moments": 2 * FLOAT32_BYTES * share,
        "gradient share": e * share if stage == 3 else 0.0,
        "reduction bucket": FLOAT32_BYTES * min(parameters, BUCKET_ELEMENTS) if stage == 3 else 0.0,
    }


def busiest_pass(config: RunConfig, layout: Layout, storage: Storage, *, accumulates: bool) -> dict[str, float]:
    """Parts at the fullest moment of forward and backward: activations shrink while gradients grow.

    With `accumulates` this is not the step's first micro-batch, so all gradients exist already.
    """
    model, tokens, e = config.model, layout.micro_batch_size * config.train.sequence_length, storage.element_bytes
    letters = parse_pattern(model.pattern).letters
    counts = count_parameters(model)
    number = {letter: letters.count(letter) for letter in letters}
    weights = {letter: counts.total_by_kind[KINDS[letter]] / number[letter] for letter in number}
    sizes = {letter: block_bytes(model, letter, storage) for letter in number}
    for letter in recomputed_letters(config):
        sizes[letter] = recomputed_bytes(sizes[letter], model, storage)
    gradient_bytes = e + (FLOAT32_BYTES if accumulates and e < FLOAT32_BYTES else 0)
    whole = counts.total * gradient_bytes
    kept_head, working_head = head_bytes(model, storage, tokens)
    activations: float = tokens * sum(sizes[letter].kept for letter in letters)
    gathered = gathered_bytes(model, layout, storage, max(weights.values()))

    def moment(kept: float, working: float, gradients: float, logits: float) -> dict[str, float]:
        return {
            "gradients": gradients,
            "activations": kept,
            "working space": working,
            "logits": logits,
            "gathered weights": gathered,
        }

    best = moment(activations, 0.0, whole if accumulates else 0.0, kept_head + working_head)
    made: float = model.vocab_size * model.hidden_size * e
    for letter in reversed(letters):
        made += weights[letter] * gradient_bytes
        gradients = whole if accumulates else min(made, whole)
        found = moment(activations, tokens * sizes[letter].working, gradients, 0.0)
        if sum(found.values()) > sum(best.values()):
            best = found
        activations -= tokens * sizes[letter].kept
    return best


def gathered_bytes(model: ModelConfig, layout: Layout, storage: Storage, largest_block: float) -> float:
    """Whole weights that ZeRO-3 holds besides the shares."""
    if layout.zero_stage != 3:
        return 0.0
    parameters = count_parameters(model).total
    # Several ranks' parts arrive in one buffer and are copied out of it, tensor by tensor.
    arriving = min(parameters, PREFETCH_ELEMENTS) if layout.ranks > 1 else 0
    return storage.element_bytes * (min(parameters, LIVE_ELEMENTS + largest_block) + arriving)


def step_bytes(parameters: int, layout: Layout, storage: Storage) -> dict[str, float]:
    """Parts while gradients are reduced and AdamW runs: activations are gone."""
    e, stage = storage.element_bytes, layout.zero_stage
    bucket = min(parameters, BUCKET_ELEMENTS if stage else STAGE0_BUCKET_ELEMENTS)
    whole = e * parameters
    if stage == 0:
        copies = FLOAT32_BYTES * parameters if e < FLOAT32_BYTES else 0.0
        buffers = float(bucket) * (e + FLOAT32_BYTES)  # gradients joined, and what is sent
        return {"gradients": whole + copies, "communication": max(0.0, buffers - copies)}
    share = parameters / layout.ranks
    if stage == 3:
        buffers = bucket * FLOAT32_BYTES if layout.ranks > 1 else 0.0
        stepping = FLOAT32_BYTES * share if e < FLOAT32_BYTES else 0.0
        return {"gradients": max(whole, stepping), "communication": buffers}
    reducing = whole + e * share + 2 * bucket * FLOAT32_BYTES
    stepping = whole / layout.ranks + 2 * e * share + (FLOAT32_BYTES * share if e < FLOAT32_BYTES else 0.0)
    if reducing >= stepping:
        return {"gradients": whole + e * share, "communication": 2.0 * bucket * FLOAT32_BYTES}
    return {"gradients": stepping, "communication": 0.0}
