"""Checks of blocks: over which axes ranks can share them, which kernels take their sizes, and what their CUDA graphs rule out.

A kind says in its row of the table what it cannot do (`Kind.refuses`) and in its options which sizes its scan has, so these
rules name none. A wrapper such as mixture of memories runs another mixer inside, and that one's limits hold too.

`train.cuda_graphs` does not go with whatever a replay would leave out, or has other memory or launches for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from amfm.model.config.kinds import Kind
from amfm.model.config.options import MixerOptions
from amfm.model.config.schema import ModelConfig
from amfm.pretrain.config.errors import ConfigError, Problem
from amfm.pretrain.config.schema import ParallelConfig, RunConfig

if TYPE_CHECKING:
    import torch


def kinds_in_use(model: ModelConfig) -> list[tuple[Kind, MixerOptions]]:
    """List the kinds of block of the pattern, and those they wrap, that have options.

    The model's own rules report what is wrong with others, and a pattern that does not parse.
    """
    try:
        return list(model.kinds_in_use())
    except ValueError:
        return []


def refusal_problems(model: ModelConfig, section: ParallelConfig) -> Iterator[Problem]:
    """Reject axes over which a block of the pattern cannot be spread."""
    for kind, options in kinds_in_use(model):
        for axis, reason in (*kind.refuses.items(), *options.refuses().items()):
            ranks = getattr(section, axis)
            if ranks > 1:
                rule = f"cannot spread the mixer {kind.symbol} of model.pattern: {reason}"
                yield Problem(f"parallel.{axis}", rule, "use 1, or another mixer", str(ranks))


def training_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject what would never be trained. A conversion freezes routers, and may have them as they are."""
    for kind, options in [] if config.convert is not None else kinds_in_use(config.model):
        for field, rule, remedy in options.broken_training():
            yield Problem(f"model.{kind.section}.{field}", rule, remedy, str(getattr(options, field)))


def longest_lookback(config: RunConfig) -> tuple[int, str]:
    """Find how many tokens before its segment a block reads at most, and the setting that decides it; (0, "") for none."""
    found = []
    for kind, options in kinds_in_use(config.model):
        tokens, field = options.lookback()
        found.append((tokens, f"model.{kind.section}.{field}={getattr(options, field)}" if field else ""))
    return max(found, default=(0, ""))


def refuse_native_model(model: ModelConfig) -> str | None:
    """Why no block of a model runs C code on a CPU; None if one does, and the others then run in PyTorch."""
    reasons = [options.refuse_native() for _, options in kinds_in_use(model)]
    return None if None in reasons else next(filter(None, reasons), "no block has native code")


def check_kernels(config: RunConfig, backend: str) -> None:
    """Raise ConfigError for sizes that the kernels of this backend do not take; `auto` must be resolved."""
    problems = list(kernel_problems(config, backend))
    if problems:
        raise ConfigError(problems)


def kernel_problems(config: RunConfig, backend: str) -> Iterator[Problem]:
    """Check that the Triton kernels take the chunks and states of all scans, and native code a block; nothing for others.

    A kernel keeps a head's state and a chunk's products on chip, so both have bounds (`kernels/common/limits.py`).
    """
    experts = config.kernels.experts
    has_products = bool(config.model.expert_sections()) or config.low_precision.recipe == "fp8_block"
    if experts != "auto" and not (has_products and backend in ("auto", "triton", experts)):
        lacks = "the model has no experts and low_precision.recipe is not fp8_block"
        where = f"all operations run in kernels.backend={backend}" if has_products else lacks
        yield Problem("kernels.experts", f"has no effect if {where}", "leave it out", experts)
    if backend == "native":
        reason = refuse_native_model(config.model)
        if reason is not None:
            yield Problem("kernels.backend", f"has no block to run: {reason}", "use auto", backend)
    if backend != "triton":
        return
    for kind, options in kinds_in_use(config.model):
        scan = options.scan()
        if scan is None:
            continue
        key, (limits, chunk_size, (rows, columns)) = f"model.{kind.section}", scan
        if not limits.takes_chunk(chunk_size):
            rule = f"must be {limits.describe_chunks()} for Triton kernels"
            yield Problem(f"{key}.chunk_size", rule, "use 64, or kernels.backend=torch", str(chunk_size))
        if not limits.takes_state(rows, columns):
            rule = (
                f"has heads with a state of {rows} x {columns}, and Triton kernels hold up to {limits.describe_state()}"
            )
            yield Problem(key, rule, "use smaller heads or states, or kernels.backend=torch")


KEY = "train.cuda_graphs"
NONE = "or train.cuda_graphs=none"


def graph_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject settings that exclude graphs of blocks, each with what would go wrong. `config`: of one stage."""
    if config.train.cuda_graphs == "none":
        return
    for key, value, allowed, rule in excluded_settings(config):
        if value not in allowed:
            remedy = f"use {str(allowed[0]).lower()}, {NONE}"
            yield Problem(key, f"does not go with {KEY}=blocks: it {rule}", remedy, str(value).lower())
    sections: dict[str, tuple[object, str]] = {
        "train.freeze": (config.train.freeze or None, "has blocks without gradients of weights"),
        "convert": (config.convert, "trains blocks next to those that they replace"),
        "health.check_state_every_steps": (config.health.check_state_every_steps, "computes its own gradients"),
        "model.self_guided_training": (
            config.model.self_guided_training,
            "changes with the step, which a replay does not know",
        ),
        f"model.{config.model.stream_name}": (config.model.stream, "hands on another residual stream than graphs keep"),
        "model.lora_mixer": (config.model.lora_mixer, "changes with the step, which a replay does not know"),
    }
    if config.data.packing == "best_fit":
        rule = "counts the tokens of each micro-batch on the host, where data.packing=best_fit pads sequences"
        sections |= {
            f"{name}.capacity_factor": (moe.capacity_factor, rule) for name, moe in config.model.expert_sections()
        }
    for key, (section, rule) in sections.items():
        if section is not None:
            yield Problem(key, f"does not go with {KEY}=blocks: it {rule}", f"remove it, {NONE}")


def excluded_settings(config: RunConfig) -> Iterator[tuple[str, object, tuple[object, ...], str]]:
    """Settings by key: value, what it may be, and why not something else."""
    parallel, train = config.parallel, config.train
    yield "train.compile", train.compile, (False,), "compiles blocks, which then launch by Inductor's own rules"
    yield "train.recompute", train.recompute, ("none",), "computes blocks again in passes that are not captured"
    sums = "hands gradients to autograd, of which graphs of all blocks would keep a copy"
    yield "train.gradient_sums", train.gradient_sums, ("auto", "product"), sums
    stages = {0: "sums gradients by autograd", 2: "sends the sum of each pass", 3: "gathers weights to other memory"}
    yield "parallel.zero_stage", parallel.zero_stage, (1,), stages.get(parallel.zero_stage, "")
    yield (
        "parallel.pipeline",
        parallel.pipeline,
        (1,),
        "has several micro-batches in flight, each with its own memory",
    )
    halves = "passes the halves of a micro-batch through blocks in turn, each with its own layout and memory"
    yield "parallel.overlap_experts", parallel.overlap_experts, (False, True), halves
    yield "parallel.context", parallel.context, (1,), "cuts sequences into segments, whose sizes a replay does not know"
    recipe = "keeps codes of weights, whose memory changes with each step"
    yield "low_precision.recipe", config.low_precision.recipe, ("none",), recipe
    wide = train.precision == "float32"
    backends = ("triton",) if wide else ("auto", "triton")
    reads = "computes in PyTorch's operations in float32" if wide else "reads numbers on the host"
    yield "kernels.backend", config.kernels.backend, backends, reads


def check_graph_device(config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError for graphs on a device that has none."""
    if config.train.cuda_graphs != "none" and device.type != "cuda":
        rule = f"needs a GPU, which replays the passes, and this run is on a {device.type.upper()}"
        raise ConfigError([Problem(KEY, rule, "use none", config.train.cuda_graphs)])
